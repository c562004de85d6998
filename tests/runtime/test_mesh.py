# SPDX-License-Identifier: Apache-2.0
"""The mesh: what fits it."""

import dataclasses

import jax
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.config.schema import MeshSizes
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib


def test_mesh_and_batch_errors_name_what_would_fit():
    """Catches 'dimension 0 is not divisible' from inside XLA."""
    sizes = config_lib.default().mesh
    sizes.fsdp = 3
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh_lib.make_mesh(sizes, jax.devices()[:8])
    sizes.fsdp = 2
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "spatial": 1}
    with pytest.raises(UserError, match="batch_size=100 .* try 96 or 104"):
        mesh_lib.check_batch(100, mesh, key="batch_size")


@dataclasses.dataclass(frozen=True)
class OfSlice:
    """A device as JAX describes one of several TPU slices."""

    id: int
    slice_index: int
    platform: str = "none"
    device_kind: str = "none"
    process_index: int = 0


@pytest.mark.parametrize(
    "sizes",
    [
        MeshSizes(data=2, fsdp=4),
        MeshSizes(data=4, tensor=2),
        MeshSizes(data=2, fsdp=2, spatial=2),
        MeshSizes(data=8),
    ],
)
def test_only_data_spans_slices(sizes):
    """Catches a multi-slice mesh built as one of a single slice: weights all-gathered, or heads
    and rows exchanged, over the slow network between slices."""
    devices = [OfSlice(i, slice_index=i % 2) for i in range(8)]
    found = mesh_lib.make_mesh(sizes, devices)
    assert tuple(found.shape.values()) == (sizes.data, sizes.fsdp, sizes.tensor, sizes.spatial)
    assert {device.id for device in found.devices.flat} == set(range(8))
    for number, part in enumerate(np.split(found.devices, 2)):
        assert {device.slice_index for device in part.flat} == {number}
