# SPDX-License-Identifier: Apache-2.0
"""Goodput: the fraction of a run's wall time, over all its restarts, that was spent in steps.

Computed from WORKDIR/times.jsonl, which times.py writes: one line per process that trained there.
Steps after the checkpoint that a later process resumed from are lost.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dcae_jax import files
from dcae_jax.planner import chips

FILE = "times.jsonl"
# In the order of a run: imports, building, tracing and restoring; compiling the step; waiting for
# data while the devices are idle; training; evaluating; waiting for a checkpoint.
SECTIONS = ("startup", "compile", "input", "step", "evaluation", "checkpoint")
NAMES = {"startup": "start-up", "input": "input wait", "checkpoint": "checkpoints"}

Line = dict[str, Any]


def read(workdir: str) -> list[Line]:
    """The lines of the processes that trained in `workdir`; [] if there are none."""
    data = files.read_file(os.path.join(workdir, FILE)) or b""
    with contextlib.suppress(ValueError):
        return [json.loads(line) for line in data.splitlines()]
    return []  # damaged


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds of a workdir's processes, all restarts together."""

    total_s: float
    sections: Mapping[str, float]  # 'step' without the lost ones
    lost_s: float  # steps that a later process did again
    stopped_s: float  # between the processes; not part of the total
    restarts: int

    @property
    def fraction(self) -> float:
        """Of the total, the part that was spent in steps that counted."""
        return self.sections["step"] / self.total_s if self.total_s else 0.0

    @property
    def input_share(self) -> float:
        """Of the time of the training loop itself, the part spent waiting for data."""
        loop = self.sections["step"] + self.lost_s + self.sections["input"]
        return self.sections["input"] / loop if loop else 0.0

    @property
    def overhead(self) -> float:
        """Wall time per second of training, once a process has started."""
        steps = self.sections["step"] + self.lost_s
        going = steps + sum(self.sections[name] for name in ("input", "evaluation", "checkpoint"))
        return going / steps if steps else 1.0


def goodput(lines: Sequence[Line]) -> Goodput:
    """The sums over `lines`, in the order in which the processes ran."""
    sections = {name: float(sum(line[f"{name}_s"] for line in lines)) for name in SECTIONS}
    lost = stopped = 0.0
    for number, line in enumerate(lines[:-1]):
        stopped += max(0.0, lines[number + 1]["started"] - line["started"] - total(line))
        resumed = min(later["first_step"] for later in lines[number + 1 :])
        if resumed < line["last_step"]:
            marks = ((int(step), seconds) for step, seconds in line["marks"].items())
            kept = max((seconds for step, seconds in marks if step <= resumed), default=0.0)
            lost += line["step_s"] - kept
    sections["step"] -= lost
    return Goodput(sum(map(total, lines)), sections, lost, stopped, max(0, len(lines) - 1))


def total(line: Line) -> float:
    """Seconds of one process."""
    return sum(line[f"{name}_s"] for name in SECTIONS)


def utilisation(line: Line) -> float | None:
    """Model-FLOPs utilisation of a process: FLOPs of its steps over the devices' peak.

    None where the chip table has no such device, or the FLOPs are not known.
    """
    peak = chips.peak_flops(line.get("device", ""))
    steps = line["last_step"] - line["first_step"]
    if not peak or not line.get("flops") or not line["step_s"] or not steps:
        return None
    return line["flops"] * steps / (line["step_s"] + line["input_s"]) / peak


def summary(lines: Sequence[Line]) -> str:
    """'81.2 % of 3 h 20 min in steps; start-up 4.1 %, ...'."""
    found = goodput(lines)
    parts = {NAMES.get(name, name): found.sections[name] for name in SECTIONS if name != "step"}
    parts["lost to kills"] = found.lost_s
    shares = [f"{name} {100 * s / found.total_s:.1f} %" for name, s in parts.items() if s]
    text = f"{100 * found.fraction:.1f} % of {duration(found.total_s)} in steps"
    return "; ".join([text, ", ".join(shares)])


def machine(line: Line) -> str:
    """Utilisation and peak memory of a process, as far as they are known."""
    said = []
    if (used := utilisation(line)) is not None:
        said.append(f"{100 * used:.1f} % of the bfloat16 peak of {line['device']}")
    if line["peak_bytes"]:
        said.append(f"peak device memory {line['peak_bytes'] / 1e9:.2f} GB")
    return ", ".join([*said, f"peak host memory {line['peak_host_bytes'] / 1e9:.2f} GB"])


def duration(seconds: float) -> str:
    """'2 d 3 h', '3 h 20 min', '5 min 10 s', '12 s'."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
