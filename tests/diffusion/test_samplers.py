# SPDX-License-Identifier: Apache-2.0
"""Samplers against a Gaussian, whose best prediction and whose exact solution are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from support.gaussian import (
    BETAS,
    COUNTS,
    DEVIATION,
    MEAN,
    START,
    WIDE,
    chain_log_alpha,
    chain_model,
    epsilon_of,
    order_of,
    velocity,
    wide,
)

from dcae_jax.diffusion import samplers
from dcae_jax.errors import UserError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("solver, order", [(samplers.euler, 1), (samplers.heun, 2)])
def test_orders_of_convergence_of_flow_solvers(solver, order):
    """Catches a second slope taken at the first one's time, and time that runs backwards."""
    run = jax.jit(lambda x, steps: solver(velocity, x, None, steps))
    errors = [np.abs(run(START, n) - (MEAN + DEVIATION * START)).max() for n in COUNTS]
    assert abs(order_of(errors) - order) < 0.15, errors


def test_dormand_prince_has_the_published_coefficients_and_keeps_its_tolerance():
    """Catches a digit of the tableau, which lowers the order, and an error that is not estimated.

    SciPy's embedded solution is Dormand and Prince's own, whose error is 3/2 of Shampine's.
    """
    np.testing.assert_allclose(samplers._A[:6, :5], integrate.RK45.A, rtol=1e-14)
    np.testing.assert_allclose(samplers._A[6, :6], integrate.RK45.B, rtol=1e-14)
    np.testing.assert_allclose(samplers._C[:6], integrate.RK45.C, rtol=1e-14)
    assert samplers._C[6] == 1 and not np.triu(samplers._A).any()
    error = samplers._A[6] - samplers._ORDER_4
    np.testing.assert_allclose(error, -2 / 3 * integrate.RK45.E, rtol=1e-12, atol=1e-16)
    for rtol, most in ((1e-3, 2e-2), (1e-6, 2e-5), (1e-9, 2e-8)):
        solve = jax.jit(functools.partial(samplers.dopri5, velocity, rtol=rtol, atol=rtol / 1e3))
        off = np.abs(solve(START, None) - (MEAN + DEVIATION * START)).max()
        assert 1e-3 * most < off < most


def times_of_dopri5(f, x, rtol, atol, h):
    """When torchdiffeq's dopri5 evaluates f(x, t), of one number x, from 0 to 1."""
    a, c, b = integrate.RK45.A, integrate.RK45.C, integrate.RK45.B
    t, first, times = 0.0, f(x, 0.0), [0.0]
    while t < 1:
        k = [first]
        for i in range(1, 6):
            k.append(f(x + h * a[i, :i] @ k, t + c[i] * h))
        new = x + h * b @ k
        k.append(f(new, t + h))
        times += [*(t + c[1:] * h), t + h]
        error = abs(h * (-2 / 3 * integrate.RK45.E) @ k) / (atol + rtol * max(abs(x), abs(new)))
        if error < 1:
            x, t, first = new, t + h, k[-1]
        h *= min(10, max(0.9 * error ** (-1 / 5), 1 if error < 1 else 0.2))
        h = min(h, 1 - t)
    return times


@pytest.mark.parametrize("wave", [0.0, 60.0])
def test_dormand_prince_chooses_its_steps_as_torchdiffeq_does(wave):
    """Catches another safety factor, exponent, bound of growth, first step or tolerance, steps
    that are taken in spite of their error, and slopes that are not those of the step before."""
    seen = []

    def model(x, t, _=None):
        seen.append(float(t[0]))
        return velocity(x, t) + wide(wave * jnp.sin(2 * wave * t))

    def f(x, t):
        return float(velocity(np.full((1, 1, 1, 1), x), np.full(1, t)).item()) + wave * np.sin(
            2 * wave * t
        )

    with jax.disable_jit():
        samplers.sample(model, jnp.zeros((1, 1, 1, 1)), objective="flow", steps=1)
    np.testing.assert_allclose(seen, times_of_dopri5(f, 0.0, 1e-3, 1e-6, 0.01), rtol=1e-6)
    assert (np.diff(seen) < 0).any() == bool(wave)  # where a step was refused


@pytest.mark.parametrize(
    "objective, sampler",
    [(o, s) for o, names in samplers.SAMPLERS.items() for s in names if s != "dopri5"],
)
def test_steps_are_evaluations_of_the_model(objective, sampler):
    """Catches an evaluation more or less than asked for, which a compiled loop hides."""
    calls = []

    def model(x, time, _, h=None):
        calls.append(time)
        return jnp.concatenate([x] * (1 + (objective == "learned_sigma")), axis=-1)

    keys = samplers.sample_keys(0, jnp.arange(2))
    x = samplers.initial_noise(keys, (2, 1, 3))
    for steps in (2, 4):
        calls.clear()
        with jax.disable_jit():
            samplers.sample(model, x, objective=objective, sampler=sampler, steps=steps, keys=keys)
        assert len(calls) == steps


def test_dormand_prince_arrives_whatever_the_company():
    """Catches a step size shared by the batch, and a model that is called for single samples."""
    shapes = []

    def run(x, weights, labels):
        def model(x, t, labels):
            shapes.append(x.shape)
            return weights[labels][:, None, None, None] * velocity(x, t)

        guided = samplers.guided(model, 1, 1.0, objective="flow")
        return samplers.sample(guided, x, labels, objective="flow", steps=1)

    weights, labels = jnp.array([1.0, 0.0]), jnp.zeros(9, int).at[4].set(1)
    y = jax.jit(run)(START, weights, labels)
    moved = np.delete(np.arange(9), 4)
    np.testing.assert_allclose(y[moved], (MEAN + DEVIATION * START)[moved], atol=0.02)
    assert y[4] == START[4]  # its weight is 0: labels are in their order
    assert set(shapes) == {(9, 1, 1, 1)}
    alone = jax.jit(run)(START[:2], weights, labels[:2])
    np.testing.assert_allclose(alone, y[:2], rtol=1e-12)


def test_dormand_prince_reports_a_sample_that_does_not_arrive():
    """Catches a half-way latent passed off as a sample."""
    stiff = lambda x, t, _: jnp.where(x > 0, -1e6 * (x - jnp.cos(1e3 * wide(t))), velocity(x, t))  # noqa: E731
    y = samplers.sample(stiff, jnp.asarray(START[[0, -1]]), objective="flow", steps=1)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


@pytest.mark.parametrize("objective", BETAS)
def test_ancestral_samples_have_the_distribution_of_the_data(objective):
    """Catches noise shared by the steps, another variance, or times of the respaced chain."""
    steps, count = 50, 20000
    numbers, betas = samplers.respaced(BETAS[objective], steps)
    bar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], bar[:-1]])
    posterior = betas * (1 - before) / (1 - bar)
    # What is unknown of x0 adds to the variance of the step: with it, each step is exact.
    of_x0 = np.sqrt(before) * betas / (1 - bar)
    all_of_x_t = bar * DEVIATION**2 + 1 - bar
    unknown = DEVIATION**2 * (1 - bar) / all_of_x_t
    taken = posterior + (objective == "learned_sigma") * of_x0**2 * unknown
    low = np.concatenate([posterior[1:2], posterior[1:]])
    v = np.full(1000, np.nan)  # NaN at numbers that the chain leaves out
    v[numbers] = 2 * np.log(np.maximum(taken, 1e-30) / low) / np.log(betas / low) - 1
    # The variance of the samples, step by step; only the last step adds no noise.
    gain = of_x0 * np.sqrt(bar) * DEVIATION**2 / all_of_x_t
    gain += np.sqrt(1 - betas) * (1 - before) / (1 - bar)
    variance = 1.0
    for n in reversed(range(steps)):
        variance = gain[n] ** 2 * variance + (taken[n] if n else 0)
    if objective == "learned_sigma":
        np.testing.assert_allclose(variance, DEVIATION**2, rtol=2e-3)

    def model(x, time, _):
        first = epsilon_of(x, chain_log_alpha(objective, time))
        if objective == "epsilon":
            return first
        return jnp.concatenate([first, first * 0 + wide(jnp.asarray(v)[time.astype(int)])], -1)

    @jax.jit
    def run(indices):
        noise = samplers.initial_noise(samplers.sample_keys(0, indices), (1, 1, 1))
        return samplers.sample(
            model,
            noise,
            objective=objective,
            sampler="ddpm",
            steps=steps,
            keys=samplers.sample_keys(0, indices),
        )

    x = np.asarray(run(jnp.arange(count)), np.float64)
    assert abs(x.mean() - MEAN) < 4 * DEVIATION / np.sqrt(count)
    assert abs(x.std() / np.sqrt(variance) - 1) < 4 / np.sqrt(2 * count)
    np.testing.assert_allclose(run(jnp.arange(7, 10)), x[7:10], atol=1e-4)
    assert len(np.unique(x)) > 0.9 * count


@pytest.mark.parametrize("objective", BETAS)
def test_the_last_ancestral_step_adds_no_noise(objective):
    """Catches samples with the noise of step 1 left in them: data of one value come out exact."""

    def model(x, time, _):
        log_alpha = wide(chain_log_alpha(objective, time))
        epsilon = (x - jnp.exp(log_alpha) * MEAN) / jnp.sqrt(-jnp.expm1(2 * log_alpha))
        return jnp.concatenate([epsilon, epsilon * 0], axis=-1)

    x = jax.jit(
        lambda x, keys: samplers.sample(
            model, x, objective=objective, sampler="ddpm", steps=10, keys=keys
        )
    )(WIDE, samplers.sample_keys(0, jnp.arange(9)))
    np.testing.assert_allclose(x, np.full_like(WIDE, MEAN), rtol=1e-9)


def test_a_respaced_chain_is_as_noisy_at_its_steps():
    """Catches betas picked out of the long chain, and a chain that leaves out an end."""
    numbers, betas = samplers.respaced(BETAS["learned_sigma"], 250)
    # As improved diffusion picks them: a fractional stride, rounded as it goes.
    want, at = [], 0.0
    for _ in range(250):
        want.append(round(at))
        at += 999 / 249
    np.testing.assert_array_equal(numbers, want)
    bar = np.cumprod(1 - BETAS["learned_sigma"])
    np.testing.assert_allclose(np.cumprod(1 - betas), bar[numbers], rtol=1e-9)


def test_noise_is_that_of_the_sample_and_not_of_the_batch():
    """Catches noise drawn for a batch: a resumed job would make other images."""

    def noise(seed, numbers):
        return samplers.initial_noise(samplers.sample_keys(seed, numbers), (2, 2, 3))

    all_noise = noise(3, jnp.arange(8))
    assert all_noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise(3, jnp.array([5, 2])), all_noise[jnp.array([5, 2])])
    np.testing.assert_array_equal(jax.jit(noise)(3, jnp.array([6])), all_noise[6:7])
    assert len(np.unique(all_noise)) == all_noise.size
    assert not np.array_equal(noise(4, jnp.arange(8)), all_noise)
    keys = samplers.sample_keys(3, jnp.arange(8))
    assert keys[5] == jax.random.fold_in(jax.random.key(3), 5)


def network(x, time, labels):
    """Something that depends on all three; 2 c channels."""
    value = x * wide(1 + labels) + wide(time) / 1000
    return jnp.concatenate([value, 10 * value], axis=-1)


def test_guidance_extrapolates_from_no_label_to_the_label():
    """Catches s for s - 1, two calls for one, and a sigma that is guided as well."""
    x, time = jnp.asarray(WIDE[:3]), jnp.array([200.0, 500.0, 800.0])
    labels, calls = jnp.array([2, 0, 5]), []

    def counted(x, time, labels):
        calls.append(x.shape)
        return network(x, time, labels)

    def guided(scale, objective="learned_sigma", **interval):
        guide = samplers.guided(counted, 9, scale, objective=objective, **interval)
        return guide(x, time, labels)

    cond, uncond = network(x, time, labels), network(x, time, jnp.full(3, 9))
    y = guided(3.0)
    assert calls == [(6, 2, 1, 3)]
    np.testing.assert_allclose(y[..., :3], (uncond + 3 * (cond - uncond))[..., :3], rtol=1e-12)
    np.testing.assert_array_equal(y[..., 3:], cond[..., 3:])

    calls.clear()
    np.testing.assert_array_equal(guided(1.0), cond)
    assert calls == [(3, 2, 1, 3)]
    np.testing.assert_allclose(guided(jnp.asarray(1.0)), cond, rtol=1e-12)
    each = guided(jnp.array([1.0, 3.0, 1.0]))
    np.testing.assert_allclose(each, jnp.stack([cond[0], y[1], cond[2]]), rtol=1e-12)


@pytest.mark.parametrize(
    "objective, times",
    [
        ("epsilon", [50, 100, 500, 550]),
        ("learned_sigma", [49, 99, 499, 549]),
        ("flow", [0.95, 0.9, 0.5, 0.45]),
    ],
)
def test_guidance_acts_inside_its_interval_of_noise_levels(objective, times):
    """Catches an interval in network time, and one that counts a flow's time as noise."""
    x, time, labels = jnp.asarray(START[:4]), jnp.array(times, float), jnp.array([2, 0, 5, 1])
    model = lambda *inputs: network(*inputs)[..., :1]  # noqa: E731
    make = functools.partial(samplers.guided, model, 9, 3.0, objective=objective)
    always = make()(x, time, labels)
    sometimes = make(interval=(0.09, 0.51))(x, time, labels)
    cond = model(x, time, labels)
    np.testing.assert_allclose(sometimes[1:3], always[1:3], rtol=1e-12)
    np.testing.assert_allclose(sometimes[::3], cond[::3], rtol=1e-12)
    assert (always != cond).all()


@pytest.mark.parametrize(
    "objective, sampler", [(o, s) for o, names in samplers.SAMPLERS.items() for s in names]
)
def test_every_sampler_compiles_one_evaluation_and_keeps_float32(objective, sampler):
    """Catches an unrolled loop (30 copies of a network to compile) and a bfloat16 network's x."""
    calls = []

    def model(x, time, _, h=None):
        calls.append((x.dtype.name, time.dtype.name, time.shape))
        y = (
            velocity(x, time)
            if objective in ("flow", "meanflow")
            else chain_model(objective, x, time)
        )
        return y.astype(jnp.bfloat16)

    def run(x, keys):
        return samplers.sample(model, x, objective=objective, sampler=sampler, steps=30, keys=keys)

    keys = samplers.sample_keys(0, jnp.arange(9))
    y = jax.jit(run)(START.astype(np.float32), keys)
    assert y.dtype == jnp.float32 and np.isfinite(y).all()
    assert len(calls) <= (2 if sampler == "heun" else 1)
    assert set(calls) == {("float32", "float32", (9,))}


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(objective="eps"), "objective='eps' is not known"),
        (
            dict(objective="flow", sampler="ddim"),
            "'ddim' does not fit objective='flow'; use dopri5",
        ),
        (dict(objective="flow", sampler="heun", steps=31), "use an even number"),
        (dict(objective="epsilon", steps=0), "steps=0 must be at least 1"),
        (dict(objective="epsilon", sampler="ddpm", steps=1001), "between 2 and 1000"),
        (dict(objective="epsilon", sampler="ddpm", steps=1), "between 2 and 1000"),
    ],
)
def test_settings_that_cannot_be_sampled_are_named(settings, message):
    """Catches a sampler of another objective, which would run and give noise."""
    keys = samplers.sample_keys(0, jnp.arange(9))
    with pytest.raises(UserError, match=message):
        samplers.sample(
            lambda x, t, _: x, jnp.asarray(START), keys=keys, **{"steps": 30, **settings}
        )


def test_each_draw_has_noise_of_its_own(monkeypatch):
    """Catches ddpm's first step adding the initial noise again, or every step the same noise."""
    numbers, draw = [], samplers._noise

    def noise(keys, number, shape, dtype):
        numbers.append(int(number))
        return draw(keys, number, shape, dtype)

    monkeypatch.setattr(samplers, "_noise", noise)
    keys = samplers.sample_keys(0, jnp.arange(2))
    model = functools.partial(chain_model, "epsilon")
    with jax.disable_jit():
        x = samplers.initial_noise(keys, (1, 1, 1)).astype(jnp.float64)
        samplers.sample(model, x, objective="epsilon", sampler="ddpm", steps=4, keys=keys)
    assert len(numbers) == 5 and len(set(numbers)) == 5, numbers


def test_dormand_prince_treats_both_signs_alike():
    """Catches a tolerance relative to x, not to its magnitude: negative latents get more steps."""
    swing = lambda x, t, _: 20 * jnp.cos(20 * t)[:, None, None, None] * x  # noqa: E731
    solve = jax.jit(functools.partial(samplers.dopri5, swing, rtol=1e-3, atol=1e-6))
    np.testing.assert_allclose(solve(-START, None), -solve(START, None), rtol=1e-12, atol=0)
