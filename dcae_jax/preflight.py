# SPDX-License-Identifier: Apache-2.0
"""Before the first step: whether configuration, model, data and devices fit, and what is started.

What a user can have got wrong is told here, before anything is compiled.
"""

import importlib.metadata
import os
import platform as host
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcae_jax import checkpoint, evaluate, losses, matching, report, sharding, sources
from dcae_jax import config as config_lib
from dcae_jax import state as state_lib
from dcae_jax.config import UserError
from dcae_jax.models import lpips, patchgan
from dcae_jax.state import Blueprint, TrainState


def check(config: Any, mesh: Mesh) -> None:
    """Raises UserError where the configuration does not fit itself, the model or the devices."""
    config_lib.check(config)
    sharding.check_rules(config.sharding)
    sharding.check_batch(config.batch_size, mesh, key="batch_size", accumulate=config.accumulate)
    if config.objective:
        if config.mesh.spatial > 1:
            raise UserError(
                f"mesh.spatial={config.mesh.spatial} splits images, which a diffusion model has "
                "none of; use mesh.data, mesh.fsdp and mesh.tensor"
            )
        return
    if config.phase == 3 and not config.loss.gan_weight:
        raise UserError("loss.gan_weight=0 in phase 3, which is the GAN's; set it above 0")
    arch = state_lib.model_module(config.model).architecture(config.model)
    for size in config_lib.training_resolutions(config):
        key = "resolutions" if config.resolutions else "resolution"
        evaluate.check_resolution(size, arch.compression, key)
        sharding.check_height(size, mesh, key=key, compression=arch.compression)
    if not config.evaluate.resolutions and not config.objective:
        raise UserError(
            "evaluate.resolutions=() names no size to evaluate training at; give "
            f"evaluate.resolutions=({config.resolution},)"
        )
    for size in config.evaluate.resolutions:
        evaluate.check_resolution(size, arch.compression, "evaluate.resolutions")
        sharding.check_height(size, mesh, key="evaluate.resolutions", compression=arch.compression)
    if config.loss.gan_weight:
        least = patchgan.smallest_input(config.loss.gan_layers)
        if min(config_lib.training_resolutions(config)) < least:
            raise UserError(
                f"loss.gan_layers={config.loss.gan_layers} needs pictures of {least} pixels; "
                "use fewer layers or a higher resolution"
            )
    sharding.check_batch(config.evaluate.batch_size, mesh, key="evaluate.batch_size")


def load_judges(config: Any, mesh: Mesh) -> dict[str, Any]:
    """Weights of the networks that the loss needs, on the mesh. Raises UserError without them."""
    if not config.loss.lpips_weight or config.objective:
        return {}
    if not config.loss.lpips_weights:
        raise UserError(
            f"loss.lpips_weight={config.loss.lpips_weight} needs loss.lpips_weights: download "
            "vgg16-397923af.pth (torchvision), run `python -m dcae_jax.torch_io vgg16-397923af.pth "
            "--out=lpips-vgg.safetensors` and name that file; or set loss.lpips_weight=0"
        )
    try:
        weights = lpips.load(config.loss.lpips_weights, "vgg")
    except (OSError, ValueError) as error:
        raise UserError(f"loss.lpips_weights={config.loss.lpips_weights!r}: {error}") from error
    return {
        "lpips": {
            k: sharding.host_to_global(v, sharding.replicated(mesh)) for k, v in weights.items()
        }
    }


def lpips_share(config: Any, judges: dict[str, Any], compiled: dict[int, Any]) -> float:
    """Percent of the largest step's FLOPs that the perceptual loss and its gradient take."""
    size = max(compiled)
    images = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32)
    alone = jax.jit(jax.grad(losses.perceptual, argnums=1)).lower(judges["lpips"], images, images)
    devices = len(next(iter(judges["lpips"].values())).sharding.device_set)
    # XLA counts a partitioned program's FLOPs on one device.
    whole = compiled[size].cost_analysis()["flops"] * devices
    return 100 * alone.cost_analysis()["flops"] / whole


def on_latents(config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(configuration, source, manifest) of a diffusion run, the first with what latents fix.

    Raises UserError without latents, and where they do not fit.
    """
    if config.data.source != "latents":
        raise UserError(
            f"data.source={config.data.source!r}: objective={config.objective!r} learns latents; "
            "run configs/encode.py, then set data.source=latents and data.path to its workdir"
        )
    source = sources.training_source(config.data)
    return matching.complete(config, source.manifest), source, source.manifest


def batch_sizes(config: Any) -> list[int]:
    """Sizes a side, in pixels or latents, that a step is compiled for."""
    if config.objective:
        return [config.model.latent_size]
    return sorted(set(config_lib.training_resolutions(config)))


def abstract_batch(config: Any, size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of pictures or latents of `size` a side, as `data` delivers it."""
    count = config.batch_size
    shapes = {"label": ((count,), jnp.int32)}
    if config.objective:
        channels = config.model.latent_channels
        shapes["latent"] = (count, size, size, channels), jnp.dtype(config.encode.dtype)
    else:
        shapes["image"] = (count, size, size, 3), jnp.uint8
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh, len(shape)))
        for name, (shape, dtype) in shapes.items()
    }


def fresh_state(config: Any, mesh: Mesh, plan: Blueprint) -> tuple[TrainState, str]:
    """(the state before step 1, where its weights are from). Raises UserError."""
    if not config.init_from:
        if config.phase > 1 or config.needs_weights:
            raise UserError(
                f"init_from is empty, and {'phase ' + str(config.phase)} starts from weights; run "
                f"configs/phase{config.phase - 1 or 1}.py first and name its workdir with "
                "--config.init_from"
            )
        return state_lib.init_state(config, mesh, plan), f"random, seed {config.seed}"
    kind = "generator" if config.objective else "autoencoder"
    weights, saved = checkpoint.load_weights(config.init_from, config.weights, kind=kind)
    theirs, ours = saved["model"]["variant"], config.model.variant
    try:
        state = state_lib.init_state(config, mesh, plan, weights)
    except UserError as error:
        if theirs == ours:
            raise
        raise UserError(
            f"init_from={config.init_from!r} holds {theirs} weights, this run is a {ours}; use "
            f"--config=...:{theirs}"
        ) from error
    theirs, ours = saved["model"]["scaling_factor"], config.model.scaling_factor
    if config.objective and theirs and theirs != ours:
        raise UserError(
            f"init_from={config.init_from!r} learned latents times {theirs}, these are taken times "
            f"{ours}; encode with the autoencoder that it was trained on"
        )
    # A path is kept whole, a hub name as it is.
    there = os.path.exists(config.init_from)
    origin = os.path.abspath(config.init_from) if there else config.init_from
    return state, f"{config.weights} weights of {origin}"


def check_identity(
    saved: dict[str, Any] | None, config: Any, workdir: str, step: int
) -> list[dict[str, Any]]:
    """Raises UserError if `config` is not that of the run in `workdir`, allow_change aside.

    Returns what was allowed to change at `step`, for config.json.
    """
    if saved is None or not isinstance(saved.get("config"), dict):
        raise UserError(
            f"{workdir} has checkpoints but no config.json of a run; use another --workdir"
        )
    changes = config_lib.identity_changes(saved["config"], config_lib.to_json(config))
    allowed = {key for key in changes if _allows(config.allow_change, key)}
    refused = [f"{k} was {a!r}, is {b!r}" for k, (a, b) in changes.items() if k not in allowed]
    if refused:
        raise UserError(
            f"{workdir} holds another run: {'; '.join(refused)}; use another --workdir, or name "
            "the keys in --config.allow_change"
        )
    return [
        {"step": step, "key": key, "before": changes[key][0], "now": changes[key][1]}
        for key in sorted(allowed)
    ]


def _allows(allow_change: tuple[str, ...], key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow_change)


def versions(mesh: Mesh) -> dict[str, str]:
    """What the run ran on, for config.json."""
    packages = ("dcae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": host.python_version(), "platform": sharding.platform(mesh)}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def parameter_table(plan: Blueprint) -> str:
    """Parameters trained and frozen, by top-level part."""
    parts: dict[str, list[int]] = {}
    for name, leaf in plan.params.items():
        part = ".".join(name.split(".")[:2])
        trained_frozen = parts.setdefault(part, [0, 0])
        trained_frozen[name not in plan.trained] += leaf.size
    rows = [[part, *sizes] for part, sizes in sorted(parts.items())]
    total = [sum(row[i] for row in rows) for i in (1, 2)]
    return report.table([["parameters", "trained", "frozen"], *rows, ["total", *total]])


def memory_table(abstract: TrainState, mesh: Mesh) -> str:
    """Megabytes of the state's parts on one device, and what a single device would hold."""
    parts = {
        "parameters": abstract.params,
        "moments": abstract.opt_state,
        "EMA": abstract.ema,
        "discriminator": abstract.discriminator,
        "other": (abstract.stats, abstract.step, abstract.skipped, abstract.skipped_in_row),
    }
    rows = []
    for name, part in parts.items():
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        if whole:
            rows.append([name, sharding.chip_bytes(part) / 1e6, whole / 1e6])
    total = ["total", *(sum(row[i] for row in rows) for i in (1, 2))]
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    head = [f"MB, mesh {shape}", "a chip", "whole"]
    return report.table([head, *rows, total])
