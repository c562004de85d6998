# SPDX-License-Identifier: Apache-2.0
"""What the patterns in the shipped configurations match, against the first edition's numbers."""

import hashlib
import json
import math
import os
import re

import pytest
from support import CONFIGS

from dcae_jax import config as config_lib
from dcae_jax.models import weights as weights_lib
from dcae_jax.training import optim
from dcae_jax.training import state as state_lib

# {file of configs/:variant: {key: [arrays, values] that its patterns match}}, of commit e9d9a46;
# under "sharding" one such pair for each (pattern, rule), first match; under "paths" a digest.
with open(os.path.join(os.path.dirname(__file__), "..", "support", "patterns.json")) as file:
    RECORDED = json.load(file)
RENAMED = {  # docs/paths.md
    "label_emb.embedding": "label_emb.table",
    "y_embedder.embedding": "y_embedder.table",
}


@pytest.mark.parametrize("name", RECORDED)
def test_shipped_patterns_match_what_they_did(name, one_device):
    """Catches a renamed layer that is frozen, decayed or split as it was not before."""
    file, variant = name.split(":")
    config = config_lib.load_file(os.path.join(CONFIGS, f"{file}.py"), variant)
    if config.objective:
        sizes = {"latent_size": 8, "latent_channels": 32, "num_classes": 10}
        config.model.update(sizes)
    config = config_lib.validate(config)
    model = state_lib.abstract_model(config.model, one_device, config)
    _, params, stats = weights_lib.split(model)
    paths = sorted(RENAMED.get(path, path) for path in (*params, *stats))
    patterns = config.trainable
    if not config.objective:
        arch = state_lib.architecture(config.model)
        patterns = [state_lib.fill_pattern(pattern, arch) for pattern in patterns]

    def count(names):
        return [len(names), sum(math.prod(params[name].shape) for name in names)]

    left, split = set(params), []
    for pattern, _ in config.sharding:
        hits = {path for path in left if re.fullmatch(pattern, path)}
        left -= hits
        split.append(count(hits))
    assert {
        "all": count(params),
        "trainable": count(optim.match(patterns, params, "trainable")),
        "decay": count(optim.match(config.optimizer.decay, params, "optimizer.decay")),
        "sharding": split,
        "paths": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16],
    } == RECORDED[name]
