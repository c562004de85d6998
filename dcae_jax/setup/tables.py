# SPDX-License-Identifier: Apache-2.0
"""Tables that a run logs before its first step: parameters, memory, the cost of LPIPS."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcae_jax import files
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import sharding
from dcae_jax.setup.partial_init import PartialInit
from dcae_jax.training import losses
from dcae_jax.training.state import TrainSpec, TrainState


def parameters(spec: TrainSpec) -> str:
    """Numbers of trained and frozen parameters by top-level part."""
    trained, frozen = (
        {name: leaf.size for name, leaf in spec.params.items() if (name in spec.trained) == wanted}
        for wanted in (True, False)
    )
    return _by_part(["parameters", "trained", "frozen"], trained, frozen)


def initial(found: PartialInit) -> str:
    """By part: paths filled from another model, kept as initialised, unused from the other."""
    columns = (dict.fromkeys(paths, 1) for paths in (found.filled, found.fresh, found.unused))
    return _by_part(["paths", "filled", "fresh", "unused"], *columns)


def _by_part(head: list[str], *columns: Mapping[str, int]) -> str:
    """A table with the sums of the columns {path: number} by top-level part."""
    sums: dict[str, list[int]] = {}
    for i, column in enumerate(columns):
        for path, number in column.items():
            part = ".".join(path.split(".")[:2])
            sums.setdefault(part, [0] * len(columns))[i] += number
    total = [sum(column.values()) for column in columns]
    rows = [[part, *row] for part, row in sorted(sums.items())]
    return files.table([head, *rows, ["total", *total]])


def memory(abstract: TrainState, mesh: Mesh) -> str:
    """Megabytes of the state's parts per device, and unsharded."""
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
    head = [f"MB, mesh {shape}", "per chip", "unsharded"]
    return files.table([head, *rows, total])


def lpips_percent(
    batch_size: int, weights: Weights, compiled: Mapping[int, jax.stages.Compiled]
) -> float | None:
    """The perceptual loss and its gradient in percent of the FLOPs of the largest step.

    None if the platform does not report FLOPs of a program before it is compiled, as accelerators
    do not (jax#22713).
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
    # XLA reports a partitioned program's FLOPs per device.
    return 100 * part / (step * devices)
