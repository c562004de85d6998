# SPDX-License-Identifier: Apache-2.0
"""Average velocities of a Gaussian, whose exact ones are known, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.gaussian import DEVIATION, MEAN, START, velocity, wide

from dcae_jax.config.schema import MeanFlow
from dcae_jax.diffusion import meanflow, objectives, samplers
from dcae_jax.errors import UserError

SHAPE = (2, 2, 3)
NONE = 5  # the label of no class
PLAIN = MeanFlow(adaptive=0.0)
FLOW = MeanFlow(adaptive=0.0, equal=1.0, times="uniform")
# u and du/dt at (z, t, r), by hand: (z, t, r, u, du/dt).
POINTS = (
    (1.3, 0.9, 0.2, 0.185356, 0.627514),
    (-0.8, 0.6, 0.0, -1.076975, -1.621708),
    (0.1, 1.0, 0.0, -0.65, 0.05),
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def spread(t):
    return jnp.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)


def marginal(z, t):
    """E[e - x | z]."""
    return -velocity(z, 1 - t)


def exact(z, t, r, labels=None):
    """The average velocity between t and r; where they are equal, the marginal one."""
    t, r = wide(t), wide(r)
    end = (1 - r) * MEAN + spread(r) / spread(t) * (z - (1 - t) * MEAN)
    h = t - r
    return jnp.where(h == 0, marginal(z, t[:, 0, 0, 0]), (z - end) / jnp.where(h == 0, 1, h))


def network(x, s, labels=None, h=None):
    """`exact` as a network is called: SiT's time and sign, the interval h."""
    return -exact(x, 1 - s, 1 - s - h)


def rows(count, seed=0):
    """(z, t, r, v, labels): draws with r < t, v the conditional velocity."""
    rng = np.random.default_rng(seed)
    t, r = np.sort(rng.uniform(size=(2, count)), axis=0)[::-1]
    x, e = MEAN + DEVIATION * rng.normal(size=count), rng.normal(size=count)
    z = (1 - t) * x + t * e
    one = [jnp.asarray(a) for a in (z, t, r, e - x)]
    return wide(one[0]), one[1], one[2], wide(one[3]), jnp.zeros(count, int)


def gradient(settings, count, v=None):
    """(losses, gradients) by row of the exact u plus a z + b, at a = b = 0."""
    z, t, r, conditional, labels = rows(count)
    v = conditional if v is None else v(z, t)

    def errors(ab):
        u = lambda z, t, r, y: exact(z, t, r) + ab[0] * z + ab[1]  # noqa: E731
        return meanflow.jump_error(settings, u, exact, z, t, r, labels, v, NONE)

    return jax.jit(lambda ab: (errors(ab), jax.jacfwd(errors)(ab)))(jnp.zeros(2))


@pytest.mark.parametrize("target", ["u", "v"])
def test_the_exact_average_velocity_solves_the_identity(target):
    """Catches a sign in v - (t - r) du/dt, a derivative in r, and a path that leaves out z."""
    settings = dataclasses.replace(PLAIN, target=target)
    loss, slopes = gradient(settings, 200, marginal)
    assert loss.max() < 1e-20 and jnp.abs(slopes.mean(0)).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("target", ["u", pytest.param("v", marks=pytest.mark.slow)])
def test_a_conditional_velocity_gives_the_same_solution_on_average(target):
    """Catches a target whose mean is not the exact u, which a loss above zero hides."""
    settings = dataclasses.replace(PLAIN, target=target)
    _, slopes = gradient(settings, 10**6)
    error = slopes.std(0) / 10**3
    assert (jnp.abs(slopes.mean(0)) < 4 * error).all(), slopes.mean(0) / error
    assert error.max() < 0.01


def test_the_derivative_has_its_value_by_hand():
    """Catches a tangent of 1 for r, a step that is not divided by twice, and time the wrong way."""
    z, t, r, u, slope = (jnp.asarray(column) for column in zip(*POINTS, strict=True))
    z, labels = wide(z), jnp.zeros(3, int)
    v = marginal(z, t)
    of_network = meanflow.average_velocity(network)
    for function in (exact, of_network):
        np.testing.assert_allclose(function(z, t, r, labels)[:, 0, 0, 0], u, atol=1e-6)
        for derivative, atol in (("jvp", 1e-6), ("difference", 6e-5)):
            settings = dataclasses.replace(PLAIN, derivative=derivative)
            ours = meanflow.total_derivative(settings, function, z, t, r, labels, v)
            np.testing.assert_allclose(ours[:, 0, 0, 0], slope, atol=atol)
    central = dataclasses.replace(PLAIN, derivative="difference")
    ours = meanflow.total_derivative(central, exact, z, t, r, labels, v)
    np.testing.assert_allclose(ours[0].item(), 0.627531, atol=1e-6)


@pytest.mark.parametrize("times", [(0, 1), (0, 0.3, 1), np.linspace(0, 1, 5)])
def test_jumps_along_the_exact_average_velocity_land_exactly(times):
    """Catches a jump of the wrong length or from the wrong time, on any grid."""
    run = jax.jit(lambda x: samplers.jumps(network, x, None, np.array(times, float)))
    np.testing.assert_allclose(run(START), MEAN + DEVIATION * START, rtol=1e-12)
    # Euler on the marginal velocity is far off with one step.
    euler = samplers.euler(velocity, START, None, 1)
    np.testing.assert_allclose(np.abs(euler - (MEAN + DEVIATION * START)).max(), 1.0, rtol=1e-6)


def test_steps_of_the_sampler_are_jumps():
    """Catches a grid from the wrong end, and a plain velocity where an average one is asked for."""
    for steps in (1, 2, 4):
        ours = samplers.sample(network, jnp.asarray(START), objective="meanflow", steps=steps)
        np.testing.assert_allclose(ours, MEAN + DEVIATION * START, rtol=1e-12)
    with pytest.raises(UserError, match="guidance=4.0.*meanflow.guidance"):
        samplers.check("meanflow", "", 4, 4.0)


# --- the loss ---------------------------------------------------------------------------------


def batch(count=16):
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(count, *SHAPE)))
    return x0, jnp.arange(count) % 4


def smooth(x, s, labels, h=None):
    """Some smooth network."""
    h = jnp.zeros_like(s) if h is None else h
    bend = wide(jnp.cos(2 * s) + 0.3 * jnp.sin(3 * h) + 0.1 * labels)
    return jnp.tanh(x * bend) + 0.2 * x.mean(-1, keepdims=True) * wide(s * h + 1)


@functools.cache
def flow_loss():
    x0, labels = batch()
    return objectives.loss("flow", smooth, x0, labels, jax.random.key(1))[0]


def test_with_every_row_at_r_equal_t_it_is_the_flow_objective():
    """Catches another sign, time, noise or normalisation than those of the flow objective."""
    x0, labels = batch()
    value, terms = meanflow.loss(FLOW, smooth, x0, labels, jax.random.key(1), none=NONE)
    np.testing.assert_allclose(value, flow_loss(), rtol=1e-12)
    assert terms.keys() == {"mse"} and terms["mse"] == value


def test_difference_and_jvp_agree():
    """Catches a difference over the wrong interval, or one that forgets to move z or t."""
    x0, labels = batch()
    value, slopes = {}, {}
    for derivative in ("jvp", "difference"):
        settings = MeanFlow(derivative=derivative, equal=0.25, mix=0.5, guidance=2.0)

        def loss(scale, settings=settings):
            net = lambda *a: scale * smooth(*a)  # noqa: E731
            return meanflow.loss(settings, net, x0, labels, jax.random.key(1), none=NONE)[0]

        value[derivative], slopes[derivative] = jax.jit(jax.value_and_grad(loss))(1.0)
    np.testing.assert_allclose(value["difference"], value["jvp"], rtol=1e-3)
    np.testing.assert_allclose(slopes["difference"], slopes["jvp"], rtol=1e-3)


def test_the_target_has_no_gradient():
    """Catches du/dt or folded guidance that is trained through: the second would double it."""
    x0, labels = batch()
    settings = dataclasses.replace(PLAIN, equal=0.0, mix=0.5, guidance=2.0)

    def loss(scale, inner):
        net = lambda *a: scale * smooth(*a)  # noqa: E731
        still = lambda *a: inner * smooth(*a)  # noqa: E731
        u, fixed = map(meanflow.average_velocity, (net, still))
        z, t, r, v, y = x0, jnp.full(16, 0.8), jnp.full(16, 0.3), x0[::-1], labels
        return meanflow.jump_error(settings, u, fixed, z, t, r, y, v, NONE).mean()

    slopes = jax.grad(loss, (0, 1))(1.0, 1.0)
    assert abs(slopes[0]) > 1e-3 and slopes[1] == 0


def test_guidance_is_folded_in_at_its_scale():
    """Catches w and k swapped, the interval at the wrong end, and dropped labels that are guided.

    A network that fits the target has v_c = v_g; solved for it, that is s v + (1 - s) v_none.
    """
    none, v, own = (jnp.full((4, 1, 1, 1), value) for value in (0.3, 1.7, 0.9))
    t, labels = jnp.array([0.1, 0.5, 0.9, 0.5]), jnp.array([1, 1, 1, NONE])
    still = lambda z, t, r, y: jnp.where(wide(y == NONE), none, own)  # noqa: E731
    settings = dataclasses.replace(PLAIN, guidance=4.0, mix=0.75, guidance_interval=(0.2, 0.8))
    ours = meanflow.guided(settings, still, v, t, labels, v, NONE, own)[:, 0, 0, 0]
    np.testing.assert_allclose(ours, [1.7, 1.7 - 0.75 * 0.3 + 0.75 * 0.9, 1.7, 1.7])
    for mix in (0.0, 0.5, 0.75):
        settings = dataclasses.replace(PLAIN, guidance=4.0, mix=mix)
        fixed = 4 * v - 3 * none
        ours = meanflow.guided(settings, still, v, t, labels, v, NONE, fixed if mix else None)
        np.testing.assert_allclose(ours[:3], fixed[:3])


def test_the_interval_and_the_derivative_belong_to_few_rows():
    """Catches a jvp on rows with r = t, which costs as much again, and rows split by device."""
    seen = []

    def net(x, s, labels, h):
        seen.append(len(x))
        return smooth(x, s, labels, h)

    x0, labels = batch()
    meanflow.loss(MeanFlow(equal=0.75), net, x0, labels, jax.random.key(1), none=NONE)
    assert sorted(seen) == [4, 4, 12]
    equal, jump = meanflow.split((jnp.arange(16),), 0.75)
    np.testing.assert_array_equal(jump[0], [3, 7, 11, 15])
    np.testing.assert_array_equal(np.sort(np.concatenate([equal[0], jump[0]])), np.arange(16))


def test_times_have_the_published_distributions():
    """Catches a mean of the wrong sign, a shift towards data, and jumps to data that are rare."""
    x0 = jnp.zeros((20000, 1, 1, 1))
    t, other, _ = meanflow.draws(MeanFlow(to_data=0.1), x0, jax.random.key(0))
    np.testing.assert_allclose(jnp.log(t / (1 - t)).mean(), -0.4, atol=0.03)
    np.testing.assert_allclose(jnp.log(t / (1 - t)).std(), 1.0, atol=0.03)
    np.testing.assert_allclose((other == 0).mean(), 0.1 / 0.25, atol=0.02)
    shifted = dataclasses.replace(MeanFlow(), times="uniform", shift=5.0, weighting="anyflow")
    t, _, _ = meanflow.draws(shifted, x0, jax.random.key(0))
    np.testing.assert_allclose(jnp.median(t), 5 * 0.5 / 3, atol=0.01)
    weight = meanflow.time_weight(shifted, t)
    np.testing.assert_allclose(weight.mean(), 1, atol=0.02)
    np.testing.assert_allclose(weight / weight[0], t * (1 - t) ** 0.5 / (t * (1 - t) ** 0.5)[0])


def test_weights_are_the_published_ones():
    """Catches an adaptive weight of means for sums, one with a gradient, and a scale that is not
    the mean of the rows with r = t."""
    x0, labels = batch()
    plain = dataclasses.replace(MeanFlow(), times="uniform", adaptive=0.0, equal=0.5)
    adaptive, balanced = (
        dataclasses.replace(plain, **change) for change in ({"adaptive": 1.0}, {"balance": True})
    )

    @functools.partial(jax.jit, static_argnums=0)
    def value(settings):
        return meanflow.loss(settings, smooth, x0, labels, jax.random.key(1), none=NONE)

    values = 12  # 2 x 2 x 3
    loss, _ = value(adaptive)
    assert 0.99 < loss < 1  # each row's l / (l + 0.01)
    loss, terms = value(balanced)
    np.testing.assert_allclose(loss, terms["mse"], rtol=1e-4)
    loss, terms = value(plain)
    np.testing.assert_allclose(loss, (terms["mse"] + terms["jump_mse"]) / 2)
    one = dataclasses.replace(adaptive, equal=1.0)
    few, key = (x0[:1], labels[:1]), jax.random.key(1)

    def scaled_loss(c):
        return meanflow.loss(one, lambda *a: c * smooth(*a), *few, key, none=NONE)

    @jax.jit
    def slopes(c):
        plain = jax.grad(lambda c: scaled_loss(c)[1]["mse"])(c)
        return jax.value_and_grad(scaled_loss, has_aux=True)(c), plain

    ((loss, terms), slope), want = slopes(1.0)
    np.testing.assert_allclose(loss, values * terms["mse"] / (values * terms["mse"] + 0.01))
    np.testing.assert_allclose(slope, want * values / (values * terms["mse"] + 0.01))


@pytest.mark.parametrize("target", ["u", pytest.param("v", marks=pytest.mark.slow)])
def test_a_small_network_learns_to_jump(target):
    """Catches an objective whose parts are right and that does not train: one jump of the network
    is within 0.05, where Euler on the velocity is 1.0 off."""
    sizes = ((3, 64), (64, 64), (64, 1))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [
        (jax.random.normal(k, s, jnp.float32) / np.sqrt(s[0]), jnp.zeros(s[1], jnp.float32))
        for k, s in zip(keys, sizes, strict=True)
    ]

    def apply(weights, x, s, labels, h):
        y = jnp.stack([x[:, 0, 0, 0], s, h], axis=-1)
        for i, (w, b) in enumerate(weights):
            y = y @ w + b
            y = jnp.tanh(y) if i < len(weights) - 1 else y
        return y.reshape(x.shape)

    settings = MeanFlow(target=target, equal=0.5, times="uniform", adaptive=0.0)
    steps, count = 4000, 512
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def loss(weights, key):
        data_key, key = jax.random.split(key)
        x0 = MEAN + DEVIATION * jax.random.normal(data_key, (count, 1, 1, 1), jnp.float32)
        net = functools.partial(apply, weights)
        return meanflow.loss(settings, net, x0, jnp.zeros(count, int), key, none=NONE)[0]

    def step(carry, i):
        weights, state = carry
        slopes = jax.grad(loss)(weights, jax.random.fold_in(jax.random.key(2), i))
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))(
        (weights, optimizer.init(weights))
    )
    start = jnp.asarray(START, jnp.float32)
    net = functools.partial(apply, weights)
    error = np.abs(
        samplers.jumps(net, start, None, np.array([0.0, 1.0])) - MEAN - DEVIATION * start
    )
    assert error.max() < 0.05, error.ravel()
