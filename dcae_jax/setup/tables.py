# SPDX-License-Identifier: Apache-2.0
"""What a run logs before its first step: its parameters, its memory, and what LPIPS costs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcae_jax import files
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import sharding
from dcae_jax.training import losses
from dcae_jax.training.state import TrainSpec, TrainState


def parameters(spec: TrainSpec) -> str:
    """Parameters trained and frozen, by top-level part."""
    parts: dict[str, list[int]] = {}
    for name, leaf in spec.params.items():
        part = ".".join(name.split(".")[:2])
        trained_frozen = parts.setdefault(part, [0, 0])
        trained_frozen[name not in spec.trained] += leaf.size
    rows = [[part, *sizes] for part, sizes in sorted(parts.items())]
    total = [sum(row[i] for row in rows) for i in (1, 2)]
    return files.table([["parameters", "trained", "frozen"], *rows, ["total", *total]])


def memory(abstract: TrainState, mesh: Mesh) -> str:
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
    return files.table([head, *rows, total])


def lpips_percent(
    batch_size: int, weights: Weights, compiled: Mapping[int, jax.stages.Compiled]
) -> float | None:
    """Percent of the largest step's FLOPs that the perceptual loss and its gradient take.

    None where the platform counts no FLOPs of a program, as accelerators do not before it is
    compiled (jax#22713).
    """
    size = max(compiled)
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
    alone = jax.jit(jax.grad(losses.perceptual, argnums=1)).lower(weights, images, images)
    part, step = (
        (program.cost_analysis() or {}).get("flops") for program in (alone, compiled[size])
    )
    if part is None or step is None:
        return None
    devices = len(next(iter(weights.values())).sharding.device_set)
    # XLA counts a partitioned program's FLOPs on one device.
    return 100 * part / (step * devices)
