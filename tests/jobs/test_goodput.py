# SPDX-License-Identifier: Apache-2.0
"""Where a run's time goes: its own record, and a clock outside of it."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, killing

from dcae_jax.errors import UserError
from dcae_jax.jobs import goodput, times
from dcae_jax.planner import chips


def _line(started, first, last, marks=None, **seconds):
    sections = {f"{name}_s": 0.0 for name in goodput.SECTIONS}
    sections |= {f"{name}_s": value for name, value in seconds.items()}
    facts = {"started": started, "first_step": first, "last_step": last}
    return {**facts, "marks": {str(first): 0.0, **(marks or {})}, **sections}


def test_steps_that_a_later_process_did_again_are_lost():
    """Catches steps counted twice, and a checkpoint of two processes ago."""
    lines = [
        _line(100.0, 0, 8, {"4": 40.0}, startup=10.0, step=90.0),  # resumed at 4: 50 s lost
        _line(230.0, 4, 12, {"8": 30.0, "12": 70.0}, step=80.0, input=5.0),  # all of it kept
        _line(320.0, 12, 14, step=7.0, evaluation=3.0),  # killed before a checkpoint
    ]
    found = goodput.goodput(lines)
    assert (found.lost_s, found.stopped_s, found.restarts) == (50.0, 35.0, 2)
    assert found.total_s == 195.0 and found.fraction == (40 + 80 + 7) / 195
    # The checkpoints 12 and 8 are damaged: the fourth process goes on from 4.
    lines.append(_line(340.0, 4, 20, step=100.0))
    found = goodput.goodput(lines)
    assert found.lost_s == 50.0 + 80.0 + 7.0 and found.sections["step"] == 140.0
    assert "lost to kills" in goodput.summary(lines)


def test_time_goes_to_the_innermost_section_and_only_idle_devices_wait(monkeypatch, tmp_path):
    """Catches time counted twice, and a wait for data behind which the devices were busy."""
    now = itertools.count().__next__

    class Clock:
        seconds = 0.0

    monkeypatch.setattr(times.time, "perf_counter", lambda: Clock.seconds)

    def after(seconds):
        Clock.seconds += seconds

    kept = times.Times(str(tmp_path), 0, 4, 0.0)
    after(5)
    with kept.section("evaluation"):
        after(1)
        with kept.section("checkpoint"):
            after(2)
        after(1)

    def batches():
        after(3)
        yield 0  # nothing was queued yet: 3 s of waiting
        after(4)
        kept._finished.put(None)
        kept.watch()  # the first step ends 4 s after the batch was asked for
        after(6)
        yield 1
        after(7)  # the second step takes longer than that
        yield 2

    stream = kept.batches(batches())
    next(stream)
    kept.dispatched(1, now())
    next(stream)
    kept.dispatched(2, now())
    next(stream)
    after(8)
    assert kept.seconds() == {
        "startup": 5.0,
        "compile": 0.0,
        "input": 3.0 + 6.0,
        "step": 4.0 + 7.0 + 8.0,
        "evaluation": 2.0,
        "checkpoint": 2.0,
    }
    row = kept.lap(2)
    assert row["step_s"] == 14.0 and row["images_per_s"] == 4 / 14 and row["input_wait_s"] == 4.5
    assert all(name.endswith(("_s", "_per_s")) for name in row)


def test_a_job_that_was_refused_is_not_part_of_the_record(tmp_path):
    """Catches a workdir that a mistake in the command left behind, or counted as a restart."""
    workdir = str(tmp_path / "run")
    with pytest.raises(UserError), times.record(workdir, 0, 4) as kept:
        kept.write()
        raise UserError("no")
    assert goodput.read(workdir) == []
    with times.record(workdir, 0, 4):
        pass
    with pytest.raises(UserError), times.record(workdir, 0, 4):
        raise UserError("no")
    (line,) = goodput.read(workdir)
    assert line["end"] == "returned"


def test_utilisation_is_of_the_chips_peak_and_unknown_without_one():
    """Catches a peak that was made up for a CPU, and FLOPs of all devices over one peak."""
    peak = chips.CHIPS["v5e"].flops
    line = _line(0.0, 10, 20, step=4.0, input=1.0) | {"device": "TPU v5 lite", "flops": peak / 4}
    assert goodput.utilisation(line) == pytest.approx(0.25 * 10 / 5)
    assert goodput.utilisation(line | {"device": "cpu"}) is None
    assert goodput.utilisation(line | {"flops": None}) is None
    gpu = line | {"device": "NVIDIA H100 80GB HBM3", "flops": 989e12}
    assert goodput.utilisation(gpu) == pytest.approx(10 / 5)
    assert set(chips.KINDS.values()) == set(chips.CHIPS)


def _events(path):
    """[(seconds, event, step)], without a line cut by a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    fields = [line.split() for line in lines if line.endswith("\n")]
    return [(float(when), event, int(step)) for when, event, step in fields]


def _seconds_in_steps(events, until):
    """Seconds in the steps of one process up to its save of step `until`: from each batch to the
    next one asked for, without evaluations and saves."""
    ends = [i for i, (_, event, step) in enumerate(events) if event == "end" and step == until]
    total, since = 0.0, None
    for when, event, _ in events[: ends[-1] + 1 if ends else 0]:
        if since is not None and event in ("ask", "begin"):
            total += when - since
        since = when if event in ("got", "end") else None
    return total


@pytest.mark.slow
@pytest.mark.xdist_group("killed")
def test_the_goodput_of_a_run_killed_three_times_agrees_with_another_clock(tmp_path):
    """Catches time that a kill takes out of the record, or that is counted in the wrong place."""
    workdir, data = tmp_path / "run", killing.pictures(tmp_path / "images")
    argv = killing.arguments(
        workdir, data, steps=160, save_every=20, evaluate_every=80, log_every=40, resolution=64
    )
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")
    env = {**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": flags}
    script = str(pathlib.Path(killing.__file__).with_name("clocked.py"))
    runs = []
    for number, steps in enumerate((50, 40, 45, 1000)):
        events, began = tmp_path / f"events{number}", time.monotonic()
        command = [sys.executable, script, str(events), *argv]
        with open(tmp_path / "log", "ab") as log:
            child = subprocess.Popen(command, env=env, stderr=log)
        while child.poll() is None and sum(e[1] == "got" for e in _events(events)) < steps:
            time.sleep(0.02)
        if steps < 1000:
            child.send_signal(signal.SIGKILL)
        status = child.wait()
        assert status == (-signal.SIGKILL if steps < 1000 else 0), (tmp_path / "log").read_text()
        noted = _events(events)
        ended = time.monotonic() if status else next(e[0] for e in noted if e[1] == "returned")
        runs.append((began, ended, noted))
    lines = goodput.read(str(workdir))
    assert len(lines) == 4
    firsts = [line["first_step"] for line in lines]
    assert firsts[0] == 0 and all(firsts[1:])
    kept = sum(
        _seconds_in_steps(events, min([*firsts[number + 1 :], 160]))
        for number, (*_, events) in enumerate(runs)
    )
    total = sum(ended - began for began, ended, _ in runs)
    found = goodput.goodput(lines)
    print(f"goodput {found.fraction:.4f}, other clock {kept / total:.4f}")
    print(f"wall time {found.total_s:.2f} s, {total:.2f} s")
    print(f"steps {found.sections['step']:.2f} s, {kept:.2f} s")
    assert found.total_s == pytest.approx(total, rel=0.02)
    assert found.fraction == pytest.approx(kept / total, rel=0.02)
