# SPDX-License-Identifier: Apache-2.0
"""A training step on latents: their scale, dropped labels, microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import on_latents

from dcae_jax.diffusion import objectives
from dcae_jax.errors import UserError
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


def test_latents_are_scaled_once_and_labels_are_dropped_by_their_share(
    diffusion_config, latents_folder, one_device, monkeypatch
):
    """Catches a factor that is left out, inverted or applied twice, and labels never dropped."""
    seen = {}

    def loss(objective, model, x0, cond, key, channels):
        jax.debug.callback(lambda x: seen.update(x0=np.asarray(x)), x0)
        return jnp.sum(model(x0, jnp.zeros(x0.shape[0]), cond)), {}

    monkeypatch.setattr(objectives, "loss", loss)
    diffusion_config, source = on_latents(diffusion_config)
    spec = state_lib.train_spec(diffusion_config, one_device)
    values = np.stack([source[i][0][0] for i in range(len(source))])
    batch = {"latent": jnp.asarray(values), "label": jnp.zeros(len(values), jnp.int32)}
    step = jax.jit(step_lib.make_step(diffusion_config, spec))
    jax.block_until_ready(step(state_lib.init_state(diffusion_config, one_device, spec), batch, {}))
    manifest = source.manifest
    want = values.astype(np.float32) * manifest["scaling_factor_multiplies_latent"]
    np.testing.assert_allclose(seen["x0"], want, rtol=1e-6)
    assert 0.8 < np.sqrt(np.mean(seen["x0"] ** 2)) < 1.2
    kept = step_lib.drop_labels(jnp.arange(4000) % 3, jax.random.key(0), 0.1, 3)
    assert 300 < int((kept == 3).sum()) < 500
    again = step_lib.drop_labels(jnp.arange(2000) % 3, jax.random.key(0), 0.1, 3)
    np.testing.assert_array_equal(again, kept[:2000])


def test_microbatches_see_their_own_latents_and_labels(diffusion_config, one_device):
    """Catches accumulation that is refused for latents, or splits labels another way."""
    diffusion_config, source = on_latents(diffusion_config)
    batch = {
        "latent": jnp.asarray(np.stack([source[i][0][0] for i in range(8)])),
        "label": jnp.arange(8, dtype=jnp.int32) % 3,
    }
    found = {}

    def spy(diffusion_config, spec, state, batch, key, draws):
        jax.debug.callback(
            lambda x, y: found.setdefault(int(y[0]), np.asarray(x)), batch["latent"], batch["label"]
        )
        return real(diffusion_config, spec, state, batch, key, draws)

    real, step_lib.denoising_gradients = step_lib.denoising_gradients, spy
    try:
        diffusion_config.accumulate = 2
        spec = state_lib.train_spec(diffusion_config, one_device)
        new, metrics = jax.jit(step_lib.make_step(diffusion_config, spec))(
            state_lib.init_state(diffusion_config, one_device, spec), batch, {}
        )
        jax.block_until_ready(new.params)
    finally:
        step_lib.denoising_gradients = real
    assert int(metrics["finite"]) == 1
    np.testing.assert_array_equal(found[0], batch["latent"][::2])
    np.testing.assert_array_equal(found[1], batch["latent"][1::2])


def test_a_pattern_that_names_one_block_says_so(diffusion_config, one_device):
    """Catches a block that a user freezes by its number and that trains on."""
    diffusion_config = on_latents(diffusion_config)[0]
    diffusion_config.trainable = (r"in_blocks\.0\..*",)
    with pytest.raises(UserError, match="names one block of a stack.*in_blocks"):
        state_lib.train_spec(diffusion_config, one_device)
