# SPDX-License-Identifier: Apache-2.0
"""The mesh: what fits it."""

import jax
import pytest

from dcae_jax import config as config_lib
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
