# SPDX-License-Identifier: Apache-2.0
"""One training step: what it changes, and what it must leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_gan
from support import phase3_golden

from dcae_jax import config as config_lib
from dcae_jax.models import lpips as lpips_lib
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


def _batch(config, seed=0):
    shape = (config.batch_size, config.resolution, config.resolution, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return {"image": jnp.asarray(pixels), "label": jnp.zeros(config.batch_size, jnp.int32)}


def _run(config, mesh, batches, lpips=None, change=lambda s: s):
    """(state before, state after, metrics of each step)."""
    spec = state_lib.train_spec(config, mesh)
    step = jax.jit(step_lib.make_step(config, spec))
    before = now = change(state_lib.init_state(config, mesh, spec))
    metrics = []
    for batch in batches:
        now, values = step(now, mesh_lib.put_batch(batch, mesh), lpips or {})
        metrics.append({k: float(v) for k, v in values.items()})
    return before, now, metrics


def _later(state):
    """The state before step 8, after three skipped steps, two of them just before."""
    return dataclasses.replace(
        state, step=state.step + 7, skipped=state.skipped + 3, skipped_in_row=state.skipped + 2
    )


def _moved(before, after):
    return {k for k in before if np.any(np.asarray(before[k]) != np.asarray(after[k]))}


def test_a_step_moves_everything_and_reduces_the_loss(small, one_device):
    """Catches a parameter without gradient, and an update with the wrong sign."""
    before, after, metrics = _run(small, one_device, [_batch(small)] * 4)
    assert _moved(before.params, after.params) == before.params.keys()
    assert _moved(before.stats, after.stats) == before.stats.keys()
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert int(after.step) == 4 and int(after.skipped) == 0


def test_averages_follow_the_published_formula(small, one_device):
    """Catches decay at full strength from the first step, or averages of parameters alone."""
    small.ema_decay, small.ema_warmup = 0.9, 3
    before, after, _ = _run(small, one_device, [_batch(small)], change=_later)
    decay = 0.9 * (1 - np.exp(-5 / 3))  # the fifth step that is applied
    for name, old in {**before.params, **before.stats}.items():
        new = {**after.params, **after.stats}[name]
        want = np.asarray(old) + (1 - decay) * (np.asarray(new) - np.asarray(old))
        np.testing.assert_allclose(after.ema[name], want, atol=1e-6)


def test_frozen_parts_are_bit_identical_statistics_too(small, one_device):
    """Catches BatchNorm that drifts in a frozen decoder, and averages of frozen weights."""
    small.trainable = (r"encoder\..*",)
    before, after, _ = _run(small, one_device, [_batch(small)] * 2)
    assert _moved(before.params, after.params) == {
        name for name in before.params if name.startswith("encoder.")
    }
    assert not _moved(before.stats, after.stats)
    frozen = {name for name in {**before.params, **before.stats} if name[:8] != "encoder."}
    assert after.ema.keys() == {**before.params, **before.stats}.keys() - frozen


def test_a_step_that_is_not_finite_changes_only_the_counters(small, one_device):
    """Catches NaN that reaches moments, averages or statistics while parameters are saved."""

    def poison(s):
        name = "decoder.project_in.bias"
        broken = jnp.full_like(s.params[name], jnp.inf)
        return dataclasses.replace(s, params={**s.params, name: broken})

    before, after, metrics = _run(small, one_device, [_batch(small)] * 2, change=poison)
    for field in ("params", "stats", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
    assert [m["finite"] for m in metrics] == [0, 0]
    assert int(after.skipped) == int(after.skipped_in_row) == 2 and int(after.step) == 2


def test_microbatches_add_up_to_the_batch(small, one_device):
    """Catches gradients summed instead of averaged, or images lost in the split."""
    small.trainable = (r"encoder\..*",)  # BatchNorm would see other batches
    small.optimizer.eps = 1e-3  # or Adam's first step shows only the gradient's sign
    _, whole, whole_metrics = _run(small, one_device, [_batch(small)])
    small.accumulate = 2
    _, parts, parts_metrics = _run(small, one_device, [_batch(small)])
    for name in whole.params:
        np.testing.assert_allclose(whole.params[name], parts.params[name], atol=1e-6)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(whole_metrics[0][key], parts_metrics[0][key], rtol=1e-4)


@pytest.mark.parametrize(
    "axes", [pytest.param({"data": 4}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2}]
)
def test_several_devices_do_what_one_does(small, one_device, axes):
    """Catches statistics, losses or norms taken over one device's share of the batch."""
    sizes = config_lib.default().mesh
    sizes.update(axes)
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:4])
    batches = [_batch(small, seed) for seed in range(2)]
    _, one, one_metrics = _run(small, one_device, batches)
    _, many, many_metrics = _run(small, mesh, batches)
    for name in one.stats:
        np.testing.assert_allclose(one.stats[name], many.stats[name], rtol=1e-3, atol=1e-5)
    for a, b in zip(one_metrics, many_metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)


@pytest.mark.slow
def test_lpips_is_part_of_the_loss_when_its_weights_are_there(small, one_device):
    """Catches a perceptual loss that is computed and never added, or has no gradient."""
    small.loss.lpips_weight = 0.5
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(np.abs(rng.normal(size=shape)) * 0.05, jnp.float32)
        for name, shape in lpips_lib.shapes("vgg").items()
    }
    _, with_lpips, metrics = _run(small, one_device, [_batch(small)], weights)
    small.loss.lpips_weight = 0.0
    _, without, _ = _run(small, one_device, [_batch(small)])
    assert metrics[0]["lpips"] > 0
    total = metrics[0]["l1"] + 0.5 * metrics[0]["lpips"]
    np.testing.assert_allclose(metrics[0]["loss"], total, rtol=1e-5)
    assert _moved(with_lpips.params, without.params)


def test_the_abstract_state_is_the_real_one(small, one_device):
    """Catches a planner, or a restore, that describes another state than training has."""
    spec = state_lib.train_spec(small, one_device)
    abstract = state_lib.abstract_state(small.sharding, one_device, spec)
    real = state_lib.init_state(small, one_device, spec)
    out, _ = jax.eval_shape(step_lib.make_step(small, spec), real, _batch(small), {})

    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)

    jax.tree.map(same, abstract, real)
    jax.tree.map(same, abstract, out)


@pytest.mark.slow
def test_blocks_that_are_computed_again_give_the_same_step(small, one_device):
    """Catches `remat` that nobody reads, and BatchNorm's statistics lost inside it."""
    batch = _batch(small)
    found = {}
    for small.remat in ("none", "blocks"):
        spec = state_lib.train_spec(small, one_device)
        start = state_lib.init_state(small, one_device, spec)
        text = str(jax.make_jaxpr(step_lib.make_step(small, spec))(start, batch, {}))
        assert ("remat" in text) == (small.remat == "blocks")
        _, after, metrics = _run(small, one_device, [batch])
        found[small.remat] = after, metrics[0]
    (plain, values), (again, same) = found.values()
    assert same["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-4)
    for name, value in plain.stats.items():
        np.testing.assert_allclose(again.stats[name], value, rtol=1e-4, atol=1e-6)


# --- phase 3 --------------------------------------------------------------------------------------


def _equals_pytorch(found, want):
    """Every number of a step of phase 3 agrees with PyTorch's."""
    settings = make_gan.STEP
    for name, value in want["metrics"].items():
        np.testing.assert_allclose(found["metrics"][name], value, rtol=2e-4, err_msg=name)
    # The optimizer sees the clipped gradient of the model, and all of the discriminator's.
    assert want["metrics"]["grad_norm"] > 1.5 * settings["clip_norm"]
    clip = settings["clip_norm"] / want["metrics"]["grad_norm"]
    depth = make_gan.DISCRIMINATOR[1]
    wanted = {
        "gradients": phase3_golden.autoencoder_parts(want["gradients"]),
        "trained": phase3_golden.autoencoder_parts(want["trained"]),
        "discriminator_gradients": phase3_golden.discriminator_parts(
            want["discriminator_gradients"], depth
        ),
        "discriminator": phase3_golden.discriminator_parts(want["discriminator"], depth),
    }
    scale = {"gradients": clip}
    for part, values in wanted.items():
        assert found[part].keys() == values.keys()
        for name, value in values.items():
            value = value * scale.get(part, 1)
            # A thousandth of a step of the optimizer, or of the largest gradient.
            atol = 1e-3 * (np.abs(value).max() if "gradients" in part else 1e-2)
            np.testing.assert_allclose(found[part][name], value, atol=atol, err_msg=name)
    assert all(found["frozen"].values()) and found["frozen"]
    assert found["warming"]["gan_weight"] == 0
    total = sum(settings[f"{name}_weight"] * found["warming"][name] for name in ("l1", "lpips"))
    np.testing.assert_allclose(found["warming"]["loss"], total, rtol=1e-6)


def test_a_step_of_phase_3_equals_pytorchs(one_device):
    """Catches a slip anywhere in phase 3: a loss, its weight, the adaptive weight, clipping, decay
    of biases or of the discriminator, the discriminator's side trained on the new weights, Adam's
    settings, statistics of the trained BatchNorm, and anything frozen that moves."""
    _equals_pytorch(phase3_golden.run(0, one_device), phase3_golden.golden())


def test_the_discriminators_metrics_by_hand():
    """Catches logits of 0, which are at chance, counted as right, and sums for means."""
    real, fake = (jnp.asarray(v).reshape(4, 1, 1, 1) for v in ([2.0, 0, 0, -1], [0.0, -3, 1, 1]))
    loss, metrics = step_lib.discriminator_loss({}, lambda _, x: x[..., 0], real, fake)
    assert (
        float(loss) == float(metrics["gan_d_loss"]) == 0.5 * ((0 + 1 + 1 + 2) + (1 + 0 + 2 + 2)) / 4
    )
    assert (float(metrics["logits_real"]), float(metrics["logits_fake"])) == (0.25, -0.25)
    assert float(metrics["gan_accuracy"]) == 0.5 * (1 + 1) / 4


@pytest.mark.torch
def test_a_step_of_phase_3_equals_pytorchs_live(one_device):
    """Catches a golden that fits one set of weights by chance."""
    pytest.importorskip("diffusers")
    want = phase3_golden.parts(make_gan.step(seed=1))
    _equals_pytorch(phase3_golden.run(1, one_device), want)


def test_the_logged_learning_rate_is_that_of_applied_steps(small, one_device):
    """Catches a curve that runs ahead of the optimizer's own count after skipped steps."""
    small.optimizer.learning_rate, small.optimizer.warmup_steps = 1.0, 10
    small.optimizer.warmup_from = 0.1
    _, after, metrics = _run(small, one_device, [_batch(small)], change=_later)
    assert metrics[0]["learning_rate"] == pytest.approx(0.1 + 0.9 * 4 / 10)
    # A finite step ends the row of skipped ones.
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (8, 3, 0)
    assert metrics[0]["skipped"] == 3 and metrics[0]["skipped_in_row"] == 0
