# SPDX-License-Identifier: Apache-2.0
"""Every key has a reader, every config file a state."""

import ast
import functools
import glob
import os
import pathlib
import re

import jax
import pytest
from support import CONFIGS, to_json

from dcae_jax import config as config_lib
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dit, sdvae, uvit
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import state as state_lib

PACKAGE = pathlib.Path(config_lib.__file__).parent


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


SECTIONS = [name for name, value in config_lib.default().items() if hasattr(value, "items")]


@functools.cache
def _reads():
    """Keys that the package reads: 'steps' as config.steps, 'sample.steps' off config.sample.

    A section goes by its own name, NAME_config, or a name that the file gives it
    (settings = config.sample). Where a file looks keys up by a variable (model_config[key]), the
    words that it holds count too.
    """
    reads = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "config.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        section_of = {f"{name}{end}": name for name in SECTIONS for end in ("", "_config")}
        section_of |= {"sizes": "mesh", "config": ""}
        for node in nodes:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                tuples = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = (
                    zip(target.elts, node.value.elts, strict=False)
                    if tuples
                    else [(target, node.value)]
                )
                for name, value in pairs:
                    if isinstance(name, ast.Name) and getattr(value, "attr", "") in SECTIONS:
                        section_of[name.id] = value.attr
        words = {node.value for node in nodes if isinstance(node, ast.Constant)}
        for node in nodes:
            base = getattr(node, "value", None)
            section = section_of.get(getattr(base, "id", getattr(base, "attr", None)))
            if section is None or not isinstance(getattr(node, "ctx", None), ast.Load):
                continue
            prefix = f"{section}." if section else ""
            if isinstance(node, ast.Attribute):
                reads.add(prefix + node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                reads.add(f"{prefix}{node.slice.value}")
            elif isinstance(node, ast.Subscript) and section:
                reads |= {f"{prefix}{str(word).removeprefix(prefix)}" for word in words}
    return reads


@pytest.mark.parametrize("key", list(_leaves(config_lib.default())))
def test_every_key_is_read_outside_config_py(key):
    """Catches a key that users set and nothing looks at, also where another section has a key of
    the same name."""
    assert key in _reads()


def _training_configs():
    sizes = {*dcae.VARIANTS, *sdvae.VARIANTS, *uvit.VARIANTS, *dit.VARIANTS}
    for path in sorted(glob.glob(os.path.join(CONFIGS, "*.py"))):
        for variant in sorted(sizes):
            try:
                config = config_lib.load_file(path, variant)
            except TypeError:  # takes no variant
                continue
            if config.job != "train":
                continue
            known = {"auto": {*dcae.VARIANTS, *sdvae.VARIANTS}}
            known |= {"uvit": uvit.VARIANTS, "dit": dit.VARIANTS}
            if variant not in known[config.model.name]:
                continue
            if config.objective:  # what a run takes from its latents
                m = config.model
                m.latent_size, m.latent_channels, m.num_classes, m.scaling_factor = 8, 4, 3, 1.0
            yield pytest.param(config, id=f"{os.path.basename(path)}:{variant}")


@pytest.mark.parametrize("config", _training_configs())
def test_every_training_config_builds_its_abstract_state(config, one_device):
    """Catches a pattern that matches nothing, or a key that does not fit, in a shipped config."""
    spec = state_lib.train_spec(config, one_device)
    abstract = state_lib.abstract_state(config.sharding, one_device, spec)
    assert abstract.params.keys() == spec.params.keys()
    assert abstract.ema.keys() == spec.trained
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    trained = [name for name in spec.params if name in spec.trained]
    assert len(moments) == 2 * len(trained)


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


def test_identity_names_what_differs_and_lets_speed_keys_pass():
    """Catches a resume with another batch size, and one refused for a worker more."""
    before, now = config_lib.default(), config_lib.default()
    now.batch_size, now.steps, now.data.workers, now.mesh.fsdp = 64, 7, 3, 2
    now.optimizer.b1 = 0.5
    changes = config_lib.identity_changes(to_json(before), to_json(now))
    assert changes == {"batch_size": (256, 64), "optimizer.b1": (0.9, 0.5)}


# Top-level keys that a resumed run must share: the contract of docs, not read off the code.
IDENTITY = (
    "model trainable loss optimizer ema_decay ema_warmup accumulate data seed batch_size "
    "resolution resolutions dtype patch_size objective label_dropout"
).split()
FREE = ("data.workers", "data.threads", "data.prefetch")  # how fast the same batches arrive


@pytest.mark.parametrize("key", list(_leaves(config_lib.default())))
def test_a_resumed_run_shares_every_key_of_its_identity_and_no_other(key):
    """Catches a key that leaves the identity, so that a run goes on as another one, and a resume
    refused for a key that changes no number."""
    before, now = config_lib.default(), config_lib.default()
    old = config_lib.flatten(to_json(before))[key]
    section, _, last = key.rpartition(".")
    here = now[section] if section else now
    here[last] = _another(here[last])
    changes = config_lib.identity_changes(to_json(before), to_json(now))
    shared = key.split(".")[0] in IDENTITY and key not in FREE
    assert changes == ({key: (old, config_lib.flatten(to_json(now))[key])} if shared else {})


def _another(value):
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    return (*value, "x") if isinstance(value, tuple) else value + type(value)(1)


def test_tuples_survive_json():
    """Catches every run refusing to resume because () became []."""
    config = config_lib.default()
    assert not config_lib.identity_changes(to_json(config), to_json(config_lib.default()))


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


def test_fsdp_splits_the_largest_axis_that_divides():
    """Catches small biases split over chips, and kernels split along an axis of 3."""
    sizes = config_lib.default().mesh
    sizes.fsdp = 8
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:8])

    def spec(*shape, rule="fsdp"):
        return tuple(sharding.weight_spec(shape, rule, mesh))

    assert spec(3, 3, 64, 256) == (None, None, None, "fsdp")
    assert spec(3, 3, 512, 36) == (None, None, "fsdp")
    assert spec(64) == () and spec(3, 3, 64, 256, rule="replicate") == ()
