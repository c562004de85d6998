# SPDX-License-Identifier: Apache-2.0
"""Records where a run's time goes: WORKDIR/times.jsonl, one line per process that trained there.

A process's wall time is split into sections; what is not another section is a step. The line is
kept up to date while the process runs: a kill leaves out at most 0.5 % of it, or a quarter second.
"""

import contextlib
import json
import logging
import os
import queue
import resource
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dcae_jax import files
from dcae_jax.config import Config
from dcae_jax.errors import UserError
from dcae_jax.jobs.goodput import FILE, SECTIONS, Line, goodput, machine, read, summary, utilisation
from dcae_jax.planner import cost
from dcae_jax.runtime import process

LEAST, MOST = 0.25, 60.0  # seconds between two writes
LEAST_PUT = 5.0  # the same in a bucket, which allows about one put per second of an object
MARKS = 1000  # checkpoints whose time is remembered


class Times:
    """The sections of this process, and its line in the file. Other threads may read it."""

    def __init__(self, workdir: str, first_step: int, batch_size: int, began: float):
        """began: when this process's time begins, by time.perf_counter."""
        self._path = os.path.join(workdir, FILE)
        self._before = read(workdir)
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = dict.fromkeys(SECTIONS, 0.0)
        self._section, self._since, self._began = "startup", began, began
        self._marks = {first_step: 0.0}  # step of a checkpoint -> seconds of steps before it
        self._line: Line = {
            "started": time.time() - (time.perf_counter() - began),
            "first_step": first_step,
            "last_step": first_step,
            "end": "",
        }
        self._batch_size = batch_size
        self._lap, self._loop = (first_step, 0.0, 0.0), [0.0]
        self._finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle_since = began  # since when the devices have nothing to do; inf while they do

    # --- while the run goes on --------------------------------------------------------------------

    def enter(self, section: str) -> str:
        """Time counts as `section` from now on; returns the section before."""
        with self._lock:
            now, before = time.perf_counter(), self._section
            self._seconds[before] += now - self._since
            self._section, self._since = section, now
            return before

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time within counts as the section `name`."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches. From the first on, time counts as steps; what the devices idle while one is
        awaited counts as input."""
        stream = iter(batches)
        self.enter("step")
        while True:
            asked = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                return
            self.enter("step")
            with self._lock:
                idle = max(0.0, time.perf_counter() - max(asked, self._idle_since))
                self._seconds["step"] -= idle
                self._seconds["input"] += idle
            yield batch

    def dispatched(self, step: int, output: jax.Array) -> None:
        """A step is queued on the devices, and has finished when its `output` is there."""
        seconds = self.seconds()
        with self._lock:
            self._line["last_step"] = step
            self._idle_since = float("inf")
        self._loop.append(seconds["step"] + seconds["input"])
        self._finished.put((step, output))

    def lap(self, step: int) -> dict[str, float]:
        """Means over the steps since the last lap, up to `step`, and their deviation."""
        seconds = self.seconds()
        before, began, waited = self._lap
        loop, count = seconds["step"] + seconds["input"], step - before
        each = np.diff(self._loop)
        self._lap, self._loop = (step, loop, seconds["input"]), self._loop[-1:]
        mean = (loop - began) / count
        row = {
            "step_s": mean,
            "images_per_s": self._batch_size / mean,
            "step_deviation_s": float(each.std()) if len(each) else 0.0,
            "input_wait_s": (seconds["input"] - waited) / count,
        }
        flops = self._line.get("flops")
        return row | ({"model_flops_per_s": flops / mean} if flops else {})

    def gauges(self) -> dict[str, float]:
        """Figures that depend on the process, for TensorBoard and other trackers."""
        lines = self.lines()
        found = {"goodput": goodput(lines).fraction}
        used, peak = utilisation(lines[-1]), lines[-1]["peak_bytes"]
        found |= {} if used is None else {"flops_utilisation": used}
        return found | ({"peak_memory_gb": peak / 1e9} if peak else {})

    def saved(self, step: int) -> None:
        """A run resumed at `step` has lost nothing before this moment."""
        seconds = self.seconds()["step"]
        with self._lock:
            self._marks[step] = seconds
            self._marks = dict(list(self._marks.items())[-MARKS:])

    @contextlib.contextmanager
    def closing(self, manager: Any) -> Iterator[None]:
        """Closes the checkpoint manager at the end, which waits for its last save."""
        try:
            yield
        finally:
            self.enter("checkpoint")
            manager.close()

    def facts(self, **values: Any) -> None:
        """More about this process, for its line."""
        with self._lock:
            self._line |= values

    def seconds(self) -> dict[str, float]:
        """Seconds per section so far."""
        with self._lock:
            now = self._seconds | {}
            now[self._section] += time.perf_counter() - self._since
            return now

    # --- the file ---------------------------------------------------------------------------------

    def line(self) -> Line:
        seconds = self.seconds()
        with self._lock:
            return {
                **self._line,
                **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
                "marks": {str(step): round(value, 3) for step, value in self._marks.items()},
                "peak_bytes": _peak_bytes(),
                "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }

    def lines(self) -> list[Line]:
        """Of all processes, this one's last."""
        return [*self._before, self.line()]

    def write(self) -> None:
        _write(self._path, self.lines())

    def forget(self) -> None:
        """Takes this process out of the file: it was refused before it did anything."""
        if self._before:
            _write(self._path, self._before)
        else:
            files.remove(self._path)

    def watch(self) -> None:
        """Notes when the devices have finished each step, until None is queued."""
        while (item := self._finished.get()) is not None:
            step, output = item
            with contextlib.suppress(Exception):  # a failed step raises in the training loop
                jax.block_until_ready(output)
            with self._lock:
                if step == self._line["last_step"]:
                    self._idle_since = time.perf_counter()

    def keep_writing(self, ended: threading.Event) -> None:
        """Writes the line whenever it has grown by 0.5 %."""
        wait = least = LEAST_PUT if files.is_url(self._path) else LEAST
        while not ended.wait(wait):
            try:
                self.write()
            except OSError as error:  # the job reports a disk that stays full
                logging.debug("%s: %s", self._path, error)
            wait = min(max(least, (time.perf_counter() - self._began) / 200), MOST)

    def stop_watching(self) -> None:
        self._finished.put(None)


@contextlib.contextmanager
def record(workdir: str, first_step: int, batch_size: int) -> Iterator[Times]:
    """Records where the time of this process goes, on process 0, and logs it at the end.

    first_step: the step that it resumes at. Its time before this call counts as start-up.
    """
    times = Times(workdir, first_step, batch_size, process.take_start())
    threads = [threading.Thread(target=times.watch, daemon=True)]
    ended = threading.Event()
    main = jax.process_index() == 0
    if main:
        threads.append(threading.Thread(target=times.keep_writing, args=(ended,), daemon=True))
    for thread in threads:
        thread.start()
    refused = False
    try:
        yield times
        times.facts(end="returned")
    except BaseException as error:
        refused = isinstance(error, UserError) and not times.seconds()["step"]
        times.facts(end=type(error).__name__)
        raise
    finally:
        ended.set()
        times.stop_watching()
        for thread in threads:
            thread.join(timeout=10)
        if main:
            with contextlib.suppress(OSError):  # the error that ended the run counts
                times.forget() if refused else times.write()
        if main and not refused:
            lines = times.lines()
            logging.info("%s: %s; %s", workdir, summary(lines), machine(lines[-1]))


def _write(path: str, lines: Sequence[Line]) -> None:
    """Replaces the file. It is not flushed to disk: a kill leaves it whole, and after a crash of
    the machine a new record may begin."""
    with files.atomic(path, flush=False) as beside, open(beside, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def _peak_bytes() -> int:
    """The largest peak memory of this process's devices; 0 if the platform does not know."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((stats.get("peak_bytes_in_use", 0) for stats in found), default=0)


def program(config: Config, compiled: Mapping[int, jax.stages.Compiled]) -> dict[str, Any]:
    """Facts about the train step: the kind of device, and FLOPs per device and step.

    XLA counts the FLOPs of a rematerialised step twice: then they are left out.
    """
    device = jax.local_devices()[0].device_kind
    if config.remat != "none":
        return {"device": device}
    counts = {size: (step.cost_analysis() or {}).get("flops") for size, step in compiled.items()}
    fractions = cost.size_fractions(config)
    known = {size: count * fractions[size] for size, count in counts.items() if count}
    if not known or len(known) < len(counts):
        return {"device": device}
    return {"device": device, "flops": sum(known.values())}
