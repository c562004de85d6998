# SPDX-License-Identifier: Apache-2.0
"""What a run reports before its first step."""

import types

import jax
import jax.numpy as jnp
import pytest

from dcae_jax.models import lpips
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import tables


def test_the_share_of_lpips_is_vggs_share_of_the_step(small, one_device):
    """Catches a share that is a constant, of another image size or batch than the step's, or of
    the forward pass alone."""
    place = mesh_lib.replicated(one_device)
    weights = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in lpips.shapes("vgg").items()
    }

    def step(flops):
        return types.SimpleNamespace(cost_analysis=lambda: {"flops": flops})

    def share(size, flops):
        return tables.lpips_percent(small.batch_size, weights, {size: step(flops), 16: step(1.0)})

    # VGG16's blocks of convolutions, (inputs, outputs), each block at half the size of the last.
    blocks = (
        [(3, 64), (64, 64)],
        [(64, 128), (128, 128)],
        [(128, 256), (256, 256), (256, 256)],
        [(256, 512), (512, 512), (512, 512)],
        [(512, 512), (512, 512), (512, 512)],
    )
    size = 128  # the smaller the maps, the more XLA saves at the padding
    forward = sum(
        2 * 9 * inputs * outputs * (size // 2**i) ** 2
        for i, block in enumerate(blocks)
        for inputs, outputs in block
    )
    # Outputs and images go forward, and the gradient of the outputs comes back.
    flops = 3 * forward * small.batch_size
    assert share(size, flops) == pytest.approx(100, rel=0.1)
    assert share(size, 4 * flops) == pytest.approx(25, rel=0.1)


def test_a_platform_that_counts_no_flops_has_no_share(small, one_device):
    """Catches every run with LPIPS stopping before its first step, as on GPUs and TPUs, where
    cost_analysis gives None."""
    place = mesh_lib.replicated(one_device)
    weights = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in lpips.shapes("vgg").items()
    }
    silent = types.SimpleNamespace(cost_analysis=lambda: None)
    assert tables.lpips_percent(small.batch_size, weights, {32: silent}) is None
