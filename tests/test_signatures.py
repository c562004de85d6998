# SPDX-License-Identifier: Apache-2.0
"""The shapes and dtypes in signatures are checked while tests run."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from dcae_jax.diffusion import samplers
from dcae_jax.evaluation import metrics
from dcae_jax.models import blocks, layers
from dcae_jax.training import losses

IMAGES = jnp.zeros((2, 4, 4, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: blocks.space_to_channel(IMAGES[0]),  # three axes
        lambda: blocks.space_to_channel(IMAGES.astype(int)),
        lambda: layers._as_product(IMAGES, jnp.zeros((3, 3, 4, 8))),  # 4 channels, not 3
        lambda: samplers.euler(lambda x, t, cond: x, IMAGES[0], None, 2),
        lambda: losses.l1(IMAGES, IMAGES[:, :2]),
        lambda: metrics.moments_update(metrics.moments_init(3), IMAGES),
    ],
)
def test_an_array_that_does_not_fit_is_refused(call):
    """Catches signatures that nothing checks: the hook is not installed, or a room is left out."""
    with pytest.raises(TypeCheckError):
        call()


def test_a_result_that_does_not_fit_is_refused(monkeypatch):
    """Catches results that nothing checks."""
    monkeypatch.setattr(blocks, "space_to_channel", lambda x: x)
    with pytest.raises(TypeCheckError, match="return value"):
        blocks.down_shortcut(IMAGES, 3)


def test_arrays_that_fit_pass():
    """Catches a check that refuses everything."""
    assert blocks.down_shortcut(IMAGES, 6).shape == (2, 2, 2, 6)
