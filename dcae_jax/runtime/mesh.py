# SPDX-License-Identifier: Apache-2.0
"""The device mesh: axes, size checks, placement of batches."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from dcae_jax.config.schema import MeshSizes
from dcae_jax.errors import UserError, nearest_multiples

AXES = ("data", "fsdp", "tensor", "spatial")
BATCH_AXES = ("data", "fsdp")
# Least rows of latents per device of the mesh axis spatial. With one row or less, XLA (jaxlib
# 0.10.2) computes wrong gradients of this model on some meshes (tests/runtime/test_sharding.py).
MIN_ROWS = 2


def make_mesh(sizes: MeshSizes, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices` (default: all). Raises UserError if they don't fit."""
    devices = list(jax.devices() if devices is None else devices)
    shape = list(mesh_shape(sizes, len(devices)).values())
    return Mesh(_grid(shape, devices), AXES)


def mesh_shape(sizes: MeshSizes, devices: int) -> dict[str, int]:
    """{axis: size} of config.mesh over `devices`. Raises UserError if they don't fit."""
    shape = [sizes.data, sizes.fsdp, sizes.tensor, sizes.spatial]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh ({text}): sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices:
        raise UserError(
            f"mesh ({text}) does not fit {devices} devices; its sizes must multiply to "
            f"{devices}, or use -1 for one of them"
        )
    return dict(zip(AXES, shape, strict=True))


def _grid(shape: list[int], devices: list[Any]) -> np.ndarray:
    """Devices ordered for their interconnect; only the axis data spans several TPU slices."""
    if len(devices) == 1:
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or shape[0] % slices:
        return mesh_utils.create_device_mesh(shape, devices)
    within = [shape[0] // slices, *shape[1:]]
    return mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1, 1], devices)


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu': the platform of the mesh's devices, not of this host."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_dtype(dtype: str, mesh: Mesh) -> str:
    """`dtype` with 'auto' resolved: bfloat16 except on CPUs."""
    if dtype != "auto":
        return dtype
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def check_batch(size: int, mesh: Mesh, *, key: str, accumulate: int = 1) -> None:
    """Raises UserError, with the nearest sizes that fit, if the batch does not divide."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accumulate
    if size % shards:
        nearest = nearest_multiples(size, shards)
        what = f"{shards // accumulate} devices" + (
            f" x accumulate={accumulate}" if accumulate > 1 else ""
        )
        raise UserError(f"{key}={size} is not divisible by {what}; try {nearest}")


def check_height(size: int, mesh: Mesh, *, key: str, compression: int = 1) -> None:
    """Raises UserError, with sizes that fit, unless mesh.spatial can split images of `size`.

    compression: the model's f. All parts get the same number of rows of latents, at least MIN_ROWS.
    """
    parts = mesh.shape["spatial"]
    step = parts * compression
    least = step * MIN_ROWS
    if parts > 1 and (size % step or size < least):
        raise UserError(
            f"{key}={size} cannot be split over mesh.spatial={parts}: it must be a multiple of "
            f"{step}, at least {least}; try {nearest_multiples(size, step, least)}"
        )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """For an array whose first axis is the batch; images [B, H, W, C] are split in height too."""
    spec = P(BATCH_AXES, "spatial") if ndim == 4 else P(BATCH_AXES)
    return NamedSharding(mesh, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def image_sharding(mesh: Mesh, shape: tuple[int, ...], latent_rows: int) -> NamedSharding:
    """For images or latents [B, H, W, C] of any size: axes that do not divide are not split.

    latent_rows: the height of the latents, whether `shape` is theirs or that of their images.
    """
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = mesh.shape["spatial"]
    whole = shape[1] % parts or latent_rows < MIN_ROWS * parts
    return NamedSharding(
        mesh, P(None if shape[0] % rows else BATCH_AXES, None if whole else "spatial")
    )


@functools.lru_cache(maxsize=16)
def _places(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """{process: the indices along BATCH_AXES at which it has devices}."""
    rows = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in BATCH_AXES), -1)
    found: dict[int, set[int]] = {}
    for place, devices in enumerate(rows):
        for device in devices:
            found.setdefault(device.process_index, set()).add(place)
    return {process: tuple(sorted(places)) for process, places in found.items()}


def process_batch_slice(mesh: Mesh) -> tuple[int, int]:
    """(index of this process's slice of each global batch, number of slices).

    Processes that differ only along tensor or spatial share a slice. Raises UserError if slices
    overlap partly.
    """
    shares = sorted(set(_places(mesh).values()))
    covered = sum(map(len, shares))
    if covered > len(set().union(*shares)) or len(set(map(len, shares))) > 1:
        raise UserError(
            f"mesh ({', '.join(f'{k}={v}' for k, v in mesh.shape.items())}) gives processes "
            "overlapping slices of a batch; make tensor * spatial a divisor or a multiple of the "
            "devices per process"
        )
    return shares.index(_places(mesh)[jax.process_index()]), len(shares)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's slice of a global batch, as global arrays."""
    return {key: _put_rows(np.asarray(value), mesh) for key, value in batch.items()}


def _put_rows(value: np.ndarray, mesh: Mesh) -> jax.Array:
    places, shares = _places(mesh)[jax.process_index()], process_batch_slice(mesh)[1]
    rows = len(value) // len(places)  # per index

    def read(index: Any) -> np.ndarray:  # of slices
        first = places.index((index[0].start or 0) // rows) * rows
        return value[(slice(first, first + rows), *index[1:])]

    shape = (len(value) * shares, *value.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh, value.ndim), read)


def host_to_global(value: Any, where: Sharding) -> jax.Array:
    """A global array with the sharding `where`, from a host array that every process has."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, value.__getitem__)


def check_heads(heads: int, mesh: Mesh) -> None:
    """Raises UserError unless a transformer's heads can be split over mesh.tensor."""
    parts = mesh.shape["tensor"]
    if heads % parts:
        raise UserError(
            f"mesh.tensor={parts} does not divide the {heads} heads; use "
            f"{math.gcd(heads, parts)} or another divisor"
        )
