# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices, and where each array of a run lies on it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax.config import UserError

AXES = ("data", "fsdp", "tensor", "spatial")
BATCH_AXES = ("data", "fsdp")
SMALL = 2**16  # parameters of fewer elements are replicated: splitting them only costs messages


def make_mesh(sizes: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices` (default: all). Raises UserError if they don't fit."""
    devices = list(jax.devices() if devices is None else devices)
    shape = list(mesh_shape(sizes, len(devices)).values())
    grid = mesh_utils.create_device_mesh(shape, devices) if len(devices) > 1 else None
    return Mesh(np.array(devices).reshape(shape) if grid is None else grid, AXES)


def mesh_shape(sizes: Any, devices: int) -> dict[str, int]:
    """Devices along each axis of config.mesh, of so many. Raises UserError if they don't fit."""
    shape = [sizes[axis] for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh ({text}): sizes must be positive, and one at most may be -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices:
        raise UserError(
            f"mesh ({text}) does not fit {devices} devices; its sizes must multiply to "
            f"{devices}, or use -1 for one of them"
        )
    return dict(zip(AXES, shape, strict=True))


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh's devices are, whatever this host is."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_dtype(config: Any, mesh: Mesh) -> str:
    """config.dtype with 'auto' decided: bfloat16 except on CPUs."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def check_batch(size: int, mesh: Mesh, *, key: str, accumulate: int = 1) -> None:
    """Raises UserError, naming the nearest sizes that fit, if the batch does not divide."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accumulate
    if size % shards:
        down, up = size // shards * shards, -(-size // shards) * shards
        nearest = f"{down} or {up}" if down else f"{up}"
        what = f"{shards // accumulate} devices" + (
            f" x accumulate={accumulate}" if accumulate > 1 else ""
        )
        raise UserError(f"{key}={size} is not divisible by {what}; try {nearest}")


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Of an array whose first axis is the batch; images [B, H, W, C] are split in height too."""
    spec = P(BATCH_AXES, "spatial") if ndim == 4 else P(BATCH_AXES)
    return NamedSharding(mesh, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays."""
    return {
        key: jax.make_array_from_process_local_data(batch_sharding(mesh, value.ndim), value)
        for key, value in batch.items()
    }


def put(value: Any, place: NamedSharding) -> jax.Array:
    """A host array that every process has whole, laid out as `place` says."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def weight_spec(shape: tuple[int, ...], rule: str, mesh: Mesh) -> P:
    """Where a weight of `shape` lies: 'fsdp' splits its largest axis that divides."""
    if rule not in ("fsdp", "replicate"):
        raise UserError(f"sharding rule {rule!r} is not known; choose fsdp or replicate")
    parts = mesh.shape["fsdp"]
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if rule == "replicate" or parts == 1 or math.prod(shape) < SMALL or not fitting:
        return P()
    axis = max(fitting, key=lambda a: shape[a])
    return P(*(["fsdp" if a == axis else None for a in range(axis + 1)]))


def state_shardings(state: Any, rules: Sequence[Sequence[str]], mesh: Mesh) -> Any:
    """The tree `state` (arrays or shapes) with a NamedSharding for each leaf.

    A leaf below a key that is a parameter's path, in weights, moments and averages alike, follows
    the first of `rules` (pattern, rule) that matches the path; everything else is replicated.
    """

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names or not leaf.shape:
            return replicated(mesh)
        rule = next((rule for pattern, rule in rules if re.fullmatch(pattern, names[-1])), None)
        return NamedSharding(mesh, weight_spec(leaf.shape, rule or "replicate", mesh))

    return jax.tree_util.tree_map_with_path(place, state)
