# SPDX-License-Identifier: Apache-2.0
"""Partial initialisation from another model."""

import numpy as np
import pytest

from dcae_jax.errors import UserError
from dcae_jax.setup import partial_init

FRESH = {
    "encoder.kernel": np.zeros((2, 3)),
    "encoder.bias": np.zeros(3),
    "head.kernel": np.zeros(4),
}
SOURCE = {"encoder.kernel": np.ones((2, 3)), "encoder.bias": np.ones(3), "head.kernel": np.ones(5)}


def test_what_fits_is_filled_and_the_rest_stays_fresh():
    """Catches a weight of another shape taken, one that fits left out, a wrong report of either."""
    source = {**SOURCE, "tail.kernel": np.ones(1)}
    found = partial_init.fill(FRESH, source, ("encoder.*",))
    assert found.weights.keys() == FRESH.keys()
    assert found.weights["encoder.kernel"] is SOURCE["encoder.kernel"]
    assert found.weights["head.kernel"] is FRESH["head.kernel"]
    assert found.filled == {"encoder.kernel", "encoder.bias"} and found.fresh == {"head.kernel"}
    assert found.unused == {"head.kernel", "tail.kernel"}


def test_a_required_part_that_does_not_fit_is_refused():
    """Catches a part that silently keeps its random weights."""
    with pytest.raises(UserError, match=r"1 misshapen \(head.kernel is \(5,\) instead of \(4,\)\)"):
        partial_init.fill(FRESH, SOURCE, (".*",))
    with pytest.raises(UserError, match=r"1 missing \(encoder.bias\).*fewer parts in init_parts"):
        partial_init.fill(FRESH, {"encoder.kernel": SOURCE["encoder.kernel"]}, ("encoder.*",))


def test_a_pattern_that_matches_nothing_is_refused():
    """Catches a renamed layer that is no longer required."""
    with pytest.raises(UserError, match="init_parts: pattern 'decoder.*' matches no parameter"):
        partial_init.fill(FRESH, SOURCE, ("decoder.*",))
