# SPDX-License-Identifier: Apache-2.0
"""Every key has a reader, every config file a state."""

import glob
import os
import pathlib
import re

import jax
import pytest
from conftest import CONFIGS

from dcae_jax import config as config_lib
from dcae_jax import matching, sharding, state
from dcae_jax.config import UserError

PACKAGE = pathlib.Path(config_lib.__file__).parent


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("key", list(_leaves(config_lib.default())))
def test_every_key_is_read_outside_config_py(key):
    """Catches a key that users set and nothing looks at."""
    leaf = key.rsplit(".", 1)[-1]
    reads = re.compile(rf"""\.{leaf}\b(?!\s*=[^=])|\[["']{leaf}["']\]|["']{leaf}["']""")
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "config.py"]
    assert any(reads.search(path.read_text()) for path in files), key


def _training_configs():
    for path in sorted(glob.glob(os.path.join(CONFIGS, "*.py"))):
        try:
            model = config_lib.load_file(path, "tiny").model
        except TypeError:  # takes no variant
            continue
        for variant in state.model_module(model).VARIANTS:
            config = config_lib.load_file(path, variant)
            if config.objective:
                config.autoencoder, config.resolution = "f32c32", 512
                config = matching.complete(config, None)
            if config.job == "train":
                yield pytest.param(config, id=f"{os.path.basename(path)}:{variant}")


@pytest.mark.parametrize("config", _training_configs())
def test_every_training_config_builds_its_abstract_state(config, one_device):
    """Catches a pattern that matches nothing, or a key that does not fit, in a shipped config."""
    plan = state.blueprint(config, one_device)
    abstract = state.abstract_state(config, one_device, plan)
    assert abstract.params.keys() == plan.params.keys()
    assert abstract.ema.keys() == plan.trained
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    trained = [name for name in plan.params if name in plan.trained]
    assert len(moments) == 2 * len(trained)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dtype", "float16", "dtype='float16'"),
        ("batch_size", 0, "batch_size=0"),
        ("accumulate", 3, "not divisible by accumulate=3"),
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
        config_lib.check(config)
    assert "\n" not in str(error.value)


def test_identity_names_what_differs_and_lets_speed_keys_pass():
    """Catches a resume with another batch size, and one refused for a worker more."""
    before, now = config_lib.default(), config_lib.default()
    now.batch_size, now.steps, now.data.workers, now.mesh.fsdp = 64, 7, 3, 2
    now.optimizer.b1 = 0.5
    changes = config_lib.identity_changes(config_lib.to_json(before), config_lib.to_json(now))
    assert changes == {"batch_size": (256, 64), "optimizer.b1": (0.9, 0.5)}


def test_tuples_survive_json():
    """Catches every run refusing to resume because () became []."""
    config = config_lib.default()
    assert not config_lib.identity_changes(
        config_lib.to_json(config), config_lib.to_json(config_lib.default())
    )


def test_mesh_and_batch_errors_name_what_would_fit():
    """Catches 'dimension 0 is not divisible' from inside XLA."""
    sizes = config_lib.default().mesh
    sizes.fsdp = 3
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(sizes, jax.devices()[:8])
    sizes.fsdp = 2
    mesh = sharding.make_mesh(sizes, jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "spatial": 1}
    with pytest.raises(UserError, match="batch_size=100 .* try 96 or 104"):
        sharding.check_batch(100, mesh, key="batch_size")


def test_fsdp_splits_the_largest_axis_that_divides():
    """Catches small biases split over chips, and kernels split along an axis of 3."""
    sizes = config_lib.default().mesh
    sizes.fsdp = 8
    mesh = sharding.make_mesh(sizes, jax.devices()[:8])

    def spec(*shape, rule="fsdp"):
        return tuple(sharding.weight_spec(shape, rule, mesh))

    assert spec(3, 3, 64, 256) == (None, None, None, "fsdp")
    assert spec(3, 3, 512, 36) == (None, None, "fsdp")
    assert spec(64) == () and spec(3, 3, 64, 256, rule="replicate") == ()
