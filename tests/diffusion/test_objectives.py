# SPDX-License-Identifier: Apache-2.0
"""The diffusion processes and losses against independent NumPy and SciPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import integrate, stats

from dcae_jax.config import default
from dcae_jax.diffusion import objectives
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib

BETAS = {"epsilon": objectives.scaled_linear_betas(), "learned_sigma": objectives.linear_betas()}
SHAPE = (2, 2, 3)
NAMES = [name for name, objective in objectives.OBJECTIVES.items() if objective.loss]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def chain(betas):
    """Signal's factor and noise's variance after each step, one step's noise at a time."""
    factor, variance, rows = 1.0, 0.0, []
    for beta in betas:
        factor *= np.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        rows.append((factor, variance))
    return np.array(rows).T


def backwards(betas, x0, x_t, n):
    """Mean and variance of x before step n, by Bayes: the product of two normal densities."""
    factor, variance = chain(betas)
    if n == 0:
        return x0, 0.0
    prior_mean, prior_variance = factor[n - 1] * x0, variance[n - 1]
    gain = np.sqrt(1 - betas[n])  # x_t = gain x + noise of variance beta
    precision = 1 / prior_variance + gain**2 / betas[n]
    return (prior_mean / prior_variance + gain * x_t / betas[n]) / precision, 1 / precision


def learned(betas, v, n):
    """Log variance between that of the posterior (of step 1 where it is 0) and beta."""
    low = np.log(backwards(betas, 0.0, 0.0, max(n, 1))[1])
    return low + (v + 1) / 2 * (np.log(betas[n]) - low)


def bin_log_probability(x, mean, deviation):
    """Of 256 bins over [-1, 1], the outer ones open."""
    low = -np.inf if x < -0.999 else x - 1 / 255
    high = np.inf if x > 0.999 else x + 1 / 255
    law = stats.norm(mean, deviation)
    probability = law.sf(low) - law.sf(high) if x > mean else law.cdf(high) - law.cdf(low)
    return np.log(max(probability, 1e-12))


@pytest.mark.parametrize("objective", BETAS)
def test_noisy_latents_have_the_mean_and_variance_of_the_chain(objective):
    """Catches a cumulative product off by one step, and the other schedule's betas."""
    betas = BETAS[objective]
    n, x0 = jnp.arange(1000), draw(0, 1000, *SHAPE)
    mean, variance = objectives.q_mean_variance(betas, jnp.asarray(x0), n)
    factor, want = chain(betas)
    np.testing.assert_allclose(mean, factor[:, None, None, None] * x0, rtol=1e-12)
    np.testing.assert_allclose(variance[:, 0, 0, 0], want, rtol=1e-12)
    ends = {"epsilon": (0.00085, 0.0120), "learned_sigma": (1e-4, 0.02)}[objective]
    np.testing.assert_allclose((betas[0], betas[-1]), ends, rtol=1e-12)
    middle = {"epsilon": 0.004815, "learned_sigma": 0.01006}[objective]
    np.testing.assert_allclose(betas[500], middle, rtol=1e-3)


@pytest.mark.parametrize("objective", BETAS)
def test_the_posterior_is_that_of_bayes(objective):
    """Catches swapped coefficients, and a variance that is not clipped at the first step."""
    betas = BETAS[objective]
    numbers = np.array([0, 1, 2, 500, 999])
    x0, x_t = draw(0, 5, *SHAPE), draw(1, 5, *SHAPE)
    mean, variance, log_variance = objectives.posterior(
        betas, jnp.asarray(x0), jnp.asarray(x_t), jnp.asarray(numbers)
    )
    for i, n in enumerate(numbers):
        want, want_variance = backwards(betas, x0[i], x_t[i], n)
        np.testing.assert_allclose(mean[i], want, rtol=1e-9)
        np.testing.assert_allclose(variance[i].item(), want_variance, rtol=1e-9)
        np.testing.assert_allclose(log_variance[i].item(), learned(betas, -1, n), rtol=1e-9)


def test_x0_from_epsilon_undoes_the_noise():
    """Catches a missing root: the clean latents come back from the noise that was mixed in."""
    betas, n = BETAS["epsilon"], jnp.array([0, 500, 999])
    x0, noise = jnp.asarray(draw(0, 3, *SHAPE)), jnp.asarray(draw(1, 3, *SHAPE))
    x_t = objectives.q_sample(betas, x0, n, noise)
    np.testing.assert_allclose(objectives.x0_from_epsilon(betas, x_t, n, noise), x0, rtol=1e-9)


def test_learned_variance_lies_between_the_two_published_bounds():
    """Catches v taken as [0, 1], bounds in the wrong order, and log 0 at the first step."""
    betas, numbers = BETAS["learned_sigma"], np.array([0, 1, 500, 999])
    for v in (-1.0, 0.25, 1.0):
        ours = objectives.learned_log_variance(
            betas, jnp.full((4, *SHAPE), v), jnp.asarray(numbers)
        )
        for i, n in enumerate(numbers):
            np.testing.assert_allclose(ours[i], np.full(SHAPE, learned(betas, v, n)), rtol=1e-9)


def test_kl_is_the_integral():
    """Catches the divergence of the second distribution from the first."""
    one, two = stats.norm(0.3, 0.5), stats.norm(-0.2, 0.8)
    want, _ = integrate.quad(lambda x: one.pdf(x) * (one.logpdf(x) - two.logpdf(x)), -6, 6)
    ours = objectives.normal_kl(0.3, 2 * jnp.log(0.5), -0.2, 2 * jnp.log(0.8))
    np.testing.assert_allclose(ours, want, rtol=1e-7)


def test_bins_have_the_probabilities_of_the_normal_distribution():
    """Catches a bin of half the width, and outer bins that do not reach to infinity."""
    levels = jnp.asarray(np.arange(256) / 127.5 - 1)
    for mean, deviation in ((0.1, 0.5), (-0.97, 0.02)):
        ours = objectives.discretised_log_likelihood(levels, mean, 2 * jnp.log(deviation))
        want = [bin_log_probability(x, mean, deviation) for x in np.asarray(levels)]
        np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(np.exp(ours).sum(), 1, rtol=1e-6)


def test_the_bound_equals_a_loop_over_its_values():
    """Catches nats for bits, a sum for a mean, the likelihood at another than the first step."""
    betas, numbers = BETAS["learned_sigma"], np.array([0, 1, 500, 999])
    factor, variance = chain(betas)
    x0, noise = 0.5 * draw(0, 4, *SHAPE), draw(1, 4, *SHAPE)
    epsilon, v = noise + 0.3 * draw(2, 4, *SHAPE), np.tanh(draw(3, 4, *SHAPE))
    root = np.sqrt(variance)[numbers][:, None, None, None]
    x_t = factor[numbers][:, None, None, None] * x0 + root * noise
    ours = objectives.variational_bound(
        betas, *(jnp.asarray(a) for a in (x0, x_t, numbers, epsilon, v))
    )
    for i, n in enumerate(numbers):
        terms = []
        for index in np.ndindex(SHAPE):
            x, y, e = x0[i][index], x_t[i][index], epsilon[i][index]
            guess = (y - np.sqrt(variance[n]) * e) / factor[n]
            mean, log_variance = backwards(betas, guess, y, n)[0], learned(betas, v[i][index], n)
            if n == 0:
                terms.append(-bin_log_probability(x, mean, np.exp(0.5 * log_variance)))
            else:
                want, want_variance = backwards(betas, x, y, n)
                ratio = want_variance / np.exp(log_variance)
                distance = (want - mean) ** 2 / np.exp(log_variance)
                terms.append(0.5 * (ratio - 1 - np.log(ratio) + distance))
        np.testing.assert_allclose(ours[i], np.mean(terms) / np.log(2), rtol=1e-6)


def seen(objective, batch, key=0, x0=None):
    """What the network is given: x_t and time; and the loss if it predicts `constant`."""
    x0 = jnp.asarray(draw(0, batch, *SHAPE)) if x0 is None else x0
    inputs = []

    def model(x_t, time, cond):
        inputs.append((x_t, time))
        return jnp.zeros((*x_t.shape[:-1], x_t.shape[-1] * (1 + (objective == "learned_sigma"))))

    objectives.loss(objective, model, x0, None, jax.random.key(key))
    return inputs[0]


def truth(objective, x0):
    """The network that knows x0: what it should predict from x_t and the time it is given."""

    def model(x_t, time, cond):
        if objective == "flow":
            t = time[:, None, None, None]
            return (x0 - x_t) / (1 - t)
        first = {"epsilon": 1, "learned_sigma": 0}[objective]
        factor, variance = jnp.asarray(chain(BETAS[objective]))
        n = time.astype(int) - first
        factor, variance = factor[n][:, None, None, None], variance[n][:, None, None, None]
        noise = (x_t - factor * x0) / jnp.sqrt(variance)
        # v = -1: the posterior's own variance.
        v = [jnp.full_like(noise, -1)] if objective == "learned_sigma" else []
        return jnp.concatenate([noise, *v], axis=-1)

    return model


@pytest.mark.parametrize("objective", NAMES)
def test_the_loss_of_the_true_prediction_is_zero(objective):
    """Catches a target of the wrong sign, and a time that is not that of the noise mixed in."""
    x0 = jnp.asarray(draw(0, 64, *SHAPE))
    value, metrics = objectives.loss(objective, truth(objective, x0), x0, None, jax.random.key(0))
    assert metrics["mse"] < 1e-12
    # No step of these 64 is the first, whose likelihood is not zero.
    assert value < 1e-6
    # Zeros have the loss of the target's second moment: 1 for noise, 1 + 1 for a velocity.
    zero = truth(objective, x0)
    value, metrics = objectives.loss(
        objective, lambda *a: 0 * zero(*a), x0, None, jax.random.key(0)
    )
    np.testing.assert_allclose(metrics["mse"], 2 if objective == "flow" else 1, rtol=0.2)
    assert value == metrics["mse"] + metrics.get("vb", 0)


@pytest.mark.parametrize("objective", NAMES)
def test_the_network_is_given_times_of_the_published_range(objective):
    """Catches UViT given 0..999, DiT given 1..1000, a flow time scaled, times not uniform."""
    _, time = seen(objective, 20000, x0=jnp.zeros((20000, 1, 1, 1)))
    low, high = {"epsilon": (1, 1000), "learned_sigma": (0, 999), "flow": (0, 1)}[objective]
    if objective == "flow":
        assert 0 <= time.min() < 0.001 and 0.999 < time.max() <= 1
    else:
        assert (time.min(), time.max()) == (low, high)
        assert np.array_equal(time, np.round(time))
    np.testing.assert_allclose(time.mean(), (low + high) / 2, rtol=0.02)
    np.testing.assert_allclose(time.std(), (high - low) / np.sqrt(12), rtol=0.02)


@pytest.mark.parametrize("objective", NAMES)
def test_draws_depend_on_the_key_and_the_example_alone(objective):
    """Catches draws for the batch as a whole, which change with its size or its devices."""
    x0 = jnp.asarray(draw(0, 8, *SHAPE), jnp.float32)
    x_t, time = seen(objective, 8, x0=x0)
    assert x_t.dtype == time.dtype == jnp.float32
    part = seen(objective, 2, x0=x0[:2])
    np.testing.assert_array_equal(part[0], x_t[:2])
    np.testing.assert_array_equal(part[1], time[:2])
    assert len(np.unique(time)) > 4
    assert not np.array_equal(seen(objective, 8, key=1, x0=x0)[1], time)

    mesh = mesh_lib.make_mesh(default().mesh, jax.devices())
    split = jax.device_put(x0, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    spread = jax.jit(lambda x: seen(objective, 8, x0=x))(split)
    np.testing.assert_array_equal(spread[1], time)
    np.testing.assert_allclose(spread[0], x_t, rtol=1e-6, atol=1e-6)


def test_the_bound_does_not_train_the_mean():
    """Catches a bound whose gradient reaches the predicted noise: it is for the variance alone."""
    x0 = jnp.asarray(draw(0, 4, *SHAPE))

    def value(epsilon, v, part):
        model = lambda x_t, time, cond: jnp.concatenate([epsilon, v], axis=-1)  # noqa: E731
        total, metrics = objectives.loss("learned_sigma", model, x0, None, jax.random.key(0))
        return total if part == "all" else metrics[part]

    at = jnp.asarray(draw(1, 4, *SHAPE)), jnp.zeros((4, *SHAPE))
    slopes = jax.jit(jax.grad(value, (0, 1)), static_argnums=2)
    of_all, of_mse = slopes(*at, "all"), slopes(*at, "mse")
    np.testing.assert_array_equal(of_all[0], of_mse[0])
    assert jnp.abs(of_all[1]).min() > 0 and jnp.abs(of_mse[1]).max() == 0


def test_float32_loses_no_more_than_rounding():
    """Catches a table made in float32, where 1 - alpha^2 of the first steps has few digits left."""
    x0 = draw(0, 64, *SHAPE)
    n = jnp.arange(0, 1000, 16)[:63]
    for dtype, rtol in ((jnp.float32, 1e-6), (jnp.float64, 1e-12)):
        _, variance = objectives.q_mean_variance(
            BETAS["learned_sigma"], jnp.asarray(x0[:63], dtype), n
        )
        assert variance.dtype == dtype
        want = chain(BETAS["learned_sigma"])[1][np.asarray(n)]
        np.testing.assert_allclose(variance[:, 0, 0, 0], want, rtol=rtol)


@pytest.mark.parametrize("objective", NAMES)
def test_conditioning_reaches_the_network_as_it_was_given(objective):
    """Catches an objective that takes labels alone, or drops what else conditions a model."""
    cond, got = {"label": jnp.arange(2), "text": jnp.ones((2, 4, 8))}, []

    def model(x_t, time, cond):
        got.append(cond)
        return jnp.concatenate([x_t] * (1 + (objective == "learned_sigma")), axis=-1)

    objectives.loss(objective, model, jnp.zeros((2, *SHAPE)), cond, jax.random.key(0))
    assert len(got) == 1 and got[0] is cond


def test_an_unknown_objective_is_named():
    """Catches a misspelt objective that trains something else."""
    with pytest.raises(UserError, match="'eps' is not known; .* epsilon, learned_sigma, flow"):
        objectives.loss("eps", lambda x, *_: x, jnp.zeros((1, *SHAPE)), None, jax.random.key(0))


def test_the_bound_is_a_mean_over_the_batch():
    """Catches a bound that is summed, and so outweighs the noise in a large batch."""
    x0, seen = jnp.asarray(draw(0, 4, *SHAPE)), {}

    def model(x_t, time, cond):
        seen.update(x_t=x_t, n=time.astype(int))
        return jnp.concatenate([0.1 * x_t, jnp.zeros_like(x_t)], axis=-1)

    total, metrics = objectives.loss("learned_sigma", model, x0, None, jax.random.key(0))
    bound = objectives.variational_bound(
        BETAS["learned_sigma"], x0, seen["x_t"], seen["n"], 0.1 * seen["x_t"], jnp.zeros_like(x0)
    )
    np.testing.assert_allclose(metrics["vb"], bound.mean(), rtol=1e-9)
    np.testing.assert_allclose(total, metrics["mse"] + metrics["vb"], rtol=1e-9)


@pytest.mark.parametrize(
    "objective, data, noise", [("epsilon", 1, 1000), ("learned_sigma", 0, 999), ("flow", 1, 0)]
)
def test_noise_levels_run_to_1_at_pure_noise(objective, data, noise):
    """Catches a guidance interval shifted by a step, or upside down."""
    level = objectives.OBJECTIVES[objective].noise_level
    np.testing.assert_allclose(level(noise), 1, atol=1e-12)
    np.testing.assert_allclose(level(data), 0 if objective == "flow" else 1e-3, atol=1e-12)


def test_bins_far_on_either_side_keep_their_digits_in_float32():
    """Catches an integral in the right tail, where a difference of float32 near 1 is 0."""
    for x in (0.3, -0.3):
        arguments = (jnp.float32(value) for value in (x, 0.0, 2 * np.log(0.05)))
        ours = objectives.discretised_log_likelihood(*arguments)
        np.testing.assert_allclose(ours, bin_log_probability(x, 0.0, 0.05), rtol=1e-4)
