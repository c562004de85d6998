# SPDX-License-Identifier: Apache-2.0
"""For the tests of diffusion: a narrow autoencoder, latents of it, a narrow UViT on them."""

import os

import jax
import numpy as np
from PIL import Image

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.jobs import encode
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib
from support import CONFIGS, run_job, to_json

CLASSES = 3


def export_autoencoder(folder, change=None, **settings):
    """Exports a narrow tiny model with random weights, after `change(weights)`; -> folder."""
    config = config_lib.default()
    config.model.update({"variant": "tiny", "widths": (8, 8, 16, 32, 32), **settings})
    config.model.latent_channels = 8
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    weights = {k: np.asarray(v) for k, v in state_lib.random_weights(config.model, mesh, 3).items()}
    if change:
        change(weights)
    meta = {"kind": "autoencoder", "model": to_json(config.model)}
    checkpoint_weights.save_export(folder, weights, meta)
    return folder


def write_latents(folder, autoencoder, pictures, weights="ema"):
    """Encodes a dozen pictures of noise, in three classes, at 32 pixels: latents of 2 x 2 x 8."""
    rng = np.random.default_rng(0)
    for i in range(12):
        inner = os.path.join(pictures, f"class{i % CLASSES}")
        os.makedirs(inner, exist_ok=True)
        pixels = (rng.integers(0, 90, (32, 32, 3)) + 60 * (i % CLASSES)).astype(np.uint8)
        Image.fromarray(pixels).save(os.path.join(inner, f"{i:02d}.png"))
    config = config_lib.load_file(os.path.join(CONFIGS, "encode.py"))
    config.init_from, config.resolution, config.weights = autoencoder, 32, weights
    config.data.source, config.data.path = "folder", pictures
    config.encode.batch_size = 8
    assert run_job(encode, config, folder) == encode.DONE
    return folder


def diffusion_config(latents, file="uvit"):
    """A configuration of configs/`file`.py that trains in seconds on `latents`."""
    config = config_lib.load_file(os.path.join(CONFIGS, f"{file}.py"), "tiny")
    config.model.depth, config.model.width, config.model.heads = 2, 16, 2
    config.data.path = latents
    config.batch_size, config.steps = 8, 4
    config.optimizer.warmup_steps, config.optimizer.schedule = 2, "constant"
    config.log_every, config.save_every, config.evaluate_every = 1, 2, 0
    config.sample.count, config.sample.steps, config.sample.batch_size = 3, 4, 8
    return config
