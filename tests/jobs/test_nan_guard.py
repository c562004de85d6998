# SPDX-License-Identifier: Apache-2.0
"""Runs that stop being finite: skipped, counted, stopped; weights stay good, the batch is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS, run_job

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.jobs import nan_guard, train
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


def _stopped(config, workdir, before):
    """Runs until Diverged; asserts that checkpoints are finite and the first bad batch is kept."""
    with pytest.raises(nan_guard.Diverged) as stopped:
        run_job(train, config, str(workdir))
    (*_, newest) = checkpoints.saved_steps(str(workdir))
    assert newest >= before
    for which in ("raw", "ema"):
        for name, value in checkpoint_weights.load_weights(str(workdir), which)[0].items():
            assert np.isfinite(value).all(), name
    (kept,) = (workdir / "diverged").glob("*.npz")
    assert str(kept) in str(stopped.value) and kept.with_suffix(".png").exists()
    with np.load(kept) as batch:
        assert batch["image"].shape == (config.batch_size, 32, 32, 3)
    return int(kept.stem.removeprefix("step")), newest


@pytest.mark.slow
def test_an_exploding_gan_stops_with_good_checkpoints(small, alone, tmp_path):
    """Catches infinite weights saved as good, and good ones pushed out by skipped steps."""
    small.loss.gan_weight, small.loss.gan_channels, small.loss.gan_layers = 1.0, 8, 2
    small.loss.gan_warmup_steps = 0
    workdir = tmp_path / "run"
    run_job(train, small, str(workdir))
    small.steps, small.max_skipped, small.save_every, small.keep = 40, 5, 1, 2
    small.optimizer.learning_rate, small.loss.gan_learning_rate = 1e36, 1e36
    small.allow_change = ("optimizer", "loss", "steps")
    first, newest = _stopped(small, workdir, 4)
    assert first == newest + 1


def test_weights_that_overflow_are_a_skipped_step(small, one_device):
    """Catches a finite gradient that carries the weights to infinity."""
    small.optimizer.learning_rate, small.optimizer.warmup_steps = 3e38, 0
    spec = state_lib.train_spec(small, one_device)
    start = state_lib.init_state(small, one_device, spec)
    batch = {"image": jnp.full((4, 32, 32, 3), 9, jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    after, metrics = jax.jit(step_lib.make_step(small, spec))(start, batch, {})
    assert metrics["finite"] == 0 and metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, start.params, after.params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_skipped(one_device, bad):
    """Catches a NaN in a batch that spreads into moments and averages."""
    config = config_lib.load_file(f"{CONFIGS}/uvit.py", "tiny")
    config.model.latent_size, config.model.latent_channels = 4, 8
    config.model.num_classes, config.model.scaling_factor, config.dtype = 3, 1.0, "float32"
    spec = state_lib.train_spec(config, one_device)
    start = state_lib.init_state(config, one_device, spec)
    latent = np.zeros((4, 4, 4, 8), np.float32)
    latent[1, 2, 3, 4] = bad
    batch = {"latent": jnp.asarray(latent), "label": jnp.zeros(4, jnp.int32)}
    after, metrics = jax.jit(step_lib.make_step(config, spec))(start, batch, {})
    assert metrics["skipped"] == 1
    for part in ("params", "ema", "opt_state"):
        same = jax.tree.map(
            np.testing.assert_array_equal, getattr(start, part), getattr(after, part)
        )
        del same


def test_the_first_batch_of_a_row_is_kept_and_one_good_step_forgives(tmp_path):
    """Catches the last batch written instead of the one where it began."""
    guard = nan_guard.NanGuard(str(tmp_path), 3)
    batches = [{"image": np.full((1, 8, 8, 3), i, np.uint8)} for i in range(7)]
    for step, count in enumerate((1, 2, 0, 1, 2)):
        guard.add(step, jnp.float32(count), batches[step])
    with pytest.raises(nan_guard.Diverged, match="step0000003.npz"):
        guard.add(5, jnp.float32(3), batches[5])
        guard.drain()
    with np.load(tmp_path / "diverged" / "step0000003.npz") as kept:
        assert (kept["image"] == 3).all()
