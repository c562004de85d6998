# SPDX-License-Identifier: Apache-2.0
"""Average velocities: MeanFlow (Geng et al. 2025, arXiv:2505.13447), for samples in 1 to 4 jumps.

This file uses MeanFlow's convention, in which t = 0 is data and t = 1 is noise:

    z_t = (1 - t) x + t e,    v = e - x,    z_r = z_t - (t - r) u(z_t, t, r),    r <= t

u is the average velocity between r and t; u(z, t, t) is the marginal velocity E[v | z]. Along a
path it satisfies u = v - (t - r) du/dt (eq. 6). Networks and samplers follow SiT, whose time runs
the other way; only `average_velocity` translates.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float, Int, Key

from dcae_jax.config.schema import MeanFlow
from dcae_jax.diffusion.objectives import Array, LossAndTerms, example_means, first

T = TypeVar("T")
# (z [B, h, w, c], t [B], r [B], labels [B]) -> u [B, h, w, c]
Velocity = Callable[[Array, Array, Array, Array], Array]

ADAPTIVE = 0.01  # added to a squared error before the adaptive weight (MeanFlow, section 4.3)
BALANCE = 1e-5  # added to an error before it is divided by (AnyFlow)
POINTS = 4096  # quantiles over which the time weight is normalised


def average_velocity(network: Callable[..., Array]) -> Velocity:
    """u(z, t, r, labels) of a network (x, s, labels, h) -> average of dx/ds from s to s + h.

    s = 1 - t is SiT's time: 0 is noise.
    """

    def u(z: Array, t: Array, r: Array, labels: Array) -> Array:
        return -network(z, 1 - t, labels, t - r).astype(z.dtype)

    return u


def loss(
    settings: MeanFlow,
    network: Callable[..., Array],
    x0: Float[Array, "B h w c"],
    labels: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    none: int,
    channels: Int[Array, " B"] | None = None,
    copies: int = 1,
) -> LossAndTerms:
    """The loss of clean, scaled latents x0 [B, h, w, c]: a scalar, and its terms.

    A fixed part of the rows, `settings.equal`, has r = t and is flow matching; only the others need
    du/dt. labels equal to `none` are dropped ones, which guidance does not apply to. The terms,
    unweighted mean squared errors: "mse" of the rows with r = t, "jump_mse" of the others. The
    draws of example i come from fold_in(key, i), so they do not depend on sharding.

    channels: see `objectives.loss`. copies: how often each example stands in the batch, next to
    itself; its copies all have r = t, or none, as else the copy would tell how many channels.
    """
    u, still = average_velocity(network), average_velocity(constant(network))
    t, other, noise = draws(settings, x0, key)
    equal, jump = split((x0, t, other, noise, labels, channels), settings.equal, copies)
    errors, weights, terms = [], [], {}
    if len(equal[0]):
        x, t, _, e, y, c = equal
        z = first(_mix(x, e, t), c)
        prediction = u(z, t, t, y)  # [n, h, w, c]
        own = jax.lax.stop_gradient(prediction)
        target = guided(settings, still, z, t, y, e - x, none, own)
        errors.append(example_means(jnp.square(prediction - target), c))
        weights.append(time_weight(settings, t))
        terms["mse"] = jnp.mean(errors[0])
    if len(jump[0]):
        x, t, other, e, y, c = jump
        t, r = jnp.maximum(t, other), jnp.minimum(t, other)
        z = first(_mix(x, e, t), c)
        error = jump_error(settings, u, still, z, t, r, y, e - x, none, c)
        scale = terms["mse"] / (error + BALANCE) if settings.balance else 1
        errors.append(error)
        weights.append(time_weight(settings, t) * jax.lax.stop_gradient(scale))
        terms["jump_mse"] = jnp.mean(error)
    error, weight = jnp.concatenate(errors), jnp.concatenate(weights)  # [B]
    kept = x0.shape[3] if channels is None else jnp.concatenate([equal[-1], jump[-1]])
    values = x0.shape[1] * x0.shape[2] * kept
    adaptive = (jax.lax.stop_gradient(error) + ADAPTIVE / values) ** settings.adaptive
    return jnp.mean(weight * error / adaptive), terms


def jump_error(
    settings: MeanFlow,
    u: Velocity,
    still: Velocity,
    z: Float[Array, "B h w c"],
    t: Float[Array, " B"],
    r: Float[Array, " B"],
    labels: Int[Array, " B"],
    v: Float[Array, "B h w c"],
    none: int,
    channels: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Mean squared error [B] of u(z, t, r) against v_g - (t - r) du/dt (MeanFlow, eq. 10).

    v: the conditional velocity e - x of each example, or the marginal one, if it is known. still: u
    without a gradient. The path of du/dt follows v_g, or with target="v" the network's own
    u(z, t, t), as in iMF (arXiv:2512.02012) without its second head. channels: z has zeros from
    each example's number on, and so has its path.
    """
    own = None
    if settings.target == "v" or settings.mix:
        own = still(z, t, t, labels)
    v_g = guided(settings, still, z, t, labels, v, none, own)
    tangent = own if own is not None and settings.target == "v" else v_g
    slope = total_derivative(settings, still, z, t, r, labels, first(tangent, channels))
    target = jax.lax.stop_gradient(v_g - _wide(t - r) * slope)
    return example_means(jnp.square(u(z, t, r, labels) - target), channels)


def total_derivative(
    settings: MeanFlow,
    u: Velocity,
    z: Float[Array, "B h w c"],
    t: Float[Array, " B"],
    r: Float[Array, " B"],
    labels: Int[Array, " B"],
    tangent: Float[Array, "B h w c"],
) -> Float[Array, "B h w c"]:
    """du/dt [B, h, w, c] at fixed r, along a path of velocity `tangent`."""
    if settings.derivative == "jvp":
        primals, tangents = (z, t), (tangent, jnp.ones_like(t))
        return jax.jvp(lambda z, t: u(z, t, r, labels), primals, tangents)[1]
    step = settings.difference_step
    # Neighbours [B, 2, ...], so each device keeps its own examples.
    both = jnp.stack([z + step * tangent, z - step * tangent], axis=1)
    times = jnp.stack([t + step, t - step], axis=1)
    after = u(
        both.reshape(-1, *z.shape[1:]), times.reshape(-1), jnp.repeat(r, 2), jnp.repeat(labels, 2)
    ).reshape(both.shape)
    return (after[:, 0] - after[:, 1]) / (2 * step)


def guided(
    settings: MeanFlow,
    still: Velocity,
    z: Float[Array, "B h w c"],
    t: Float[Array, " B"],
    labels: Int[Array, " B"],
    v: Float[Array, "B h w c"],
    none: int,
    own: Float[Array, "B h w c"] | None,
) -> Float[Array, "B h w c"]:
    """v with guidance folded in [B, h, w, c] (MeanFlow, appendix B.1), without a gradient.

    w v + (1 - w - k) u(z, t, t | none) + k own, own = u(z, t, t | label), k = settings.mix,
    w = settings.guidance * (1 - k): a network that fits it has the guidance scale w / (1 - k). v
    itself outside the interval, and where the label is dropped.
    """
    k = settings.mix
    w = settings.guidance * (1 - k)
    if settings.guidance == 1 and not k:
        return v
    new = w * v + (1 - w - k) * still(z, t, t, jnp.full_like(labels, none))
    if own is not None:
        new += k * own
    low, high = settings.guidance_interval
    acts = (low <= t) & (t <= high) & (labels != none)
    return jnp.where(_wide(acts), new, v)


# --- rows and times -------------------------------------------------------------------------------


def rows_equal(share: float, count: int) -> int:
    """The number of rows with r = t in a (micro)batch of `count`."""
    return round(share * count)


def split(
    arrays: tuple[Array | None, ...], share: float, copies: int = 1
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays [B, ...] of the rows with r = t, and of the others; which is static.

    The rows with r = t lie evenly among the others, so each device keeps its own examples. An
    example's copies, `copies` neighbours, stay together. None stays None.
    """
    rows = next(len(a) for a in arrays if a is not None)
    count = rows // copies
    chosen = rows_equal(share, count)
    groups = math.gcd(chosen, count)

    def part(a: Array | None, start: int, stop: int) -> Array | None:
        if a is None:
            return None
        grouped = a.reshape(groups, count // groups, copies, *a.shape[1:])
        return grouped[:, start:stop].reshape(-1, *a.shape[1:])

    each = chosen // groups
    equal = tuple(part(a, 0, each) for a in arrays)
    return equal, tuple(part(a, each, count // groups) for a in arrays)


def draws(
    settings: MeanFlow, x0: Float[Array, "B h w c"], key: Key[Array, ""]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, "B h w c"]]:
    """(a time [B], a second time [B], noise [B, h, w, c]) of each example.

    The second time is 0 for `settings.to_data` of the batch. The first time, if uniform, and the
    noise are those of `objectives.flow_loss`.
    """
    to_data = settings.to_data / max(1 - settings.equal, settings.to_data, 1e-9)

    def draw(i: Array) -> tuple[Array, Array, Array]:
        example = jax.random.fold_in(key, i)
        time_key, noise_key = jax.random.split(example)
        other_key, chance_key = jax.random.split(jax.random.fold_in(example, 2))
        other = _time(settings, other_key, x0.dtype)
        zero = jax.random.uniform(chance_key, (), x0.dtype) < to_data
        noise = jax.random.normal(noise_key, x0.shape[1:], x0.dtype)
        return _time(settings, time_key, x0.dtype), jnp.where(zero, 0, other), noise

    return jax.vmap(draw)(jnp.arange(len(x0)))


def _time(settings: MeanFlow, key: Array, dtype: Any) -> Array:
    if settings.times == "uniform":
        t = 1 - jax.random.uniform(key, (), dtype)
    else:
        normal = jax.random.normal(key, (), dtype)
        t = jax.nn.sigmoid(settings.time_mean + settings.time_std * normal)
    return shifted(t, settings.shift)


def shifted(t: T, shift: float) -> T:
    """t moved towards noise for shift > 1 (AnyFlow; Esser et al. 2024, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)  # pyright: ignore[reportOperatorIssue]


def time_weight(settings: MeanFlow, t: Float[Array, " B"]) -> Float[Array, " B"]:
    """The weight [B] of a loss at time t: 1, or AnyFlow's t sqrt(1 - t) over its mean."""
    if settings.weighting == "none":
        return jnp.ones_like(t)
    quantiles = (np.arange(POINTS) + 0.5) / POINTS
    if settings.times != "uniform":
        normal = settings.time_mean + settings.time_std * scipy.special.ndtri(quantiles)
        quantiles = scipy.special.expit(normal)
    grid = shifted(quantiles, settings.shift)
    return t * jnp.sqrt(1 - t) / float(np.mean(grid * np.sqrt(1 - grid)))


# --- parts ----------------------------------------------------------------------------------------


def constant(network: T) -> T:
    """The network with its arrays, if it has any, as constants: nothing differentiates them."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, network
    )


def _mix(x: Array, noise: Array, t: Array) -> Array:
    return (1 - _wide(t)) * x + _wide(t) * noise


def _wide(a: Array) -> Array:
    """[B] -> [B, 1, 1, 1]."""
    return a[:, None, None, None]
