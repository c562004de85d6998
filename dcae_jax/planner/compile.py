# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of a job's program for devices you don't have, and its statistics.

A compile-only TPU client, or the CPU of this host, compiles the train step of jobs/train.py, or
what the job `sample` runs for a batch. Each compile runs in a subprocess,
`python -m dcae_jax.planner.compile REQUEST`: a process holds libtpu's lock until it exits, and a
compile that runs out of memory kills only its own process.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax.extend
import jax.numpy as jnp
from jax.sharding import Mesh

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator as generator_lib
from dcae_jax.config import Config
from dcae_jax.config.schema import MeshSizes, Model, Plan
from dcae_jax.diffusion import samplers
from dcae_jax.errors import MachineError, UserError
from dcae_jax.models import layers, lpips
from dcae_jax.planner import chips, hlo
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.setup import frozen, resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import losses
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib

Facts = dict[str, Any]

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # skip the cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# XLA's message for the whole program: 'Ran out of memory in memory space hbm. Used 32.58G of
# 15.75G hbm.', or before buffers are assigned: 'Ran out of memory on HBM, the total memory
# required for HLO temporaries (29.15G) exceeds available HBM (15.75G).'
_OUT_OF_MEMORY = re.compile(r"ran out of memory", re.IGNORECASE)
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


# --- the job to plan ------------------------------------------------------------------------------


def target_job(settings: Plan) -> Config:
    """The configuration of the job to plan, as its own command line would build it."""
    if not settings.config:
        raise UserError(
            "plan.config is empty; set it to a job's config file, e.g. configs/phase1.py"
        )
    return job_config(settings.config, settings.overrides, settings.generator)


def job_config(file: str, overrides: tuple[str, ...], generator: str = "") -> Config:
    """The configuration of `--config=file --config.KEY=VALUE ...`. Raises UserError.

    generator: for the job sample, the config file that trains its model; see `_sampling`.
    """
    config = _read("plan.config", file, overrides)
    if config.job == "sample":
        return _sampling(config, generator, overrides)
    if config.job != "train":
        raise UserError(
            f"plan.config={file!r} is for the job {config.job}; plan a train or a sample job"
        )
    if generator:
        raise UserError(
            f"plan.generator={generator!r} is for the job sample, but plan.config={file!r} trains; "
            "leave one out"
        )
    if config.objective:
        # Shapes of the latents on disk, or of those that a VARIANT would make.
        if config.data.path:
            return resolve.on_latents(config)[0]
        return resolve.on_variant(config)
    return config


def _sampling(config: Config, file: str, overrides: tuple[str, ...]) -> Config:
    """The training configuration in `file` with the settings of the sampling job `config`.

    batch_size becomes sample.batch_size.
    """
    if not file:
        raise UserError(
            "plan.generator is empty; set it to the config file that trains the model, e.g. "
            "configs/uvit.py:h"
        )
    model = _read("plan.generator", file, overrides)
    if model.job != "train" or not model.objective:
        raise UserError(
            f"plan.generator={file!r} does not train a diffusion model; use a file that does, e.g. "
            "configs/uvit.py:h"
        )
    if model.autoencoder not in models.names_in(models.autoencoder_of(model.autoencoder)):
        raise UserError(
            f"autoencoder={model.autoencoder!r} is not a VARIANT, which planning the job sample "
            "needs; add 'autoencoder=f64c128' or another to plan.overrides"
        )
    model = resolve.on_variant(model)
    s = config.sample
    if (s.sampler or samplers.SAMPLERS[model.objective][0]) == "dopri5":
        raise UserError(
            f"sample.sampler={s.sampler!r}: dopri5 chooses its number of network evaluations at "
            "run time; plan with 'sample.sampler=heun' and the 'sample.steps' that you expect"
        )
    return config_lib.replace(
        model,
        job=config.job,
        dtype=config.dtype,
        mesh=config.mesh,
        sample=config.sample,
        batch_size=s.batch_size,
        accumulate=1,
    )


def _read(key: str, file: str, overrides: tuple[str, ...]) -> Config:
    """The configuration in `file`, the value of the plan's `key`. Raises UserError."""
    try:
        raw = config_lib.parse_file(file, overrides)
        # The only keys of a chain of phases are its phases.
        return config_lib.validate(raw) if raw.job != "phases" else Config(job="phases")
    except UserError as error:
        raise UserError(f"{key}={file!r}: {error}") from error


# --- the subprocess -------------------------------------------------------------------------------


def compile_in_subprocess(settings: Plan, topology: str, size: int, batch: int, part: str) -> Facts:
    """The statistics of the program at `size` and `batch` on a topology; see `measure`.

    part: which of the plan's compiles this is, for the log.
    """
    key = "sample.batch_size" if settings.generator else "batch_size"
    request = {
        "config": settings.config,
        "generator": settings.generator,
        "overrides": [*settings.overrides, f"{key}={batch}"],
        "topology": topology,
        "size": size,
        "effort": settings.effort,
    }
    logging.info("%s at %d, batch %d: compiling (%s)", topology, size, batch, part)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax.planner.compile", json.dumps(request)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    answer = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode < 0:
        raise MachineError(
            f"the compile for {topology} at {size}, batch {batch}, was killed by signal "
            f"{-done.returncode}, most likely out of memory; use a larger host or a smaller batch"
        )
    if done.returncode or not answer[0].startswith("{"):
        raise RuntimeError(f"the compile of {request} failed: {done.stderr[-2000:]}")
    facts = json.loads(answer[0])
    if "error" in facts:
        raise UserError(facts["error"])
    seconds = time.perf_counter() - began
    logging.info("%s at %d, batch %d: done in %.0f s", topology, size, batch, seconds)
    return facts


def run_request(request: Facts) -> Facts:
    """In the subprocess: the statistics, or {error} for a user error."""
    # Compile time is one of the statistics.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update(*effort_option(request["effort"]))
    try:
        config = job_config(request["config"], tuple(request["overrides"]), request["generator"])
        return measure(config, request["topology"], request["size"])
    except UserError as error:
        return {"error": str(error)}


def effort_option(effort: float) -> tuple[str, float | str]:
    """(option of jax.config, its value) for plan.effort, how hard the compiler searches.

    In [-1, 1]. jax 0.11 and later have levels alone.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        return "jax_exec_time_optimization_effort", effort
    return "jax_optimization_level", "UNKNOWN" if effort == 0 else "O1" if effort < 0 else "O3"


# --- the program ----------------------------------------------------------------------------------


def measure(config: Config, topology: str, size: int) -> Facts:
    """Compiles the train step of `config` at `size`, or its sampling of a batch, for a topology.

    Bytes and FLOPs are per chip (FLOPs: those of the whole step over the number of chips).
    peak_bytes is arguments + output + temporaries - aliased; if XLA rejects the program as too
    large, peak_bytes is the size that XLA reports, and all other statistics of the compiled program
    are None.
    """
    mesh = mesh_lib.make_mesh(config.mesh, chips.devices(topology))
    if config.job == "sample":
        mesh_lib.check_batch(config.batch_size, mesh, key="sample.batch_size")
    else:
        resolve.check_training(config, mesh)
    batch = config.batch_size
    facts = {
        "topology": topology,
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
        needed = needed_bytes(error, sharding.chip_bytes(arguments))
        return facts | _NOT_COMPILED | {"peak_bytes": needed}
    facts["compile_s"] = time.perf_counter() - began
    facts["compile_cpu_s"] = time.process_time() - worked  # the same on a busy host
    return facts | _statistics(program)


def _statistics(program: jax.stages.Compiled) -> Facts:
    """What the compiler reports about a program; see `measure`."""
    memory, costs, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    assert memory is not None and costs is not None and text is not None  # CPUs and TPUs report all
    sizes = {
        "arguments_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    return sizes | {
        "peak_bytes": sum(sizes.values()) - 2 * sizes["alias_bytes"],
        "bytes_accessed": costs["bytes accessed"] + hlo.repeated_bytes(text),
        "collectives": hlo.collective_bytes(text),
    }


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
    """The bytes that a program needs, from the compiler's out-of-memory error, if it says so.

    arguments: bytes of the program's arguments, which some messages do not include. Any other error
    is re-raised.
    """
    message = str(error)
    if not _OUT_OF_MEMORY.search(message):
        raise error
    if used := _USED.search(message):
        return float(used[1]) * _UNITS[used[2]]
    if used := _TEMPORARIES.search(message):
        return float(used[1]) * _UNITS[used[2]] + arguments
    return None


def step_and_arguments(
    config: Config, mesh: Mesh, size: int
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The jitted train step, or sampler, and its abstract arguments with shardings on `mesh`."""
    if config.job == "sample":
        s = config.sample
        settings = generator_lib.SampleSettings(
            s.guidance, s.steps, sampler=s.sampler, interval=s.guidance_interval
        )
        of_autoencoder = Model(variant=config.autoencoder, depthwise=config.model.depthwise)
        autoencoder = autoencoder_lib.abstract_autoencoder(of_autoencoder, mesh, config.dtype)
        model = generator_lib.abstract_generator(config.model, config, autoencoder, config.dtype)
        return model.program(config.batch_size, settings)
    spec = frozen.of_variant(config, state_lib.train_spec(config, mesh), mesh)
    state = state_lib.abstract_state(config.sharding, mesh, spec)
    batch = run_lib.abstract_batch(config, size, mesh)
    step = step_lib.jit_step(config, spec, state)
    teacher = (spec.teacher.decoder,) if spec.teacher else ()
    return step, (state, batch, abstract_lpips(config, mesh), *teacher)


def flops(config: Config, mesh: Mesh, size: int) -> float:
    """FLOPs of the program over all chips, as XLA counts them.

    XLA counts a loop body once, so the train step's loops are unrolled here, and the remaining
    iterations of a sampler's loops are added. The program is lowered on this host for the mesh's
    platform, not compiled.
    """
    platform = mesh_lib.platform(mesh)
    config = config_lib.replace(
        config,
        unroll=True,
        dtype=mesh_lib.compute_dtype(config.dtype, mesh),
        model={"depthwise": layers.depthwise_form(config.model.depthwise, platform)},
        mesh=MeshSizes(),
    )
    here = mesh_lib.make_mesh(config.mesh, jax.devices("cpu")[:1])
    step, arguments = step_and_arguments(config, here, size)
    traced = step.trace(*arguments)
    once = _counted(traced, platform)
    return once + repeated_flops(traced.jaxpr, platform) if config.job == "sample" else once


def _counted(traced: jax.stages.Traced, platform: str) -> float:
    """FLOPs of a traced function lowered for `platform`, as XLA counts them."""
    name = "cuda" if platform == "gpu" else platform
    costs = traced.lower(lowering_platforms=(name,)).cost_analysis()
    assert costs is not None  # XLA has a cost model for these platforms
    return costs["flops"]


def repeated_flops(
    jaxpr: jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr, platform: str
) -> float:
    """FLOPs of all iterations but the first of the loops in a traced program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name != "scan":
            inner = jax.extend.core.jaxprs_in_params(equation.params)
            total += sum(repeated_flops(part, platform) for part in inner)
            continue
        body, count = equation.params["jaxpr"], equation.params["length"]
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in body.in_avals]
        traced = jax.jit(jax.extend.core.jaxpr_as_fun(body)).trace(*shapes)
        total += (count - 1) * _counted(traced, platform)
        total += count * repeated_flops(body, platform)
    return total


def abstract_lpips(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `setup.frozen.lpips_weights` loads."""
    if not losses.uses_lpips(config):
        return {}
    place = mesh_lib.replicated(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in lpips.shapes("vgg").items()
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_request(json.loads(sys.argv[1]))) + "\n")
