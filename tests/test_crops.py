# SPDX-License-Identifier: Apache-2.0
"""Levels and the range [-1, 1]; tests/test_data.py has the crops themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import crops


def test_levels_round_as_the_protocol():
    """Fails if rounding truncates, goes to even, or a level does not survive [-1, 1] and back."""
    levels = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(crops.to_levels(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(crops.to_levels(levels / 127.5 - 1 + 0.003), levels)
    np.testing.assert_array_equal(crops.to_levels(np.array([-1.2, 1.3, 0.0])), [0, 255, 128])
    assert np.isnan(crops.to_levels(np.array([np.nan])))[0]


@pytest.mark.parametrize("module", [np, jnp])
def test_uint8_survives_the_range_of_the_models(module):
    """Fails if a level changes on its way, or NumPy and JAX, compiled or not, cut differently."""
    levels = module.arange(256, dtype=module.uint8).reshape(2, 8, 16, 1)
    x = crops.to_float(levels)
    assert x.dtype == np.float32 and isinstance(x, type(levels))
    np.testing.assert_allclose(x, np.float64(levels) / 127.5 - 1, atol=2e-7)
    back = crops.to_uint8(x)
    assert back.dtype == np.uint8 and isinstance(back, type(levels))
    np.testing.assert_array_equal(back, levels)
    above = module.asarray((np.arange(255, dtype=np.float32) + 0.51) / 127.5 - 1)
    for found in (jax.jit(crops.to_uint8)(above), crops.to_uint8(above)):
        np.testing.assert_array_equal(found, np.arange(1, 256))
