# SPDX-License-Identifier: Apache-2.0
"""Impossible values of every key are named and refused."""

import functools
import re

import pytest
from ml_collections import ConfigDict

from dcae_jax import config as config_lib
from dcae_jax.errors import UserError

FLAT = config_lib.flatten(config_lib.default().to_dict())
NUMBERS = [key for key, value in FLAT.items() if type(value) in (int, float)]
TUPLES = [key for key, value in FLAT.items() if isinstance(value, tuple)]


def _refuses(key, value):
    """Asserts that the check names `key`, also where ml_collections would not have let it pass."""
    tree = config_lib.default().to_dict()
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, tree)[last] = value
    with pytest.raises(UserError, match=rf"^{re.escape(key)}[=:]") as refused:
        config_lib.validate(ConfigDict(tree))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", NUMBERS)
def test_each_number_has_bounds(key):
    """Catches a key whose nonsense is found in a step, hours later, or never."""
    for value in (-7, -7.0, float("nan"), float("inf"), "3", True, None):
        _refuses(key, value)


@pytest.mark.parametrize("key", TUPLES)
def test_each_tuple_has_a_kind(key):
    """Catches a number among texts, a text among numbers, and one value without its comma."""
    for value in ((-7,), (float("nan"),), (None,), "x", 3):
        _refuses(key, value)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dtype", "float16", "dtype='float16'"),
        ("batch_size", 0, "batch_size=0"),
        ("accumulate", 3, "not divisible by accumulate=3; try 255 or 258"),
        ("ema_decay", 1.0, "ema_decay"),
        ("data.crop", "squash", "data.crop='squash'"),
        ("data.crop_area", (0.5, 0.2), "data.crop_area"),
        ("optimizer.learning_rate", float("nan"), "learning_rate=nan"),
        ("seed", -1, "seed=-1"),
        ("profile_steps", (3,), "profile_steps"),
    ],
)
def test_impossible_values_are_named(key, value, words):
    """Catches a value that passes here and fails, or does harm, an hour later."""
    config = config_lib.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(words)) as error:
        config_lib.validate(config)
    assert "\n" not in str(error.value)
