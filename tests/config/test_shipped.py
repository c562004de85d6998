# SPDX-License-Identifier: Apache-2.0
"""The files of configs/: each makes a state for every variant."""

import collections
import glob
import os
import re

import jax
import pytest
from support import CONFIGS, ROOT

from dcae_jax import config as config_lib
from dcae_jax.models import dcae, dit, sdvae, uvit
from dcae_jax.training import optim
from dcae_jax.training import state as state_lib


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
            name = f"{os.path.basename(path)}:{variant}"
            yield pytest.param(config_lib.validate(config), id=name)


@pytest.mark.parametrize("config", _training_configs())
def test_every_training_config_builds_its_abstract_state(config, one_device):
    """Catches a pattern that matches nothing, or a key that does not fit, in a shipped config."""
    spec = state_lib.train_spec(config, one_device)
    abstract = state_lib.abstract_state(config.sharding, one_device, spec)
    assert abstract.params.keys() == spec.params.keys()
    assert abstract.ema.keys() == spec.trained
    moments = collections.Counter(
        path[-1].key
        for path, leaf in jax.tree.leaves_with_path(abstract.opt_state)
        if leaf.ndim and isinstance(path[-1], jax.tree_util.DictKey)
    )
    matrices = optim.match(config.optimizer.muon, spec.params, "") if config.optimizer.muon else ()
    assert moments == {
        name: 1 if name in matrices and spec.params[name].shape[-2] > 1 else 2
        for name in spec.params
        if name in spec.trained
    }


def test_the_scales_of_guidance_are_the_published_ones():
    """Catches a scale that is not the one beside its FID in docs/diffusion.md (from the paper)."""
    with open(os.path.join(ROOT, "docs", "diffusion.md")) as file:
        rows = re.findall(r"^\| f\d+ \+ (\w+)-(\w+).*\(([\d.]+)\) \|$", file.read(), re.M)
    assert len(rows) == 9
    for name, variant, scale in rows:
        path = os.path.join(CONFIGS, f"{name.lower()}.py")
        assert config_lib.load_file(path, variant.lower()).sample.guidance == float(scale), name


@pytest.mark.parametrize(
    "phase, want",
    [  # the authors' recipe, docs/training.md
        ("phase1", dict(learning_rate=6.4e-5, b1=0.9, b2=0.999, weight_decay=0.1)),
        ("phase2", dict(learning_rate=1.6e-5, b1=0.9, b2=0.999, weight_decay=1e-3)),
        ("phase3", dict(learning_rate=5.4e-5, b1=0.5, b2=0.9, weight_decay=0.0)),
    ],
)
def test_adamw_has_the_published_numbers(phase, want):
    """Catches a default that a phase inherits and the authors do not have."""
    optimizer = config_lib.load_file(os.path.join(CONFIGS, f"{phase}.py")).optimizer
    assert {key: optimizer[key] for key in want} == want
