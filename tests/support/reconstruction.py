# SPDX-License-Identifier: Apache-2.0
"""The evaluation of an autoencoder with random weights."""

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.data import sources
from dcae_jax.evaluation import networks, reconstruction
from dcae_jax.jobs import evaluate
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib


def evaluate_random(config, devices=1, source=None):
    """reconstruction.evaluate with random weights on the first devices -> the Result at 32 px."""
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
    config = evaluate.resolve(config_lib.validate(config))
    model = autoencoder_lib.build_autoencoder(config.model, model_weights(config).items(), mesh)
    source = source or sources.evaluation_source(config.data)
    metric_networks = networks.load_networks(config.evaluate, mesh)
    return reconstruction.evaluate(
        config.evaluate, config.data, model.graphdef, model.weights, mesh, source, metric_networks
    )["32"]


def model_weights(config):
    """Random weights by path, NumPy."""
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    return {k: np.asarray(v) for k, v in state_lib.random_weights(config.model, mesh, 5).items()}
