# SPDX-License-Identifier: Apache-2.0
"""The command `python -m dcae_jax.checkpoints`."""

import os

import pytest

from dcae_jax.checkpoints import __main__, integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.runtime import lease, process


@pytest.fixture
def runs(tmp_path):
    """Two runs, with the checkpoints 1 and 2, and 3, and a copy's target that is not there."""
    for name, steps in (("one", (1, 2)), ("other", (3,))):
        for step in steps:
            folder = tmp_path / name / "checkpoints" / str(step)
            folder.mkdir(parents=True)
            (folder / "weights").write_text(f"{name} {step}")
            integrity.write(str(folder))
        (tmp_path / name / "config.json").write_text(f'{{"config": "{name}"}}\n')
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": {steps[0]}}}\n')
    return tmp_path / "one", tmp_path / "other", tmp_path / "there"


def _contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _copy(source, target, capsys):
    """(status, what it said)."""
    status = __main__.main(["copy", str(source), str(target)])
    return status, capsys.readouterr().err


def test_a_copy_over_another_run_is_refused(runs, capsys):
    """Catches the other run's config.json and metrics.jsonl lost, its checkpoints mixed in."""
    one, other, there = runs
    before = _contents(other)
    status, said = _copy(one, other, capsys)
    assert status == 2 and len(said.splitlines()) == 1
    assert "holds another run (config.json differs); give a new or empty folder" in said
    assert _contents(other) == before
    # The same run, which went on in the copy.
    assert _copy(one, there, capsys)[0] == 0
    with open(there / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    before = _contents(there)
    status, said = _copy(one, there, capsys)
    assert status == 2 and "(metrics.jsonl differs)" in said and _contents(there) == before


@pytest.mark.parametrize("name", ["model.json", "latents.json", "checkpoints", "metrics.jsonl"])
def test_a_copy_into_anything_else_is_refused(name, runs, tmp_path, capsys):
    """Catches an export or latents that become a run too, and links that are written through."""
    one, other, there = runs
    there.mkdir()
    if (other / name).exists():
        (there / name).symlink_to(other / name)
    else:
        (there / name).write_text("{}")
    before = _contents(other)
    status, said = _copy(one, there, capsys)
    assert status == 2 and len(said.splitlines()) == 1 and name in said
    assert os.listdir(there) == [name] and _contents(other) == before


def test_a_copy_waits_for_no_owner_of_its_target(runs, capsys):
    """Catches checkpoints added under a job that runs there."""
    one, _, there = runs
    with lease.hold(str(there)):
        status, said = _copy(one, there, capsys)
    assert status == 2 and "is in use by process" in said and len(said.splitlines()) == 1
    assert not there.exists()


def test_an_interrupted_copy_is_completed_by_the_same_command(runs, monkeypatch, capsys):
    """Catches a half that stops the next attempt, and a checkpoint without its config.json."""
    one, _, there = runs
    copy = integrity.copy

    def killed(source, target):
        if target.endswith("2"):
            half = there / "checkpoints" / "2.77.tmp"
            half.mkdir()
            (half / "weights").write_text("on")
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(integrity, "copy", killed)
    assert _copy(one, there, capsys)[0] == process.INTERRUPTED
    assert checkpoints.saved_steps(str(there)) == [1] and (there / "config.json").exists()
    monkeypatch.setattr(integrity, "copy", copy)
    with open(one / "metrics.jsonl", "a") as file:  # its run goes on
        file.write('{"step": 2}\n')
    assert _copy(one, there, capsys)[0] == 0
    assert _contents(there) == _contents(one)
    assert _copy(one, there, capsys)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/2/extra"])
def test_a_copy_takes_nothing_from_elsewhere(name, runs, tmp_path, capsys):
    """Catches a link in a downloaded run, by which a private file gets into the copy."""
    one, _, there = runs
    (tmp_path / "private").write_text("{}")
    (one / name).unlink(missing_ok=True)
    (one / name).symlink_to(tmp_path / "private")
    status, said = _copy(one, there, capsys)
    if name.endswith("extra"):
        assert status == 0 and f"not copied: {one / 'checkpoints' / '2'} is damaged" in said
        assert "extra is a link" in said and os.listdir(there / "checkpoints") == ["1"]
    else:
        assert status == 2 and "is a link out of its folder" in said and not there.exists()


def test_a_chains_phases_are_named(runs, tmp_path, capsys):
    """Catches a chain's workdir that is called empty, without the workdirs to name in its place."""
    one, _, there = runs
    one.rename(tmp_path / "phase1")
    for command in (["check"], ["copy", str(there)]):
        assert __main__.main([command[0], str(tmp_path), *command[1:]]) == 2
        assert f": {tmp_path / 'phase1'}\n" in capsys.readouterr().err


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    """Catches a mistyped path reported as undamaged, and a traceback for an impossible target."""
    assert __main__.main(["check", str(tmp_path / "none")]) == 2
    assert "has no finished checkpoint" in capsys.readouterr().err
    done = tmp_path / "run" / "checkpoints" / "3"
    done.mkdir(parents=True)
    (done / "_CHECKPOINT_METADATA").write_text("{}")
    assert checkpoints.saved_steps(str(tmp_path / "run")) == [3]
    (tmp_path / "file").write_text("")
    assert __main__.main(["copy", str(tmp_path / "run"), str(tmp_path / "file" / "x")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not copied (") and len(said.splitlines()) == 1
