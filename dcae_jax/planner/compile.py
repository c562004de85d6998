# SPDX-License-Identifier: Apache-2.0
"""Compiler statistics of one program: a job's step, or its sampling, on devices you don't have.

A compile-only TPU client, or this host's own processor, compiles the very step that train.py runs,
or what the job `sample` runs for a batch. Each compile runs in a process of its own,
`python -m dcae_jax.planner.compile REQUEST`, since a process holds libtpu's lock for life, and a compile
that takes too much memory kills its process alone.
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
from dcae_jax.api import generator as generator_lib
from dcae_jax.config import Config
from dcae_jax.config.schema import MeshSizes
from dcae_jax.diffusion import latent_spec, samplers
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, lpips
from dcae_jax.planner import chips, hlo
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib

Facts = dict[str, Any]

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


# --- the job that a request names ---------------------------------------------------------------


def target(plan_config: Config) -> Any:
    """The configuration of the job to plan, as its own command line would make it."""
    if not plan_config.config:
        raise UserError("plan.config is empty; name the file of a job, as in configs/phase1.py")
    return overridden(plan_config.config, plan_config.overrides, plan_config.generator)


def overridden(file: str, overrides: tuple[str, ...], generator: str = "") -> Config:
    """The configuration of `--config=file --config.KEY=VALUE ...`. Raises UserError.

    generator: of a job sample, the file of the job that trains its model; see `_sampling`.
    """
    config = _read("plan.config", file, overrides)
    if config.job == "sample":
        return _sampling(config, generator, overrides)
    if config.job != "train":
        raise UserError(
            f"plan.config={file!r} is of the job {config.job}, which has nothing to plan"
        )
    if generator:
        raise UserError(
            f"plan.generator={generator!r} is for a job sample, and plan.config={file!r} is of "
            "training; leave one out"
        )
    if config.objective:
        # Shapes of the latents: of those on the disk, or of those that a VARIANT would make.
        if config.data.path:
            return resolve.on_latents(config)[0]
        return latent_spec.resolve_latent_spec(config, None)
    return config


def _sampling(config: Config, file: str, overrides: tuple[str, ...]) -> Config:
    """The configuration of training from `file`, with what a job sample, `config`, sets itself.

    batch_size and steps become those of the sampling, in images and in batches.
    """
    if not file:
        raise UserError(
            "plan.generator is empty; name the file of the job that trains the model, as in "
            "configs/uvit.py:h"
        )
    model = _read("plan.generator", file, overrides)
    if model.job != "train" or not model.objective:
        raise UserError(
            f"plan.generator={file!r} trains no diffusion model; name a file that does, as "
            "configs/uvit.py:h"
        )
    if model.autoencoder not in models.names_in(models.autoencoder_of(model.autoencoder)):
        raise UserError(
            f"autoencoder={model.autoencoder!r} is no VARIANT, as a planned job sample needs; put "
            "'autoencoder=f64c128' or another into plan.overrides"
        )
    model = latent_spec.resolve_latent_spec(model, None)
    s = config.sample
    if (s.sampler or samplers.SAMPLERS[model.objective][0]) == "dopri5":
        raise UserError(
            f"sample.sampler={s.sampler!r}: dopri5 decides as it runs how often it evaluates the "
            "network; plan with 'sample.sampler=heun' and as many 'sample.steps' as you expect"
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
    """The configuration of a file that the user named as `key`. Raises UserError."""
    try:
        raw = config_lib.parse_file(file, overrides)
        # A chain of phases has no keys but its phases.
        return config_lib.validate(raw) if raw.job != "phases" else Config(job=raw.job)
    except UserError as error:
        raise UserError(f"{key}={file!r}: {error}") from error


# --- its program ----------------------------------------------------------------------------------


def compiled(plan_config: Config, text: str, size: int, batch: int) -> Facts:
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
        [sys.executable, "-m", "dcae_jax.planner.compile", json.dumps(request)],
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


def answer(request: Facts) -> Facts:
    """In the process of its own: the facts, or {error} for a user's mistake."""
    # The time to compile is one of the facts.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_exec_time_optimization_effort", request["effort"])
    try:
        config = overridden(request["config"], tuple(request["overrides"]), request["generator"])
        return measure(config, request["topology"], request["size"])
    except UserError as error:
        return {"error": str(error)}


def measure(config: Config, text: str, size: int) -> Facts:
    """Compiles the step of `config` at `size`, or its sampling of a batch, for topology `text`.

    Bytes and FLOPs are a chip's (FLOPs: of the whole step, shared out evenly); peak_bytes is
    arguments + output + temporaries - aliased. Where XLA finds that the program does not fit,
    peak_bytes is what it says it needs, and what only a compiled program has is None.
    """
    mesh = mesh_lib.make_mesh(config.mesh, chips.devices(text))
    if config.job == "sample":
        mesh_lib.check_batch(config.batch_size, mesh, key="sample.batch_size")
    else:
        resolve.check_training(config, mesh)
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
        return (
            facts
            | _NOT_COMPILED
            | {"peak_bytes": needed_bytes(error, sharding.chip_bytes(arguments))}
        )
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


def step_and_arguments(config: Config, mesh: Mesh, size: int) -> tuple[Any, tuple]:
    """train.py's step, jitted, and its abstract arguments, laid out on `mesh`; or a sampler's."""
    if config.job == "sample":
        s = config.sample
        settings = generator_lib.SampleSettings(
            s.guidance, s.steps, sampler=s.sampler, interval=s.guidance_interval
        )
        return generator_lib.abstract_generator(config, mesh).program(config.batch_size, settings)
    spec = state_lib.train_spec(config, mesh)
    state = state_lib.abstract_state(config.sharding, mesh, spec)
    batch = run_lib.abstract_batch(config, size, mesh)
    step = step_lib.jit_step(config, spec, state)
    return step, (state, batch, abstract_lpips(config, mesh))


def flops(config: Config, mesh: Mesh, size: int) -> float:
    """FLOPs of a step over all chips, as XLA counts them.

    XLA counts the body of a loop once, so a step's loops are laid out in a row here, and the rounds
    of a sampler's are added. The program is that of the mesh's platform, and lowered only; the
    counting is this host's.
    """
    config = config_lib.replace(
        config,
        unroll=True,
        dtype=mesh_lib.compute_dtype(config.dtype, mesh),
        model={"depthwise": dcae.depthwise_form(config.model, mesh_lib.platform(mesh))},
        mesh=MeshSizes(),
    )
    here = mesh_lib.make_mesh(config.mesh, jax.devices("cpu")[:1])
    step, arguments = step_and_arguments(config, here, size)
    traced, platform = step.trace(*arguments), mesh_lib.platform(mesh)
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


def abstract_lpips(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `setup.run.lpips_weights` loads."""
    if not config.loss.lpips_weight or config.objective:
        return {}
    place = mesh_lib.replicated(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in lpips.shapes("vgg").items()
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.argv[1]))) + "\n")
