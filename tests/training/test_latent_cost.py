# SPDX-License-Identifier: Apache-2.0
"""What deep compression is for: a training step on few tokens costs a fraction."""

import os

import jax
from support import CONFIGS
from support.transformer_costs import uvit_macs

from dcae_jax import config as config_lib
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step


def planned(autoencoder, patch_size):
    """UViT-S at 512 pixels on latents of `autoencoder`, blocks one by one."""
    config = config_lib.load_file(os.path.join(CONFIGS, "uvit.py"), "s")
    config.autoencoder, config.patch_size, config.resolution = autoencoder, patch_size, 512
    config.unroll = True  # XLA counts a loop's body once
    return resolve.on_variant(config_lib.validate(config))


def step_flops(config, mesh):
    spec = state_lib.train_spec(config, mesh)
    abstract = state_lib.abstract_state(config.sharding, mesh, spec)
    batch = run_lib.abstract_batch(config, config.model.latent_size, mesh)
    return jax.jit(step.make_step(config, spec)).lower(abstract, batch, {}).cost_analysis()["flops"]


def test_a_training_step_on_f64_latents_needs_a_fourteenth_of_that_on_f8(one_device):
    """Catches positions that are not saved: patches ignored, padding, work beside the blocks."""
    wide, narrow = planned("sd-vae-f8", 2), planned("f64c128", 1)
    sizes = [(c.model.latent_size, c.model.latent_channels) for c in (wide, narrow)]
    assert sizes == [(64, 4), (8, 128)]
    macs = [uvit_macs(state_lib.architecture(config.model, config)) for config in (wide, narrow)]
    assert round(macs[0] / macs[1], 1) == 19.9
    flops = [step_flops(config, one_device) for config in (wide, narrow)]
    assert flops[0] / flops[1] >= 14
    # Forward and twice that backward: nothing is counted once that is done in a loop.
    for config, flop, mac in zip((wide, narrow), flops, macs, strict=True):
        assert 0.95 < flop / (6 * mac * config.batch_size) < 1.25
