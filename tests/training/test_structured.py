# SPDX-License-Identifier: Apache-2.0
"""Structured latents and equivariance: what a step draws, and what it does with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Loss
from dcae_jax.errors import UserError
from dcae_jax.models import layers
from dcae_jax.models import weights as weights_lib
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.training import latent_draws, losses
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


@pytest.fixture
def cuttable(small):
    """A narrow tiny-1.5 whose step is easy to redo: no decay, no clipping."""
    small.model.variant = "tiny-1.5"
    small.optimizer.update({"weight_decay": 0.0, "clip_norm": 0.0, "eps": 1e-3})
    return small


def _batch(config, seed=0):
    shape = (config.batch_size, config.resolution, config.resolution, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return {"image": jnp.asarray(pixels), "label": jnp.zeros(config.batch_size, jnp.int32)}


def _run(config, mesh, change=lambda s: s):
    """(state before, state after, metrics) of a step."""
    spec = state_lib.train_spec(config, mesh)
    before = change(state_lib.init_state(config, mesh, spec))
    step = jax.jit(step_lib.make_step(config, spec))
    after, metrics = step(before, mesh_lib.put_batch(_batch(config), mesh), {})
    return before, after, {name: float(value) for name, value in metrics.items()}


def _key(number):
    return jax.random.fold_in(jax.random.key(0), number)


def test_each_count_is_drawn_as_often_and_the_last_draw_can_be_all_channels():
    """Catches a choice that never comes up, one draw for all, and a full draw that is not full."""
    drawn = [latent_draws.channel_counts((4, 12, 20), 3, 32, _key(n)) for n in range(200)]
    drawn = np.stack(drawn)
    assert drawn.shape == (200, 3) and np.all(drawn[:, 2] == 32)
    for column in (drawn[:, 0], drawn[:, 1]):
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == [4, 12, 20] and counts.min() > 40
    assert 0.2 < np.mean(drawn[:, 0] == drawn[:, 1]) < 0.5
    again = latent_draws.channel_counts((4, 12, 20), 3, None, _key(7))
    np.testing.assert_array_equal(drawn[7, :2], again[:2])
    assert int(again[2]) in (4, 12, 20)
    assert latent_draws.channel_counts((), 1, None, _key(7)) is None


def test_the_loss_is_the_mean_of_those_with_masked_latents(cuttable, one_device):
    """Catches a mask on the wrong side of the scale, a loss that is a sum, images that are paired
    with another example's reconstruction, and a count that is not logged."""
    cuttable.structured.update({"channels": (8,), "count": 3, "always_full": True})
    cuttable.model.latent_channels = 32
    before, _, metrics = _run(cuttable, one_device)
    spec = state_lib.train_spec(cuttable, one_device)
    model = weights_lib.merge(spec.graphdef, {**before.params, **before.stats})
    images = _batch(cuttable)["image"].astype(jnp.float32) / 127.5 - 1
    z = model.encode(images)
    of = {c: float(losses.l1(model.decode(layers.first_channels(z, c)), images)) for c in (8, 32)}
    assert of[8] != pytest.approx(of[32], rel=1e-3)
    assert metrics["loss"] == pytest.approx((2 * of[8] + of[32]) / 3, rel=1e-4)
    assert metrics["channels"] == pytest.approx(16)


def test_channels_that_are_not_drawn_do_not_move(cuttable, one_device):
    """Catches channels that are masked in the loss but trained all the same."""
    cuttable.structured.channels = (8,)
    before, after, _ = _run(cuttable, one_device)
    for name, axis in (("encoder.project_out.kernel", 3), ("decoder.project_in.kernel", 2)):
        moved = np.asarray(before.params[name]) != np.asarray(after.params[name])
        moved = np.moveaxis(moved, axis, 0).reshape(moved.shape[axis], -1).any(1)
        assert moved[:8].all() and not moved[8:].any()


@pytest.mark.slow
def test_microbatches_and_devices_share_the_draw(cuttable, one_device):
    """Catches a draw of its own in each microbatch, or on each device: another step."""
    cuttable.structured.channels = tuple(range(1, 9))
    _, whole, whole_metrics = _run(cuttable, one_device)
    mesh = mesh_lib.make_mesh(cuttable.mesh, jax.devices()[:4])
    _, many, many_metrics = _run(cuttable, mesh)
    cuttable.accumulate = 2
    _, parts, parts_metrics = _run(cuttable, one_device)
    assert whole_metrics["channels"] == many_metrics["channels"] == parts_metrics["channels"]
    for other, metrics in ((many, many_metrics), (parts, parts_metrics)):
        assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-4)
        for name in whole.params:
            np.testing.assert_allclose(whole.params[name], other.params[name], atol=2e-6)


def test_steps_draw_anew_and_a_resumed_run_draws_the_same(cuttable, one_device):
    """Catches one draw for the whole run, and draws that depend on when the process started."""
    cuttable.structured.channels = tuple(range(1, 9))
    spec = state_lib.train_spec(cuttable, one_device)
    step = jax.jit(step_lib.make_step(cuttable, spec))
    state = state_lib.init_state(cuttable, one_device, spec)
    drawn = []
    for number in (0, 1, 2, 3, 4, 5, 2):
        state = dataclasses.replace(state, step=jnp.int32(number))
        drawn.append(int(step(state, _batch(cuttable), {})[1]["channels"]))
    assert len(set(drawn[:-1])) > 2 and drawn[-1] == drawn[2]


# --- equivariance ---------------------------------------------------------------------------------


class _Pool:
    """Its encoder commutes with turns; its decoder does not where it is `tilted`."""

    def __init__(self, tilted=False):
        self.tilted = tilted

    def encode(self, x):
        return x.reshape(len(x), x.shape[1] // 2, 2, -1, 2, 3).mean((2, 4))

    def decode(self, z):
        z = z * jnp.linspace(0, 1, z.shape[2])[:, None] if self.tilted else z
        return jnp.repeat(jnp.repeat(z, 2, 1), 2, 2)

    def __call__(self, x):
        return self.decode(self.encode(x))


@pytest.mark.parametrize("turn", range(4))
def test_an_encoder_that_commutes_with_turns_has_the_plain_loss_of_the_turned_image(turn):
    """Catches images that are turned the other way, or not at all; latents likewise."""
    ramp = np.linspace(-1, 0.2, 64).reshape(8, 8, 1) ** 3 + np.zeros(3)
    images = jnp.asarray(np.stack([ramp, ramp[::-1] * 0.5]), jnp.float32)
    draws = latent_draws.LatentDraws(turn=jnp.int32(turn))
    turned = jnp.stack([jnp.asarray(np.rot90(image, turn)) for image in np.asarray(images)])
    for model in (_Pool(), _Pool(tilted=True)):
        z, target = latent_draws.latents(model.encode, images, draws, 1.0)
        found = float(losses.l1(model.decode(z), target))
        assert found == pytest.approx(float(losses.l1(model(turned), turned)), rel=1e-5)
        plain = float(losses.l1(model(images), images))
        assert (abs(found - plain) > 1e-3) == bool(model.tilted and turn)


def test_images_and_latents_shrink_alike():
    """Catches a target that keeps its size, and a resize that shifts by a pixel."""
    ramp = jnp.linspace(-1, 1, 16)[None, None, :, None] * jnp.ones((1, 16, 16, 3))
    draws = latent_draws.LatentDraws(turn=jnp.int32(0))
    z, target = latent_draws.latents(_Pool().encode, ramp, draws, 0.5)
    output = _Pool().decode(z)
    assert output.shape == target.shape == (1, 8, 8, 3)
    # The border, where the filter is cut off, apart.
    want = np.asarray(ramp).reshape(1, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(target[:, 2:-2, 2:-2], want[:, 2:-2, 2:-2], atol=1e-5)


def test_transformed_steps_come_up_by_their_probability():
    """Catches a probability that is ignored, a scale or a turn that is never drawn."""
    draws = [latent_draws.transform(0.5, 2, _key(number)) for number in range(300)]
    values, counts = np.unique([int(scale) for scale, _ in draws], return_counts=True)
    assert values.tolist() == [0, 1, 2]
    assert 110 < counts[0] < 190 and counts[1:].min() > 45
    turns = np.bincount([int(turn) for _, turn in draws])
    assert len(turns) == 4 and turns.min() > 45
    assert min(int(latent_draws.transform(1.0, 2, _key(n))[0]) for n in range(50)) == 1


@pytest.mark.slow
def test_a_step_with_equivariance_is_the_plain_one_until_it_draws_a_transform(cuttable, one_device):
    """Catches another loss, other gradients or other statistics in the branch without one."""
    cuttable.model.variant = "tiny"  # with BatchNorm
    _, plain, plain_metrics = _run(cuttable, one_device)
    cuttable.loss.equivariance = 1e-9
    _, same, metrics = _run(cuttable, one_device)
    assert metrics["transformed"] == 0
    assert metrics["loss"] == pytest.approx(plain_metrics["loss"], rel=1e-5)
    for name in {**plain.params, **plain.stats}:
        values = [np.asarray({**s.params, **s.stats}[name]) for s in (plain, same)]
        np.testing.assert_allclose(*values, atol=2e-6)
    cuttable.loss.equivariance = 1.0
    _, other, metrics = _run(cuttable, one_device)
    assert metrics["transformed"] == 1 and metrics["finite"] == 1
    assert metrics["loss"] != pytest.approx(plain_metrics["loss"], rel=1e-3)


def test_only_scales_that_leave_whole_latents_are_used():
    """Catches a scale that leaves half a latent, and sizes below one latent."""
    loss = Loss(equivariance=0.5, equivariance_scales=(0.25, 0.3, 0.5, 0.75))
    assert latent_draws.scales(loss, 256, 32) == (0.25, 0.5, 0.75)
    assert latent_draws.scales(loss, 64, 32) == (0.5,)
    assert latent_draws.scales(loss, 32, 32) == ()
    assert latent_draws.scales(Loss(equivariance_scales=()), 32, 32) == (1.0,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"structured": {"channels": (8,)}}, "structured.channels=8 needs .*latent shortcut"),
        ({"structured": {"count": 2}}, "structured.count=2 needs structured.channels"),
        (
            {"structured": {"channels": (8,), "always_full": True}},
            "always_full=True leaves no draw with structured.count=1",
        ),
        ({"augment": {"channels": (8,)}}, "augment.channels=.* is for diffusion models"),
        ({"evaluate": {"channels": (8,)}}, "evaluate.channels=8 needs"),
        (
            {"loss": {"equivariance": 0.5, "equivariance_scales": (0.3,)}},
            "equivariance_scales=.0.3,.: none of them leaves a multiple of f=16 of 32 pixels",
        ),
        (
            {"model": {"variant": "tiny-1.5"}, "structured": {"channels": (33,)}},
            r"structured.channels=33 is not in \[1, 8\]",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_in_one_line(
    small, one_device, change, message
):
    """Catches a run that trains on something else than its configuration says."""
    for section, values in change.items():
        small[section].update(values)
    with pytest.raises(UserError, match=message):
        resolve.check_training(config_lib.validate(small), one_device)
