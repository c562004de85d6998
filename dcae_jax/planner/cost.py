# SPDX-License-Identifier: Apache-2.0
"""What a job costs on a TPU slice: memory, FLOPs, collectives, time, chip-hours and energy.

Memory, FLOPs and collectives are the compiler's statistics of the program that would run
(compile.py). Time is an estimate from the chip's published peaks (chips.py).
"""

import collections
import math
import os
from collections.abc import Callable
from typing import Any

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.config import Config
from dcae_jax.config.schema import Plan
from dcae_jax.errors import UserError
from dcae_jax.planner import chips, compile
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import run as run_lib

Row = dict[str, Any]
MEAN = "mean"  # the size of the last row of a job that draws its resolution
MAX_COMPILES = 10  # per search for a batch


def plan(settings: Plan, job: Config, topology: str) -> list[Row]:
    """The rows of one topology: one per resolution, and their mean where there are several."""
    sizes = size_fractions(job)
    batch, known = job.batch_size, {}
    if settings.find_batch:
        batch, known = _find_batch(settings, job, topology)
    rows = []
    for number, size in enumerate(sorted(sizes), 1):
        facts = known.get((batch, size))
        if facts is None:
            part = f"program {number} of {len(sizes)}"
            facts = compile.compile_in_subprocess(settings, topology, size, batch, part)
        rows.append(priced(facts, calls(job, batch), settings.watts))
    return rows if len(rows) == 1 else [*rows, mean(rows, sizes, job.steps)]


def calls(job: Config, batch: int) -> int:
    """Number of times the job runs its program: steps, or batches of samples."""
    return math.ceil(job.sample.count / batch) if job.job == "sample" else job.steps


def size_fractions(job: Config) -> dict[int, float]:
    """{size per side, in pixels or (training a diffusion model) latents: fraction of steps}."""
    if job.job == "sample":
        return {job.resolution: 1.0}
    if job.objective:
        return dict.fromkeys(run_lib.batch_sizes(job), 1.0)
    drawn = config_lib.training_resolutions(job)
    return {size: count / len(drawn) for size, count in collections.Counter(drawn).items()}


# --- what it costs --------------------------------------------------------------------------------


def priced(facts: Row, steps: int, watts: float) -> Row:
    """The facts, and what follows from the chip's published figures.

    fits: peak_bytes leaves chips.RESERVE free. step_s_roofline: the larger of FLOPs over the peak
    and bytes over the bandwidth, without communication; None if the program did not compile, or
    the chip's peaks are not known (cpu). XLA's bytes include what a run may keep in the chip's
    vector memory, so where 'bound' is 'memory' a run may be faster than this.
    """
    chip = chips.topology(facts["topology"]).chip
    row = facts | {
        "steps": steps,
        "hbm_bytes": chip.hbm if chip else host_memory() / facts["chips"],
        "fits": fits(facts),
        "watts": watts or (chip.watts if chip else None),
        "step_s_roofline": None,
        "bound": None,
    }
    if chip and facts["bytes_accessed"] is not None:
        compute = facts["flops"] / chip.flops
        memory = facts["bytes_accessed"] / chip.bandwidth
        row["step_s_roofline"] = max(compute, memory)
        row["bound"] = "compute" if compute > memory else "memory"
    return row | _totals(row)


def _totals(row: Row) -> Row:
    """Images per second, and chip-hours and kWh of all steps; None without a step's time."""
    step, count = row["step_s_roofline"], row["chips"]
    hours = None if step is None else step * row["steps"] * count / 3600
    watts = row["watts"]
    return {
        "images_per_s": None if step is None else row["batch_size"] / step,
        "chip_hours": hours,
        "kwh": None if hours is None or watts is None else hours * watts / 1000,
    }


def limit(topology: str, count: int) -> float:
    """Bytes per chip that a program may take."""
    chip = chips.topology(topology).chip
    return (chip.hbm if chip else host_memory() / count) - chips.RESERVE


def fits(facts: Row) -> bool:
    """Whether the program fits; one that XLA refused does not, whatever XLA says it needs."""
    if facts["compile_s"] is None or facts["peak_bytes"] is None:
        return False
    return facts["peak_bytes"] <= limit(facts["topology"], facts["chips"])


def host_memory() -> float:
    """Bytes of this host's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def mean(rows: list[Row], sizes: dict[int, float], steps: int) -> Row:
    """The row of a job that draws its size: the mean time and work, the largest memory."""
    largest = max(rows, key=lambda row: row["peak_bytes"] or math.inf)

    def average(key: str) -> float | None:
        if any(row[key] is None for row in rows):
            return None
        return sum(sizes[row["size"]] * row[key] for row in rows)

    row = largest | {"size": MEAN, "steps": steps, "fits": all(row["fits"] for row in rows)}
    row |= {key: average(key) for key in ("flops", "bytes_accessed", "step_s_roofline")}
    row |= {"compile_s": None, "compile_cpu_s": None, "bound": None, "collectives": None}
    if all(r["compile_s"] is not None for r in rows):
        row["compile_s"] = sum(r["compile_s"] for r in rows)
        row["compile_cpu_s"] = sum(r["compile_cpu_s"] for r in rows)
    return row | _totals(row)


# --- the largest batch ----------------------------------------------------------------------------


def _find_batch(
    settings: Plan, job: Config, topology: str
) -> tuple[int, dict[tuple[int, int], Row]]:
    """(the largest global batch that fits, {(batch, size): facts} of every compile)."""
    size = max(size_fractions(job))  # which takes the most memory
    facts: dict[tuple[int, int], Row] = {}

    def compile_with(batch: int) -> tuple[bool, float]:
        part = f"search for a batch, try {len(facts) + 1} of at most {MAX_COMPILES}"
        found = compile.compile_in_subprocess(settings, topology, size, batch, part)
        facts[batch, size] = found
        return fits(found), found["peak_bytes"] or math.inf

    count = chips.count(topology)
    mesh = mesh_lib.mesh_shape(job.mesh, count)
    unit = math.prod(mesh[axis] for axis in mesh_lib.BATCH_AXES) * job.accumulate
    best = largest_batch(compile_with, unit, job.batch_size, limit(topology, count))
    if not best:
        raise UserError(
            f"topology {topology!r}: not even batch_size={unit} fits; use more chips with "
            "mesh.fsdp, or remat='blocks'"
        )
    return best, facts


def largest_batch(
    try_batch: Callable[[int], tuple[bool, float]], unit: int, start: int, limit: float
) -> int:
    """The largest multiple of `unit` that fits, found in at most MAX_COMPILES tries; 0: none.

    try_batch(batch) -> (whether it fits, bytes needed, infinite if unknown). Doubles from `start`
    until it does not fit (or halves until it does), then narrows down. Memory is nearly linear in
    the batch, so the third try is where the line through two tries meets the limit; every second
    try bisects instead, in case it is not linear.
    """
    good, bad = 0, None  # in units
    needs: dict[int, float] = {}
    guess = max(1, round(start / unit))
    for number in range(MAX_COMPILES):
        ok, needs[guess] = try_batch(guess * unit)
        before, good, bad = (good, guess, bad) if ok else (good, good, guess)
        if bad is None:
            line = needs[good] - needs.get(before, math.inf)
            guess = 2 * good
            if 0 < line < math.inf:
                guess = good + int((limit - needs[good]) / line * (good - before))
                guess = min(max(guess, good + 1), 16 * good)
        elif bad - good == 1:
            break
        elif good == 0:
            guess = max(1, bad // 2)
        else:
            guess = (good + bad) // 2
            line = needs[bad] - needs[good]
            if number % 2 == 0 and 0 < line < math.inf:
                guess = good + int((limit - needs[good]) / line * (bad - good))
            guess = min(max(guess, good + 1), bad - 1)
    return good * unit


# --- the table ------------------------------------------------------------------------------------

HEAD = (
    "topology",
    "chips",
    "batch",
    "size",
    "fits",
    "GB per chip",
    "state GB",
    "TFLOP per chip",
    "GB moved",
    "collective GB",
    "compile s",
    "step s",
    "images/s",
    "chip-hours",
    "kWh",
)


def table(rows: list[Row]) -> str:
    """The rows as text; GB are 1e9 bytes."""
    return files.table([HEAD, *(cells(row) for row in rows)])


def cells(row: Row) -> list[Any]:
    """A row's cells, in the order of HEAD; '-' where unknown."""
    collectives = row["collectives"]
    between = collectives and sum(kind["bytes"] for kind in collectives.values()) / 1e9
    found = [
        row["topology"],
        row["chips"],
        row["batch_size"],
        row["size"],
        "yes" if row["fits"] else "no",
        _scaled(row["peak_bytes"], 1e9),
        _scaled(row["arguments_bytes"], 1e9),
        _scaled(row["flops"], 1e12),
        _scaled(row["bytes_accessed"], 1e9),
        0.0 if collectives == {} else between,
        row.get("compile_cpu_s") or row["compile_s"],
        row["step_s_roofline"],
        row["images_per_s"],
        row["chip_hours"],
        row["kwh"],
    ]
    return ["-" if cell is None else cell for cell in found]


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
