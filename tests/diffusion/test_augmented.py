# SPDX-License-Identifier: Apache-2.0
"""Augmented diffusion training: the loss on the first channels, against sliced weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import on_latents, small_models

from dcae_jax.config.schema import MeanFlow
from dcae_jax.diffusion import meanflow, objectives
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib

B, SIDE, C, P, WIDTH = 4, 4, 6, 2, 16


def _weights(outputs):
    """Of a network of patches: a kernel [p, p, c, width] in, another [width, p, p, outputs] out."""
    rng = np.random.default_rng(0)
    into = rng.standard_normal((P, P, C, WIDTH)) / np.sqrt(P * P * C)
    out = rng.standard_normal((WIDTH, P, P, outputs)) / 4
    return {"into": jnp.asarray(into, jnp.float32), "out": jnp.asarray(out, jnp.float32)}


def _network(weights):
    def model(x, time, cond):
        b, side, _, c = x.shape
        patches = x.reshape(b, side // P, P, side // P, P, c)
        hidden = jnp.einsum("byuxvc,uvcd->byxd", patches, weights["into"])
        hidden = jnp.tanh(hidden + 1e-3 * time[:, None, None, None] + cond[:, None, None, None])
        out = jnp.einsum("byxd,duvo->byuxvo", hidden, weights["out"])
        return out.reshape(b, side, side, -1)

    return model


def _sliced(weights, c, halves):
    """The network that has only c channels."""
    out = weights["out"].reshape(WIDTH, P, P, halves, -1)[..., :c]
    return {"into": weights["into"][:, :, :c], "out": out.reshape(WIDTH, P, P, -1)}


@pytest.mark.parametrize("name", ["epsilon", "learned_sigma", "flow"])
def test_the_loss_is_that_of_the_network_with_sliced_weights(name, monkeypatch):
    """Catches a mean over all channels, a mask on one half of a learned sigma, noise in channels
    that are not there, and channels sliced as rows of a patch."""
    halves = 2 if name == "learned_sigma" else 1
    weights = _weights(halves * C)
    rng = np.random.default_rng(1)
    x0 = jnp.asarray(rng.standard_normal((B, SIDE, SIDE, C)), jnp.float32)
    noise = jnp.asarray(rng.standard_normal(x0.shape), jnp.float32)
    cond = jnp.arange(B) * 0.1
    times = {"flow": jnp.linspace(0.1, 0.9, B)}.get(name, jnp.array([0, 7, 400, 999]))
    monkeypatch.setattr(
        objectives, "_draws", lambda key, x, draw: (times, noise[..., : x.shape[3]])
    )
    key = jax.random.key(0)

    def ours(weights, channels):
        return objectives.loss(name, _network(weights), x0, cond, key, channels)[0]

    counts = [1, 2, 5, 6]
    want = []
    for c in counts:
        network = _network(_sliced(weights, c, halves))
        want.append(float(objectives.loss(name, network, x0[..., :c], cond, key)[0]))
        assert float(ours(weights, jnp.full(B, c))) == pytest.approx(want[-1], rel=1e-5)
    # Different numbers in one batch: the mean of the examples' own losses.
    each = []
    for i, c in enumerate(counts):
        network, one = _network(_sliced(weights, c, halves)), slice(i, i + 1)
        monkeypatch.setattr(
            objectives, "_draws", lambda k, x, d, one=one, c=c: (times[one], noise[one, ..., :c])
        )
        each.append(objectives.loss(name, network, x0[one, ..., :c], cond[one], key)[0])
    monkeypatch.setattr(objectives, "_draws", lambda key, x, draw: (times, noise))
    mixed = float(ours(weights, jnp.array(counts)))
    assert mixed == pytest.approx(float(np.mean(each)), rel=1e-5)
    plain = float(objectives.loss(name, _network(weights), x0, cond, key)[0])
    assert float(ours(weights, jnp.full(B, C))) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("name", ["epsilon", "learned_sigma", "flow"])
def test_output_channels_that_no_draw_keeps_have_no_gradient(name):
    """Catches a prediction that counts although its channel is not there."""
    halves = 2 if name == "learned_sigma" else 1
    weights = _weights(halves * C)
    x0 = jnp.asarray(np.random.default_rng(1).standard_normal((B, SIDE, SIDE, C)), jnp.float32)

    def loss(weights):
        counts = jnp.array([2, 3, 1, 3])
        key = jax.random.key(2)
        return objectives.loss(name, _network(weights), x0, jnp.zeros(B), key, counts)[0]

    grads = jax.grad(loss)(weights)
    out = np.asarray(grads["out"]).reshape(WIDTH, P, P, halves, C)
    assert np.all(out[..., 3:] == 0) and np.all(np.abs(out[..., :3]).max((0, 1, 2)) > 0)
    into = np.asarray(grads["into"])
    assert np.all(into[:, :, 3:] == 0) and np.all(np.abs(into[:, :, :3]).max((0, 1, 3)) > 0)


def _average(weights):
    """The network as an average velocity: it takes an interval too."""
    network = _network(weights)
    return lambda x, s, labels, h: network(x, s + 300 * h, 0.1 * labels)


@pytest.mark.parametrize("equal", [0.0, 1.0])
@pytest.mark.parametrize("target", ["u", "v"])
def test_an_average_velocity_is_that_of_the_network_with_sliced_weights(equal, target, monkeypatch):
    """Catches a path, a guided target or an adaptive weight that takes in channels that are not
    there."""
    settings = MeanFlow(
        equal=equal, target=target, guidance=2.0, mix=0.5, guidance_interval=(0.0, 1.0)
    )
    weights = _weights(C)
    rng = np.random.default_rng(1)
    x0 = jnp.asarray(rng.standard_normal((B, SIDE, SIDE, C)), jnp.float32)
    noise = jnp.asarray(rng.standard_normal(x0.shape), jnp.float32)
    t, r, labels = jnp.linspace(0.3, 0.9, B), jnp.linspace(0.0, 0.4, B), jnp.arange(B)

    def loss(counts, rows=slice(None), sliced=None):
        """With masks; sliced: by the network that has only so many channels."""
        monkeypatch.setattr(
            meanflow, "draws", lambda *a: (t[rows], r[rows], noise[rows, ..., :sliced])
        )
        network = _average(weights if sliced is None else _sliced(weights, sliced, 1))
        inputs = (x0[rows, ..., :sliced], labels[rows], jax.random.key(0))
        return float(meanflow.loss(settings, network, *inputs, none=9, channels=counts)[0])

    counts = [1, 2, 5, 6]
    for c in counts:
        assert loss(jnp.full(B, c)) == pytest.approx(loss(None, sliced=c), rel=1e-5)
    each = [loss(None, slice(i, i + 1), c) for i, c in enumerate(counts)]
    assert loss(jnp.array(counts)) == pytest.approx(np.mean(each), rel=1e-5)


def test_jumps_do_not_depend_on_the_number_of_channels():
    """Catches rows chosen so that one of the draws is always flow matching, the other never."""
    rows = (jnp.arange(8).repeat(2), jnp.tile(jnp.array([2, 6]), 8))
    equal, jump = meanflow.split(rows, 0.75, copies=2)
    for example, channels in (equal, jump):
        np.testing.assert_array_equal(example[::2], example[1::2])
        np.testing.assert_array_equal(channels.reshape(-1, 2), [[2, 6]] * (len(channels) // 2))
    assert len(equal[0]) == 12 and len(jump[0]) == 4


def _step(config, mesh, values):
    spec = state_lib.train_spec(config, mesh)
    state = state_lib.init_state(config, mesh, spec)
    batch = {"latent": values, "label": np.arange(len(values), dtype=np.int32) % 3}
    step = jax.jit(step_lib.make_step(config, spec))
    after, metrics = step(state, mesh_lib.put_batch(batch, mesh), {})
    return after, {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_a_step_draws_noise_for_each_number_of_channels(diffusion_config, one_device, monkeypatch):
    """Catches draws that share their noise, labels of the wrong example, and draws that differ
    between devices or microbatches."""
    config, source = on_latents(diffusion_config)
    values = np.stack([source[i][0][0] for i in range(8)])
    config.augment.update({"channels": (2, 4), "count": 2, "always_full": True})
    config.optimizer.eps = 1e-3
    seen = {}
    real = objectives.loss

    def spy(name, model, x0, cond, key, channels):
        jax.debug.callback(lambda **k: seen.update(k), x0=x0, channels=channels, cond=cond)
        return real(name, model, x0, cond, key, channels)

    config.label_dropout = 0.0
    monkeypatch.setattr(objectives, "loss", spy)
    after, metrics = _step(config, one_device, values)
    jax.block_until_ready(after.params)
    np.testing.assert_array_equal(seen["channels"][1::2], 8)
    assert set(np.asarray(seen["channels"][::2]).tolist()) in ({2}, {4})
    np.testing.assert_array_equal(seen["x0"][::2], seen["x0"][1::2])
    np.testing.assert_array_equal(seen["cond"], np.repeat(np.arange(8) % 3, 2))
    assert metrics["channels"] == pytest.approx((seen["channels"][0] + 8) / 2)
    monkeypatch.setattr(objectives, "loss", real)
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:4])
    many, many_metrics = _step(config, mesh, values)
    assert many_metrics["channels"] == metrics["channels"]
    assert many_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    for name in after.params:
        np.testing.assert_allclose(after.params[name], many.params[name], atol=2e-6)


def test_an_average_velocity_knows_the_copies(latents_folder, one_device, monkeypatch):
    """Catches copies of which one is taken for another example, and a loss without the mask."""
    config, source = on_latents(small_models.diffusion_config(latents_folder, "meanflow"))
    config.augment.update({"channels": (2, 4), "count": 2})
    seen = {}
    real = meanflow.loss

    def spy(settings, network, x0, labels, key, **kwargs):
        seen.update(kwargs, rows=len(x0))
        return real(settings, network, x0, labels, key, **kwargs)

    monkeypatch.setattr(meanflow, "loss", spy)
    spec = state_lib.train_spec(config, one_device)
    state = state_lib.abstract_state((), one_device, spec)
    batch = {
        "latent": jax.ShapeDtypeStruct((8, *source[0][0][0].shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    jax.eval_shape(step_lib.make_step(config, spec), state, batch, {})
    assert (seen["rows"], seen["copies"], seen["channels"].shape) == (16, 2, (16,))


def test_more_channels_than_the_latents_have_are_refused(diffusion_config, one_device):
    """Catches a mask that never masks, for a typing error in the list."""
    config = on_latents(diffusion_config)[0]
    config.augment.channels = (4, 9)
    with pytest.raises(UserError, match="augment.channels=.*: 9 is more than the 8 channels"):
        resolve.check_training(config, one_device)
