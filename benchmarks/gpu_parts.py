# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/gpu.py that run this project's code. Each yields rows; see `measured`.

Weights are scaled noise: faster to draw than a real initialisation, and just as fast to use.
"""

import contextvars
import functools
import glob
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator as generator_lib
from dcae_jax.config import Config
from dcae_jax.config.schema import MeshSizes, Model
from dcae_jax.diffusion import samplers
from dcae_jax.models import layers, transformer
from dcae_jax.models import weights as weights_lib
from dcae_jax.planner import compile as compile_lib
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import precision, process, sharding
from dcae_jax.setup import resolve
from dcae_jax.training import state as state_lib

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")
STEPS, GUIDANCE = 30, 1.5  # of sampling: 60 evaluations an image
PERIOD = 1_000_003  # of noise: a prime, so that no two rows are the same
DECODED = 32  # images decoded at a time while sampling
Row = dict[str, Any]
Rows = Iterator[Row]
Build = Callable[[Any], tuple[jax.stages.Wrapped, tuple]]  # mesh -> (jitted, its arguments)


def matmul(batch: int, tiny: bool) -> Rows:
    """The matmul rate that FLOPs are compared with, in FLOP/s."""
    del batch
    size = 256 if tiny else 8192
    a, b = (random(jax.ShapeDtypeStruct((size, size), jnp.bfloat16), seed) for seed in (0, 1))
    row = measured(lambda mesh: (jax.jit(jnp.matmul), (a, b)), (a, b), flops=2 * size**3)
    yield row | {"rate": 2 * size**3 / row["seconds"]}


# --- autoencoders ---------------------------------------------------------------------------------


def coder(
    batch: int, tiny: bool, what: str, size: int, variant: str = "f32c32", dtype: str = "bfloat16"
) -> Rows:
    """Encode or decode."""
    variant, size = ("tiny", 64) if tiny else (variant, size)
    batch = 2 if tiny else batch

    def build(mesh: Any) -> tuple[jax.stages.Wrapped, tuple]:
        model = Model(variant=variant, depthwise=form())
        ae = autoencoder_lib.abstract_autoencoder(model, mesh, dtype)
        f, c = ae.compression, ae.latent_channels
        shape = (batch, size, size, 3) if what == "encode" else (batch, size // f, size // f, c)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh_lib.replicated(mesh))
        return (ae._encode if what == "encode" else ae._decode), (ae.weights, x)

    _, (weights, x) = build(here())
    yield measured(build, (filled(weights), random(x)), images=batch)


def autoencoder_step(batch: int, tiny: bool, file: str, size: int, lpips: bool = True) -> Rows:
    """A training step of a phase."""
    raw = config_lib.load_file(os.path.join(CONFIGS, f"{file}.py"), "tiny" if tiny else "f32c32")
    size, raw.batch_size = (64, 4) if tiny else (size, batch)
    raw.resolution, raw.resolutions = size, ()
    raw.loss.lpips_weight = float(lpips)
    yield train_step(config_lib.validate(raw), size)


def train_step(config: Config, size: int) -> Row:
    """A row of the step that jobs/train.py runs."""
    mesh = here()
    spec = state_lib.train_spec(config, mesh)
    _, (abstract, batch, lpips) = compile_lib.step_and_arguments(config, mesh, size)
    weights = filled({**abstract.params, **abstract.stats}, np.asarray)
    start = state_lib.init_state(config, mesh, spec, weights)
    batch = {name: random(leaf) for name, leaf in batch.items()}
    parameters = sum(leaf.size for leaf in weights.values())
    counted = config_lib.replace(config, remat="none")
    return measured(
        lambda mesh: compile_lib.step_and_arguments(config, mesh, size),
        (start, batch, filled(lpips)),
        images=config.batch_size,
        flops=lambda: compile_lib.flops(counted, mesh, size),
        donated=True,
    ) | {"parameters": parameters}


def inputs(batch: int, tiny: bool) -> Rows:
    """Phase 1 on a folder of JPEGs, as a user runs it: does the device wait for images?"""
    from PIL import Image

    rng = np.random.default_rng(0)
    last, every = (20, 5) if tiny else (60, 10)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(32 if tiny else 512):  # as large as ImageNet's are on average
            noise = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((472, 405), Image.Resampling.BICUBIC)
            image.save(os.path.join(folder, f"{i}.jpg"), quality=92)
        workdir = os.path.join(folder, "run")
        variant, size = ("tiny", 64) if tiny else ("f32c32", 256)
        command = [sys.executable, "-m", "dcae_jax.main", f"--workdir={workdir}"]
        command += [f"--config={CONFIGS}/phase1.py:{variant}", f"--config.batch_size={batch}"]
        command += ["--config.data.source=folder", f"--config.data.path={folder}"]
        command += ["--config.loss.lpips_weight=0.0", f"--config.resolution={size}"]
        command += [f"--config.log_every={every}", "--config.steps=100000"]
        command += ["--config.evaluate_every=0", "--config.save_every=100000"]
        job = subprocess.Popen(command)
        try:
            rows = []
            while not rows or rows[-1]["step"] < last:
                if job.poll() is not None:
                    raise RuntimeError(f"the run ended with {job.returncode}")
                time.sleep(0.2)
                rows = _metrics(workdir)
        finally:
            job.send_signal(signal.SIGKILL)  # its evaluation would compile for a minute
            job.wait()
    steps = sorted(row["step_s"] for row in rows if row["step"] > last // 2)
    seconds = steps[len(steps) // 2]
    waits = {k: v for k, v in rows[-1].items() if "wait" in k or "input" in k}
    notes = ", ".join(f"{name} {value:.3g}" for name, value in waits.items())
    yield {
        "seconds": seconds,
        "least": steps[0],
        "most": steps[-1],
        "images_per_s": batch / seconds,
        "case": notes,
    }


def _metrics(workdir: str) -> list[Row]:
    for path in glob.glob(os.path.join(workdir, "metrics.jsonl")):
        with open(path, encoding="utf-8") as file:
            return [json.loads(text) for text in file if text.endswith("\n")]
    return []


# --- diffusion ------------------------------------------------------------------------------------


def diffusion(config: str, autoencoder: str, patch: int, batch: int, tiny: bool) -> Config:
    """The configuration of a diffusion model for latents of 512-pixel images."""
    file, variant = config.split(":")
    raw = config_lib.load_file(os.path.join(CONFIGS, f"{file}.py"), "tiny" if tiny else variant)
    raw.autoencoder, raw.resolution, raw.patch_size = autoencoder, 512, patch
    raw.batch_size = 2 if tiny else batch
    if tiny:  # as many tokens
        side, raw.autoencoder = 512 // compression(autoencoder), "tiny"
        raw.resolution = side * compression("tiny")
    return resolve.on_variant(config_lib.validate(raw))


def compression(name: str) -> int:
    return models.autoencoder_of(name).variant(name).compression


def denoiser_step(batch: int, tiny: bool, config: str, autoencoder: str, patch: int) -> Rows:
    """A training step of a diffusion model; layers are rematerialised as configured."""
    found = diffusion(config, autoencoder, patch, batch, tiny)
    yield train_step(found, found.model.latent_size)


def sampling(
    batch: int, tiny: bool, config: str, autoencoder: str, patch: int, whole: bool
) -> Rows:
    """One evaluation with guidance; with `whole` all of them, without and with the decoder."""
    found = diffusion(config, autoencoder, patch, batch, tiny)
    batch, dtype = found.batch_size, "bfloat16"
    decoded = min(DECODED, batch)

    def generator(mesh: Any) -> generator_lib.Generator:
        model = Model(variant=found.autoencoder, depthwise=form())
        ae = autoencoder_lib.abstract_autoencoder(model, mesh, dtype)
        return generator_lib.abstract_generator(found.model, found, ae, dtype)

    def latents(mesh: Any, count: int) -> jax.ShapeDtypeStruct:
        arch = generator(mesh).architecture
        shape = (count, arch.latent_size, arch.latent_size, arch.latent_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh_lib.replicated(mesh))

    def evaluation(mesh: Any) -> tuple[jax.stages.Wrapped, tuple]:
        made = generator(mesh)

        def call(weights: Any, x: Any, t: Any, labels: Any) -> Any:
            model = weights_lib.merge(made.graphdef, weights)
            model = samplers.guided(model, made.num_classes, GUIDANCE, objective=made.objective)
            with sharding.on_mesh(mesh), precision.of(dtype):
                return model(x, t, labels)

        x = latents(mesh, batch)
        t = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=x.sharding)
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=x.sharding)
        return jax.jit(call), (made.weights, x, t, labels)

    _, (weights, *inputs) = evaluation(here())
    weights = filled(weights)
    row = measured(evaluation, (weights, *(random(leaf) for leaf in inputs)), images=batch)
    rate = row["images_per_s"] / STEPS
    yield row | {"case": f"one evaluation; images/s: {STEPS} of them", "images_per_s": rate}
    if not whole:
        return
    settings = generator_lib.SampleSettings(GUIDANCE, STEPS if not tiny else 3)

    def sampler(mesh: Any) -> tuple[jax.stages.Wrapped, tuple]:
        made = generator(mesh)
        _, (weights, ae_weights, *rest) = made.program(batch, settings)
        return made._compiled(settings, decode=False), (weights, ae_weights, *rest)

    def decoder(mesh: Any) -> tuple[jax.stages.Wrapped, tuple]:
        ae = generator(mesh).autoencoder
        return ae._decode, (ae.weights, latents(mesh, decoded))

    _, (_, ae_weights, labels, keys, _) = sampler(here())
    ae_weights = filled(ae_weights)
    arguments = (weights, ae_weights, random(labels), random(keys), jnp.float32(GUIDANCE))
    row = measured(sampler, arguments, images=batch, warm=0)
    yield row | {"case": f"{settings.steps} steps to latents"}
    z = random(latents(here(), decoded))
    times = batch // decoded
    part = measured(decoder, (ae_weights, z), images=decoded)
    both = {key: row[key] + times * part[key] for key in ("seconds", "least", "most", "flops")}
    yield (
        {"case": f"and decoded, {decoded} at a time", "batch": batch, "peak_gb": part["peak_gb"]}
        | both
        | {"images_per_s": batch / both["seconds"]}
    )


# --- measuring ------------------------------------------------------------------------------------


def measured(
    build: Build,
    arguments: tuple,
    *,
    images: int = 0,
    flops: float | Callable[[], float] | None = None,
    donated: bool = False,
    warm: int = 3,
    seconds: float = 3.0,
) -> Row:
    """Compiles what `build` makes for this device, and times it with `arguments`.

    flops: None counts those of what `build` makes. donated: the first result is the next call's
    first argument. lower_s, compile_s: the first start; again_s: a second one, from the compile
    cache, tracing included. peak_gb: of the process so far. warm, seconds: see `common.steady`.
    """
    process.use_compile_cache()
    mesh = here()

    def count() -> float:
        ATTENTION.set("plain")  # XLA has no count of a fused kernel
        return flops() if callable(flops) else flops or counted(build)

    with ThreadPoolExecutor(1) as pool:
        began = time.perf_counter()
        jitted, abstract = build(mesh)
        lowered = jitted.lower(*abstract)
        lower_s = time.perf_counter() - began
        # XLA compiles without the GIL: counting costs no time on the card.
        total = pool.submit(contextvars.Context().run, count)
        began = time.perf_counter()
        program = lowered.compile()
        compile_s = time.perf_counter() - began
        total = total.result()
    del lowered, jitted
    jax.clear_caches()
    began = time.perf_counter()
    jitted, abstract = build(mesh)
    jitted.lower(*abstract).compile()
    again_s = time.perf_counter() - began
    kept = [arguments, None]

    def call() -> None:
        out = program(*kept[0])
        kept[1] = out[1] if donated else out
        if donated:
            kept[0] = (out[0], *kept[0][1:])

    del arguments
    row = common.steady(call, lambda: jax.block_until_ready(kept), warm=warm, seconds=seconds)
    stats = jax.local_devices()[0].memory_stats() or {}
    row |= {"flops": total, "lower_s": lower_s, "compile_s": compile_s, "again_s": again_s}
    row["peak_gb"] = stats.get("peak_bytes_in_use", 0) / 1e9
    return row | ({"batch": images, "images_per_s": images / row["seconds"]} if images else {})


def counted(build: Build) -> float:
    """FLOPs of the program by XLA's count, on the CPU; counting every iteration of its loops."""
    jitted, arguments = build(mesh_lib.make_mesh(MeshSizes(), jax.devices("cpu")[:1]))
    traced, platform = jitted.trace(*arguments), jax.default_backend()
    return compile_lib._counted(traced, platform) + compile_lib.repeated_flops(
        traced.jaxpr, platform
    )


@functools.cache
def here() -> Any:
    """The mesh of the device to measure."""
    if "cuda" in os.environ.get("JAX_PLATFORMS", "") and jax.default_backend() != "gpu":
        raise RuntimeError("JAX sees no GPU; install jax[cuda13]")
    return mesh_lib.make_mesh(MeshSizes(), jax.local_devices()[:1])


def form() -> str:
    """The form of depthwise convolutions on this device, which the FLOP count uses too."""
    return layers.depthwise_form("auto", jax.default_backend())


def random(leaf: jax.ShapeDtypeStruct, seed: int = 0) -> jax.Array:
    """Noise on the device: normal, or uniform integers below 256."""
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jax.device_put(rng.integers(0, 256, leaf.shape).astype(leaf.dtype), leaf.sharding)
    noise = rng.standard_normal(PERIOD, np.float32).astype(leaf.dtype)
    return jax.device_put(np.resize(noise, leaf.shape), leaf.sharding)


def filled(shapes: dict[str, Any], place: Callable[..., Any] = jax.device_put) -> dict[str, Any]:
    """Weights: kernels are noise over the root of their fan-in, scales and variances 1, rest 0."""
    noise = np.random.default_rng(0).standard_normal(PERIOD, np.float32)

    def values(name: str, leaf: Any) -> np.ndarray:
        if name.endswith((".scale", ".var")):
            return np.ones(leaf.shape, np.float32)
        if name.startswith("lin"):  # of LPIPS
            return np.abs(np.resize(noise, leaf.shape))
        if leaf.ndim < 2 or name.endswith(".bias"):
            return np.zeros(leaf.shape, np.float32)
        fan_in = leaf.shape[-2] * (math.prod(leaf.shape[:2]) if leaf.ndim == 4 else 1)
        return np.resize(noise * np.float32(fan_in**-0.5), leaf.shape)

    return {name: place(values(name, leaf)) for name, leaf in shapes.items()}


ATTENTION: contextvars.ContextVar[str] = contextvars.ContextVar("ATTENTION")


def _choose_attention() -> None:
    """If ATTENTION is set, uses it for every attention layer that is created."""
    made = transformer.Attention.__init__

    @functools.wraps(made)
    def init(self: transformer.Attention, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        chosen = ATTENTION.get(os.environ.get("BENCH_ATTENTION"))
        self.attention = chosen or self.attention

    transformer.Attention.__init__ = init


_choose_attention()
