# SPDX-License-Identifier: Apache-2.0
"""Every key of a job, and the Python API: values that cannot be are named and refused."""

import json

import numpy as np
import pytest
from support import run_job

from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder
from dcae_jax.errors import UserError
from dcae_jax.jobs import train

FLAT = config_lib.flatten(config_lib.default().to_dict())
NUMBERS = [key for key, value in FLAT.items() if type(value) in (int, float)]
TUPLES = [key for key, value in FLAT.items() if isinstance(value, tuple)]


def _refuses(key, value):
    """Asserts that the job's check names `key`; so does ml_collections for some types."""
    config = config_lib.default()
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    try:
        node[last] = value
    except TypeError:
        return
    with pytest.raises(UserError) as refused:
        config_lib.validate(config)
    assert key in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("key", NUMBERS)
def test_each_number_has_bounds(key):
    """Catches a key whose nonsense is found in a step, hours later, or never."""
    # A float key takes True as 1.0.
    kinds = (True,) if type(FLAT[key]) is int else ()
    for value in (-7, float("nan"), float("inf"), "3", *kinds):
        if isinstance(value, float) or type(FLAT[key]) is int or value != -7:
            _refuses(key, value)
        else:
            _refuses(key, float(value))


@pytest.mark.parametrize("key", TUPLES)
def test_each_tuple_has_a_kind(key):
    """Catches a number among texts, a text among numbers, and one value without its comma."""
    for value in ((-7,), (float("nan"),), (None,), "x", 3):
        _refuses(key, value)


@pytest.mark.parametrize(
    "change",
    [{"tile": -1}, {"tile": 2, "overlap": 2}],
)
def test_tiles_that_cannot_be_are_refused(change):
    """Catches an endless loop over tiles of no size."""
    ae = autoencoder.create_autoencoder("tiny")
    with pytest.raises(ValueError):
        ae.encode(np.zeros((1, 64, 64, 3), np.float32), **change)


@pytest.mark.parametrize("x", [None, [[1.0]], np.zeros((1, 64, 64, 3), np.complex64), np.zeros(3)])
def test_input_of_another_kind_is_named(x):
    """Catches JAX's shape errors from inside the model."""
    with pytest.raises(ValueError, match="x "):
        autoencoder.create_autoencoder("tiny").encode(x)


def test_an_allowed_change_is_recorded(small, alone, tmp_path):
    """Catches a run whose config.json says it always had its last configuration."""
    workdir = tmp_path / "run"
    small.steps = 2
    run_job(train, small, str(workdir))
    small.steps, small.ema_decay = 4, 0.5
    with pytest.raises(UserError, match="ema_decay was 0.99, is 0.5"):
        run_job(train, small, str(workdir))
    small.allow_change = ("ema_decay",)
    run_job(train, small, str(workdir))
    small.steps = 5
    run_job(train, small, str(workdir))
    changes = json.loads((workdir / "config.json").read_text())["changes"]
    assert changes == [{"step": 2, "key": "ema_decay", "before": 0.99, "now": 0.5}]
