# SPDX-License-Identifier: Apache-2.0
"""Phases 2 and 3: frozen means bit-identical and cheap, and the GAN trains what it should."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS, run_job

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.data import pipeline
from dcae_jax.errors import UserError
from dcae_jax.jobs import metric_writer, train
from dcae_jax.models import dcae, sdvae
from dcae_jax.models.weights import merge
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


def _phase(number, small, variant="tiny"):
    """The shipped config of a phase, in the size of the fixture `small`."""
    config = config_lib.load_file(os.path.join(CONFIGS, f"phase{number}.py"), "tiny")
    config.model.update(small.model)
    config.model.variant = variant
    for key in ("batch_size", "save_every", "log_every"):
        config[key] = small[key]
    config.evaluate.update(small.evaluate)
    config.resolution, config.resolutions = 32, ()
    config.loss.gan_channels, config.loss.gan_warmup_steps = 8, 1
    config.optimizer.warmup_steps = 0
    config.steps = 3
    return config


def _f64(config):
    """The layout of f64 (seven stages, depth 0 first), narrow."""
    config.model.variant = "f64c128"
    config.model.latent_channels = 16
    config.model.widths = (8, 8, 16, 32, 32, 32, 32)
    config.model.encoder_depths = config.model.decoder_depths = (0, 1, 1, 1, 1, 1, 1)
    config.resolution, config.batch_size = 64, 2
    return config


def _steps(config, mesh, count):
    """States before and after `count` steps on random pictures."""
    spec = state_lib.train_spec(config, mesh)
    step = jax.jit(step_lib.make_step(config, spec))
    before = after = state_lib.init_state(config, mesh, spec)
    shape = (config.batch_size, config.resolution, config.resolution, 3)
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        batch = {"image": pixels, "label": np.zeros(config.batch_size, np.int32)}
        after, metrics = step(after, mesh_lib.put_batch(batch, mesh), {})
    return spec, before, after, {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("layout", ["tiny", "f64"])
def test_what_a_phase_freezes_stays_bit_identical_and_the_rest_moves(
    number, layout, small, one_device
):
    """Catches a frozen part that drifts (updates, decay, running statistics, averages), and a
    trained one that is stuck."""
    config = _phase(number, small)
    config = _f64(config) if layout == "f64" else config
    spec, before, after, _ = _steps(config, one_device, 3)
    for field in ("params", "stats"):
        old, new = getattr(before, field), getattr(after, field)
        moved = {name for name in old if np.any(np.asarray(old[name]) != np.asarray(new[name]))}
        assert moved == {name for name in old if name in spec.trained}
    assert after.ema.keys() == spec.trained
    # What evaluation and export read, outside of the trained part, is init_from to the bit.
    averaged = state_lib.averaged(after)
    for name, old in {**before.params, **before.stats}.items():
        if name not in spec.trained:
            np.testing.assert_array_equal(averaged[name], old)
    if number == 3:
        x = jnp.asarray(np.random.default_rng(9).uniform(-1, 1, (1, 64, 64, 3)), jnp.float32)
        encode = jax.jit(lambda w: merge(spec.graphdef, w).encode(x))
        old_latents = encode({**before.params, **before.stats})
        np.testing.assert_array_equal(old_latents, encode(averaged))


@pytest.mark.parametrize("variant", [*dcae.VARIANTS, *sdvae.VARIANTS])
def test_the_default_patterns_fit_every_variant(variant, one_device):
    """Catches 'last stage' patterns that name an empty stage, or another model's."""
    for number, shares in ((2, (0.02, 0.75)), (3, (1e-6, 0.1))):
        config = config_lib.load_file(os.path.join(CONFIGS, f"phase{number}.py"), variant)
        spec = state_lib.train_spec(config, one_device)
        trained = [name for name in spec.params if name in spec.trained]
        sizes = [sum(spec.params[n].size for n in names) for names in (trained, spec.params)]
        low, high = shares
        assert low < sizes[0] / sizes[1] < high
        if number == 3:
            assert all(name.startswith("decoder.") for name in trained)
            assert spec.last_layer in trained


def _cost(config, mesh):
    """(FLOPs, bytes of temporaries) of the compiled step."""
    spec = state_lib.train_spec(config, mesh)
    step = jax.jit(step_lib.make_step(config, spec), donate_argnums=0)
    abstract = state_lib.abstract_state(config.sharding, mesh, spec)
    batch = run_lib.abstract_batch(config, config.resolution, mesh)
    compiled = step.lower(abstract, batch, {}).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def _f32(number, one_device, depths):
    config = config_lib.load_file(os.path.join(CONFIGS, f"phase{number}.py"), "f32c32")
    config.model.widths = (16, 32, 64, 64, 128, 128)
    config.model.encoder_depths, config.model.decoder_depths = depths
    config.loss.lpips_weight = config.loss.gan_weight = 0.0
    config.batch_size = 2
    config.resolution, config.resolutions = 128, ()
    assert config.optimizer.clip_norm > 0
    return _cost(config, one_device)


@pytest.mark.parametrize(
    "depths",
    [
        pytest.param(((0, 1, 2, 1, 1, 1), (0, 1, 2, 1, 1, 1)), id="shallow"),
        pytest.param(((), ()), id="full"),
    ],
)
@pytest.mark.slow
def test_phases_2_and_3_compute_and_keep_less_than_a_full_step(one_device, depths):
    """Catches a backward pass that frozen layers still pay for: clipping or a finite check over
    all gradients brings it back."""
    full, middle, head = (_f32(number, one_device, depths) for number in (1, 2, 3))
    assert middle[0] <= 0.6 * full[0] and middle[1] <= 0.5 * full[1], (full, middle)
    assert head[0] < middle[0] and head[1] < middle[1], (middle, head)


def _checkpoint(config, mesh, workdir, step):
    """Everything that the checkpoint of `step` holds: {path: array or number}."""
    spec = state_lib.train_spec(config, mesh)
    abstract = state_lib.abstract_state(config.sharding, mesh, spec)
    batch = run_lib.abstract_batch(config, 32, mesh)
    _, metrics = jax.eval_shape(step_lib.make_step(config, spec), abstract, batch, {})
    shapes = jax.eval_shape(lambda: metric_writer.empty_means(metrics))
    manager = checkpoints.open_manager(workdir, config.keep)
    everything = checkpoints.restore(manager, step, abstract, shapes)
    manager.close()
    return {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(everything)}


@pytest.mark.slow
def test_a_run_of_phase_3_resumes_bit_equal(small, alone, one_device, tmp_path):
    """Catches a checkpoint without the discriminator, one of the two optimizers, or the draw of
    resolutions, and a warm-up of the GAN or of the rate that starts again."""
    first = str(tmp_path / "phase1")
    small.steps = 2
    run_job(train, small, first)
    config = _phase(3, small)
    config.init_from, config.resolutions = first, (32, 48)
    config.steps, config.save_every = 6, 3
    # Both end after the step at which the run is taken up again.
    config.loss.gan_warmup_steps, config.optimizer.warmup_steps = 4, 5
    draws = [pipeline.resolution_at(config.seed, (32, 48), step) for step in range(6)]
    assert {*draws[3:]} == {32, 48} and draws[3:] != draws[:3]
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    run_job(train, config, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(os.path.join(resumed, "checkpoints", "6"))
    run_job(train, config, resumed)
    a, b = (_checkpoint(config, one_device, path, 6) for path in (whole, resumed))
    assert a.keys() == b.keys() and any("discriminator.opt_state" in name for name in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in files.read_rows(path)]
        for path in (whole, resumed)
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(7))
    assert {"logits_real", "logits_fake", "gan_accuracy", "gan_weight"} <= rows[0][-1].keys()
    weights = [row["gan_weight"] for row in rows[0][1:]]
    assert weights[:4] == [0] * 4 and min(weights[4:]) > 0  # warmed up first
    source, now = (checkpoint_weights.load_weights(path)[0] for path in (first, resumed))
    for name in source:
        if name.startswith("encoder."):
            np.testing.assert_array_equal(now[name], source[name])


@pytest.mark.slow
def test_weights_of_another_variant_are_refused_by_name(small, alone, tmp_path):
    """Catches a phase that starts from half-fitting weights, or fails without saying why."""
    first = str(tmp_path / "phase1")
    small.steps = 1
    run_job(train, small, first)
    config = config_lib.load_file(os.path.join(CONFIGS, "phase2.py"), "f32c32")
    config.init_from, config.loss.lpips_weight = first, 0.0
    with pytest.raises(UserError, match="variant tiny, but this run's is f32c32; .*:tiny"):
        run_job(train, config, str(tmp_path / "phase2"))


def test_resolutions_are_drawn_from_seed_and_step():
    """Catches a draw that hosts disagree on, or that ignores how often a size is listed."""
    draws = [pipeline.resolution_at(3, (64, 128, 128), step) for step in range(600)]
    assert draws == [pipeline.resolution_at(3, (64, 128, 128), step) for step in range(600)]
    assert 0.25 < draws.count(64) / 600 < 0.42 and set(draws) == {64, 128}
    assert draws != [pipeline.resolution_at(4, (64, 128, 128), step) for step in range(600)]


def test_the_discriminator_learns_to_tell_blurred_from_sharp(small, one_device):
    """Catches a discriminator that is never updated, or whose gradients have the wrong sign."""
    config = _phase(3, small)
    config.loss.gan_learning_rate, config.loss.gan_warmup_steps = 2e-3, 1000
    _, before, after, metrics = _steps(config, one_device, 25)
    assert metrics["logits_real"] > metrics["logits_fake"] and metrics["gan_accuracy"] > 0.7
    assert any(
        np.any(np.asarray(before.discriminator.params[k]) != np.asarray(leaf))
        for k, leaf in after.discriminator.params.items()
    )
