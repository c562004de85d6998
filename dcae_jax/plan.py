# SPDX-License-Identifier: Apache-2.0
"""The job `plan`: what a job costs on chips that need not be here.

Compiles the very step that train.py runs, or what the job `sample` runs for a batch, for a
compile-only TPU client or for this host's own processor. A TPU program's memory, FLOPs and
collectives are then those of the real run; its time is an estimate from the chip's published peaks.

Each compile runs in a process of its own, `python -m dcae_jax.plan REQUEST`, since a process holds
libtpu's lock for life, and a compile that takes too much memory kills its process alone.
"""

import collections
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from dcae_jax import api, chips, hlo, matching, preflight, report, sampling, sharding, steps
from dcae_jax import config as config_lib
from dcae_jax import state as state_lib
from dcae_jax.config import UserError
from dcae_jax.models import dcae, lpips, sdvae

Row = dict[str, Any]

PLAN = "plan.json"
MEAN = "mean"  # the row of a job that draws its resolution, after one row for each
MAX_COMPILES = 10  # of one search for a batch
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# As XLA says it, of the whole program: 'Ran out of memory in memory space hbm. Used 32.58G of
# 15.75G hbm.', or before it has laid the program out: 'Ran out of memory on HBM, the total memory
# required for HLO temporaries (29.15G) exceeds available HBM (15.75G).'
_OUT_OF_MEMORY = re.compile(r"ran out of memory", re.IGNORECASE)
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def run(config: Any, workdir: str) -> int:
    """The job `plan`: prints a table and writes WORKDIR/plan.json. Returns 0."""
    config_lib.check(config)
    job = target(config.plan)
    for text in config.plan.topologies:
        chips.check_compiler(text)
    rows: list[Row] = []
    for text in config.plan.topologies:
        rows += plan(config.plan, job, text)
        report.write_json(os.path.join(workdir, PLAN), rows)
    logging.info("%s", table(rows))
    logging.info("step s is an estimate: the larger of FLOPs and bytes over the chip's peaks")
    return 0


def target(plan_config: Any) -> Any:
    """The configuration of the job to plan, as its own command line would make it."""
    if not plan_config.config:
        raise UserError("plan.config is empty; name the file of a job, as in configs/phase1.py")
    return overridden(plan_config.config, plan_config.overrides, plan_config.generator)


def overridden(file: str, overrides: tuple[str, ...], generator: str = "") -> Any:
    """The configuration of `--config=file --config.KEY=VALUE ...`. Raises UserError.

    generator: of a job sample, the file of the job that trains its model; see `_sampling`.
    """
    config, job = _read("plan.config", file, overrides)
    if job == "sample":
        return _sampling(config, generator, overrides)
    if job != "train":
        raise UserError(f"plan.config={file!r} is of the job {job}, which has nothing to plan")
    if generator:
        raise UserError(
            f"plan.generator={generator!r} is for a job sample, and plan.config={file!r} is of "
            "training; leave one out"
        )
    if config.objective:
        # Shapes of the latents: of those on the disk, or of those that a VARIANT would make.
        on_disk = bool(config.data.path)
        config = preflight.on_latents(config)[0] if on_disk else matching.complete(config, None)
    return config


def _sampling(config: Any, file: str, overrides: tuple[str, ...]) -> Any:
    """The configuration of training from `file`, with what a job sample, `config`, sets itself.

    batch_size and steps become those of the sampling, in images and in batches.
    """
    if not file:
        raise UserError(
            "plan.generator is empty; name the file of the job that trains the model, as in "
            "configs/uvit.py:h"
        )
    model, job = _read("plan.generator", file, overrides)
    if job != "train" or not model.objective:
        raise UserError(
            f"plan.generator={file!r} trains no diffusion model; name a file that does, as "
            "configs/uvit.py:h"
        )
    known = (*dcae.VARIANTS, *dcae.PUBLISHED, *sdvae.VARIANTS)
    if model.autoencoder not in known:
        raise UserError(
            f"autoencoder={model.autoencoder!r} is no VARIANT, as a planned job sample needs; put "
            "'autoencoder=f64c128' or another into plan.overrides"
        )
    model = matching.complete(model, None)
    s = config.sample
    if (s.sampler or sampling.SAMPLERS[model.objective][0]) == "dopri5":
        raise UserError(
            f"sample.sampler={s.sampler!r}: dopri5 decides as it runs how often it evaluates the "
            "network; plan with 'sample.sampler=heun' and as many 'sample.steps' as you expect"
        )
    for key in ("job", "dtype", "mesh", "sample"):
        model[key] = config[key]
    model.batch_size, model.accumulate = s.batch_size, 1
    return model


def _read(key: str, file: str, overrides: tuple[str, ...]) -> tuple[Any, str]:
    """(configuration, its job) of a file that the user named as `key`. Raises UserError."""
    values = flags.FlagValues()
    argv = ["plan", f"--config={file}", *(f"--config.{override}" for override in overrides)]
    flag = config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    try:
        values(argv)
        return flag.value, flag.value.job
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{key}={file!r}: {config_lib.explain(error, argv)}") from error


def plan(plan_config: Any, job: Any, text: str) -> list[Row]:
    """The rows of one topology: one a resolution, and their mean where there are several."""
    sizes = shares(job)
    batch, known = job.batch_size, {}
    if plan_config.find_batch:
        batch, known = _find_batch(plan_config, job, text)
    rows = []
    for size in sorted(sizes):
        facts = known.get((batch, size)) or compiled(plan_config, text, size, batch)
        rows.append(priced(facts, calls(job, batch), plan_config.watts))
    return rows if len(rows) == 1 else [*rows, mean(rows, sizes, job.steps)]


def calls(job: Any, batch: int) -> int:
    """How often the job runs its program: steps, or batches of samples."""
    return math.ceil(job.sample.count / batch) if job.job == "sample" else job.steps


def shares(job: Any) -> dict[int, float]:
    """{size a side, in pixels or, of a diffusion model's training, latents: its share of steps}."""
    if job.job == "sample":
        return {job.resolution: 1.0}
    if job.objective:
        return dict.fromkeys(preflight.batch_sizes(job), 1.0)
    drawn = config_lib.training_resolutions(job)
    return {size: count / len(drawn) for size, count in collections.Counter(drawn).items()}


# --- one program, in a process of its own ---------------------------------------------------------


def compiled(plan_config: Any, text: str, size: int, batch: int) -> Row:
    """What the compiler says of the step at `size` on topology `text`; see `measure`."""
    key = "sample.batch_size" if plan_config.generator else "batch_size"
    request = {
        "config": plan_config.config,
        "generator": plan_config.generator,
        "overrides": [*plan_config.overrides, f"{key}={batch}"],
        "topology": text,
        "size": size,
        "effort": plan_config.effort,
    }
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax.plan", json.dumps(request)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    answer = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not answer[0].startswith("{"):
        why = "killed, most likely for memory" if done.returncode < 0 else done.stderr[-2000:]
        raise RuntimeError(f"the compile of {request} failed: {why}")
    facts = json.loads(answer[0])
    if "error" in facts:
        raise UserError(facts["error"])
    logging.info("%s at %d: %.0f s", text, size, time.perf_counter() - began)
    return facts


def answer(request: Row) -> Row:
    """In the process of its own: the facts, or {error} for a user's mistake."""
    # The time to compile is one of the facts.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_exec_time_optimization_effort", request["effort"])
    try:
        config = overridden(request["config"], tuple(request["overrides"]), request["generator"])
        return measure(config, request["topology"], request["size"])
    except UserError as error:
        return {"error": str(error)}


def measure(config: Any, text: str, size: int) -> Row:
    """Compiles the step of `config` at `size`, or its sampling of a batch, for topology `text`.

    Bytes and FLOPs are a chip's (FLOPs: of the whole step, shared out evenly); peak_bytes is
    arguments + output + temporaries - aliased. Where XLA finds that the program does not fit,
    peak_bytes is what it says it needs, and what only a compiled program has is None.
    """
    mesh = sharding.make_mesh(config.mesh, chips.devices(text))
    if config.job == "sample":
        config_lib.check(config)
        sharding.check_batch(config.batch_size, mesh, key="sample.batch_size")
    else:
        preflight.check(config, mesh)
    batch = config.batch_size
    facts = {
        "topology": text,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": batch,
        "batch_per_chip": batch / mesh.size,
        "size": size,
        "flops": flops(config, mesh, size) / mesh.size,
    }
    step, arguments = step_and_arguments(config, mesh, size)
    lowered = step.lower(*arguments)
    began, worked = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return facts | _NOT_COMPILED | {"peak_bytes": needed_bytes(error, bytes_of(arguments))}
    facts["compile_s"] = time.perf_counter() - began
    facts["compile_cpu_s"] = time.process_time() - worked  # alike on a busy host
    memory, said = program.memory_analysis(), program.as_text()
    facts |= {
        "arguments_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "bytes_accessed": program.cost_analysis()["bytes accessed"] + hlo.repeated_bytes(said),
        "collectives": hlo.collective_bytes(said),
    }
    facts["peak_bytes"] = (
        facts["arguments_bytes"]
        + facts["output_bytes"]
        + facts["temp_bytes"]
        - facts["alias_bytes"]
    )
    return facts


_NOT_COMPILED = dict.fromkeys(
    (
        "arguments_bytes",
        "output_bytes",
        "temp_bytes",
        "alias_bytes",
        "bytes_accessed",
        "collectives",
        "compile_s",
        "compile_cpu_s",
    )
)


def needed_bytes(error: BaseException, arguments: float) -> float | None:
    """What an out-of-memory error of the compiler says that a program needs; None if it does not.

    arguments: bytes of the program's arguments, which some of the messages leave out. Any other
    error is raised again.
    """
    said = str(error)
    if not _OUT_OF_MEMORY.search(said):
        raise error
    if used := _USED.search(said):
        return float(used[1]) * _UNITS[used[2]]
    if used := _TEMPORARIES.search(said):
        return float(used[1]) * _UNITS[used[2]] + arguments
    return None


def bytes_of(arguments: Any) -> int:
    """Bytes that abstract arguments take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arguments)
    )


def step_and_arguments(config: Any, mesh: Mesh, size: int) -> tuple[Any, tuple]:
    """train.py's step, jitted, and its abstract arguments, laid out on `mesh`; or a sampler's."""
    if config.job == "sample":
        s = config.sample
        return api.abstract_generator(config, mesh).program(
            config.batch_size, s.guidance, s.steps, s.sampler, s.guidance_interval
        )
    blueprint = state_lib.blueprint(config, mesh)
    state = state_lib.abstract_state(config, mesh, blueprint)
    batch = preflight.abstract_batch(config, size, mesh)
    step = steps.jit_step(config, blueprint, state)
    return step, (state, batch, abstract_judges(config, mesh))


def flops(config: Any, mesh: Mesh, size: int) -> float:
    """FLOPs of a step over all chips, as XLA counts them.

    XLA counts the body of a loop once, so a step's loops are laid out in a row here, and the rounds
    of a sampler's are added. The program is that of the mesh's platform, and lowered only; the
    counting is this host's.
    """
    config = config.copy_and_resolve_references()
    config.unroll = True
    config.dtype = sharding.compute_dtype(config, mesh)
    config.model.depthwise = dcae.depthwise_form(config.model, sharding.platform(mesh))
    config.mesh = config_lib.default().mesh
    here = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    step, arguments = step_and_arguments(config, here, size)
    traced, platform = step.trace(*arguments), sharding.platform(mesh)
    once = _counted(traced, platform)
    return once + repeated_flops(traced.jaxpr, platform) if config.job == "sample" else once


def _counted(traced: Any, platform: str) -> float:
    """XLA's count of FLOPs of a traced function, as it is for devices of `platform`."""
    name = "cuda" if platform == "gpu" else platform
    return traced.lower(lowering_platforms=(name,)).cost_analysis()["flops"]


def repeated_flops(jaxpr: Any, platform: str) -> float:
    """FLOPs of the loops in a traced program, in their rounds after the first."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name != "scan":
            inner = jax.extend.core.jaxprs_in_params(equation.params)
            total += sum(repeated_flops(part, platform) for part in inner)
            continue
        body, rounds = equation.params["jaxpr"], equation.params["length"]
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in body.in_avals]
        traced = jax.jit(jax.extend.core.jaxpr_as_fun(body)).trace(*shapes)
        total += (rounds - 1) * _counted(traced, platform)
        total += rounds * repeated_flops(body, platform)
    return total


def abstract_judges(config: Any, mesh: Mesh) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of what `preflight.load_judges` loads."""
    if not config.loss.lpips_weight or config.objective:
        return {}
    place = sharding.replicated(mesh)
    return {
        "lpips": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
            for name, shape in lpips.shapes("vgg").items()
        }
    }


# --- what it costs --------------------------------------------------------------------------------


def priced(facts: Row, steps_: int, watts: float) -> Row:
    """The facts with what follows from the chip's published figures.

    fits: peak_bytes leave chips.RESERVE free. step_s_roofline: the larger of FLOPs over the peak
    and bytes over the bandwidth, which no run beats and few come near; None where the program did
    not compile, or the chip's peaks are not known (cpu).
    """
    chip = chips.topology(facts["topology"]).chip
    row = facts | {
        "steps": steps_,
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
    """Images a second, and chip-hours and kWh of all steps; None without a step's time."""
    step, count = row["step_s_roofline"], row["chips"]
    hours = None if step is None else step * row["steps"] * count / 3600
    watts = row["watts"]
    return {
        "images_per_s": None if step is None else row["batch_size"] / step,
        "chip_hours": hours,
        "kwh": None if hours is None or watts is None else hours * watts / 1000,
    }


def limit(text: str, count: int) -> float:
    """Bytes of a chip that a program may take."""
    chip = chips.topology(text).chip
    return (chip.hbm if chip else host_memory() / count) - chips.RESERVE


def fits(facts: Row) -> bool:
    """A program that XLA refused does not fit, whatever it says it needs."""
    if facts["compile_s"] is None or facts["peak_bytes"] is None:
        return False
    return facts["peak_bytes"] <= limit(facts["topology"], facts["chips"])


def host_memory() -> float:
    """Bytes of this host's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def mean(rows: list[Row], sizes: dict[int, float], steps_: int) -> Row:
    """The row of a job that draws its size: the mean time and work, the largest memory."""
    largest = max(rows, key=lambda row: row["peak_bytes"] or math.inf)

    def average(key: str) -> float | None:
        if any(row[key] is None for row in rows):
            return None
        return sum(sizes[row["size"]] * row[key] for row in rows)

    row = largest | {"size": MEAN, "steps": steps_, "fits": all(row["fits"] for row in rows)}
    row |= {key: average(key) for key in ("flops", "bytes_accessed", "step_s_roofline")}
    row |= {"compile_s": None, "compile_cpu_s": None, "bound": None, "collectives": None}
    if all(r["compile_s"] is not None for r in rows):
        row["compile_s"] = sum(r["compile_s"] for r in rows)
        row["compile_cpu_s"] = sum(r["compile_cpu_s"] for r in rows)
    return row | _totals(row)


# --- the largest batch ----------------------------------------------------------------------------


def _find_batch(plan_config: Any, job: Any, text: str) -> tuple[int, dict[tuple[int, int], Row]]:
    """(the largest global batch that fits, {(batch, size): facts} of what was compiled for it)."""
    size = max(shares(job))  # which takes the most memory
    facts: dict[tuple[int, int], Row] = {}

    def compile_with(batch: int) -> tuple[bool, float]:
        facts[batch, size] = found = compiled(plan_config, text, size, batch)
        return fits(found), found["peak_bytes"] or math.inf

    count = chips.count(text)
    mesh = sharding.mesh_shape(job.mesh, count)
    unit = math.prod(mesh[axis] for axis in sharding.BATCH_AXES) * job.accumulate
    best = largest_batch(compile_with, unit, job.batch_size, limit(text, count))
    if not best:
        raise UserError(
            f"topology {text!r}: not even batch_size={unit} fits; use more chips with mesh.fsdp, "
            "or remat='blocks'"
        )
    return best, facts


def largest_batch(
    try_: Callable[[int], tuple[bool, float]], unit: int, start: int, limit: float
) -> int:
    """The largest multiple of `unit` that fits, found in at most MAX_COMPILES tries; 0: none.

    try_(batch) -> (whether it fits, bytes it needs, infinite where unknown). Doubles from `start`
    until it does not fit (or halves until it does), then narrows down. Memory grows nearly on a
    straight line with the batch, so two tries say where the third should be; every second try
    halves what is left, in case the line is wrong.
    """
    good, bad = 0, None  # in units
    needs: dict[int, float] = {}
    guess = max(1, round(start / unit))
    for number in range(MAX_COMPILES):
        ok, needs[guess] = try_(guess * unit)
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


# --- for people -----------------------------------------------------------------------------------

HEAD = (
    "topology",
    "chips",
    "batch",
    "a side",
    "fits",
    "GB a chip",
    "state GB",
    "TFLOP a chip",
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
    return report.table([HEAD, *(cells(row) for row in rows)])


def cells(row: Row) -> list[Any]:
    """A row's cells, in the order of HEAD; '-' for what is not known."""
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.argv[1]))) + "\n")
