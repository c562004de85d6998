# SPDX-License-Identifier: Apache-2.0
"""Diffusion objectives: how latents are noised, and what a model is trained to predict.

There are four, one per row of OBJECTIVES. "epsilon" (UViT): the noise of a discrete chain of 1000
steps. "learned_sigma" (DiT): the noise of another such chain, and the variance of each reverse
step. "flow" (SiT): the velocity along the straight line from noise to data. "meanflow": the average
velocity between two points of that line; its loss has settings and is in meanflow.py.

A chain is given by its `betas` [N], the variances of the noise that each step adds. Steps are
counted from 0 here; UViT's time input is the step plus one, DiT's the step itself. Tables are
computed in float64 with NumPy and used in the dtype of the latents.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Float, Float32, Int, Key, Shaped

from dcae_jax.errors import UserError
from dcae_jax.models import layers

Array = jax.Array
# Conditioning besides the time: a pytree of arrays with a leading axis B. In all models so far,
# labels [B].
Cond = Any
# (x_t [B, h, w, c], time [B] as the network takes it, cond) -> prediction [B, h, w, c or 2 c]
Model = Callable[[Array, Array, Cond], Array]
# (model, x0 [B, h, w, c], cond, key, channels [B] or None) -> (scalar, its terms). It may call the
# model and draw from the key any number of times.
LossAndTerms = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
Loss = Callable[[Model, Array, Cond, Array, Array | None], LossAndTerms]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """An objective's loss, and what sampling needs to know about it."""

    loss: Loss | None  # None: meanflow.loss
    samplers: tuple[str, ...]  # that fit, from samplers.py; the first is the default
    noise_level: Callable[[Array], Array]  # network time -> from 0 (data) to 1 (pure noise)
    betas: np.ndarray | None = None  # [N] of the chain, noise prediction; None: velocity prediction
    first: int = 0  # the network's time input at the chain's step 0
    learned_variance: bool = False  # a prediction is then [B, h, w, 2 c]: noise, v
    folded: bool = False  # guidance is part of what is trained, none is added in sampling


def objective(name: str) -> Objective:
    """The objective called `name`. Raises UserError."""
    if name not in OBJECTIVES:
        raise UserError(f"objective={name!r} is not known; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def loss(
    name: str,
    model: Model,
    x0: Float[Array, "B h w c"],
    cond: Cond,
    key: Key[Array, ""],
    channels: Int[Array, " B"] | None = None,
) -> LossAndTerms:
    """The loss of a batch of clean, scaled latents x0 [B, h, w, c]: a scalar, and its terms.

    channels: how many of each example's channels are there. The model sees zeros in the others,
    and its prediction of them does not count (DC-AE 1.5, arXiv:2508.00413); None: all are there.

    The terms: "mse", and for learned_sigma "vb" in bits per value. The draws of example i come
    from fold_in(key, i), so they do not depend on how the batch is sharded. Raises UserError
    for an unknown objective.
    """
    found = objective(name).loss
    if found is None:
        raise ValueError(f"the loss of objective={name!r} takes settings: meanflow.loss")
    return found(model, x0, cond, key, channels)


def scaled(latents: Float[Array, "*n c"], scaling_factor: float) -> Float32[Array, "*n c"]:
    """The latents that a diffusion model is trained on: the autoencoder's, scaled to an rms of 1.

    Only this function and `unscaled` apply the factor.
    """
    return latents.astype(jnp.float32) * scaling_factor


def unscaled(latents: Float[Array, "*n c"], scaling_factor: float) -> Float32[Array, "*n c"]:
    """The latents that the autoencoder decodes: the inverse of `scaled`."""
    return latents.astype(jnp.float32) / scaling_factor


def scaled_linear_betas(n: int = 1000) -> Float[np.ndarray, " {n}"]:
    """Betas [n] whose square roots are evenly spaced: those of UViT (and of Stable Diffusion)."""
    return np.linspace(np.sqrt(0.00085), np.sqrt(0.0120), n) ** 2


def linear_betas(n: int = 1000) -> Float[np.ndarray, " {n}"]:
    """Evenly spaced betas [n]: those of DDPM (Ho et al. 2020, section 4) and DiT."""
    return np.linspace(1e-4, 0.02, n)


def log_alphas(betas: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """log alpha [N]: log of the factor of x0 in x_t after each step (Ho et al. 2020, eq. 4)."""
    return 0.5 * np.cumsum(np.log1p(-np.asarray(betas, np.float64)))


def epsilon_loss(
    model: Model,
    x0: Float[Array, "B h w c"],
    cond: Cond,
    key: Key[Array, ""],
    channels: Int[Array, " B"] | None = None,
) -> LossAndTerms:
    """UViT's loss: MSE of the predicted noise (Ho et al. 2020, eq. 14). Time inputs are 1..1000."""
    betas = scaled_linear_betas()
    n, noise = _draws(key, x0, lambda k: jax.random.randint(k, (), 0, len(betas)))
    x_t = q_sample(betas, x0, n, noise)  # [B, h, w, c]
    x_t = first(x_t, channels)
    prediction = model(x_t, (n + 1).astype(x0.dtype), cond).astype(x0.dtype)
    mse = _mean(jnp.square(prediction - noise), channels)
    return mse, {"mse": mse}


def learned_sigma_loss(
    model: Model,
    x0: Float[Array, "B h w c"],
    cond: Cond,
    key: Key[Array, ""],
    channels: Int[Array, " B"] | None = None,
) -> LossAndTerms:
    """DiT's loss: MSE of the noise plus the variational bound, which trains only the variance.

    Nichol & Dhariwal 2021, section 3.1, with DiT's weight of 1 for the bound of a single step.
    Time inputs are 0..999; the network returns 2 c channels: the noise, then v.
    """
    betas = linear_betas()
    n, noise = _draws(key, x0, lambda k: jax.random.randint(k, (), 0, len(betas)))
    x_t = q_sample(betas, x0, n, noise)  # [B, h, w, c]
    prediction = model(first(x_t, channels), n.astype(x0.dtype), cond)  # [B, h, w, 2 c]
    prediction = prediction.astype(x0.dtype)
    epsilon, v = jnp.split(prediction, 2, axis=-1)  # [B, h, w, c] each
    mse = _mean(jnp.square(epsilon - noise), channels)
    detached = jax.lax.stop_gradient(epsilon)
    vb = jnp.mean(variational_bound(betas, x0, x_t, n, detached, v, channels))
    return mse + vb, {"mse": mse, "vb": vb}


def flow_loss(
    model: Model,
    x0: Float[Array, "B h w c"],
    cond: Cond,
    key: Key[Array, ""],
    channels: Int[Array, " B"] | None = None,
) -> LossAndTerms:
    """SiT's loss: MSE of the velocity (Ma et al. 2024), linear path; time 0 is noise, 1 is data."""
    t, noise = _draws(key, x0, lambda k: jax.random.uniform(k, (), x0.dtype))
    x_t = _like(t, x0) * x0 + _like(1 - t, x0) * noise  # [B, h, w, c]
    prediction = model(first(x_t, channels), t, cond).astype(x0.dtype)
    mse = _mean(jnp.square(prediction - (x0 - noise)), channels)
    return mse, {"mse": mse}


def _draws(key: Array, x0: Array, draw_time: Callable[[Array], Array]) -> tuple[Array, Array]:
    """A time [B] and noise [B, ...] for each example, from fold_in(key, its index)."""

    def draw(i: Array) -> tuple[Array, Array]:
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        return draw_time(time_key), jax.random.normal(noise_key, x0.shape[1:], x0.dtype)

    return jax.vmap(draw)(jnp.arange(x0.shape[0]))


def first(x: Array, channels: Array | None) -> Array:
    """x [B, h, w, c] with zeros from each example's number of channels [B] on; None: x."""
    return x if channels is None else layers.first_channels(x, channels)


def _mean(x: Array, channels: Array | None) -> Array:
    """The mean over examples of the mean of x [B, h, w, c] over their first channels [B]."""
    return jnp.mean(x if channels is None else example_means(x, channels))


def example_means(x: Array, channels: Array | None) -> Array:
    """The mean of each example of x [B, h, w, c], over its first channels [B]; None: over all."""
    if channels is None:
        return jnp.mean(x, axis=range(1, x.ndim))
    return jnp.sum(first(x, channels), (1, 2, 3)) / (x.shape[1] * x.shape[2] * channels)


def _like(a: Shaped[Array, " B"], x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """[B] -> [B, 1, ...], to broadcast against x."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _at(table: np.ndarray, n: Array, x: Array) -> Array:
    """Entries n [B] of a table [N], as [B, 1, ...] in the dtype of x."""
    return _like(jnp.asarray(table, x.dtype)[n], x)


def q_mean_variance(
    betas: Float[np.ndarray, " N"], x0: Float[Array, "B h w c"], n: Int[Array, " B"]
) -> tuple[Float[Array, "B h w c"], Float[Array, "B ..."]]:
    """Mean [B, ...] and variance [B, 1, ...] of x_t given x0, after step n [B] (0..N-1).

    Ho et al. 2020, eq. 4.
    """
    log_alpha = log_alphas(betas)
    return _at(np.exp(log_alpha), n, x0) * x0, _at(-np.expm1(2 * log_alpha), n, x0)


def q_sample(
    betas: Float[np.ndarray, " N"],
    x0: Float[Array, "B h w c"],
    n: Int[Array, " B"],
    noise: Float[Array, "B h w c"],
) -> Float[Array, "B h w c"]:
    """x_t after step n [B]: clean latents x0 [B, ...] with standard normal `noise` mixed in."""
    mean, variance = q_mean_variance(betas, x0, n)
    return mean + jnp.sqrt(variance) * noise


def x0_from_epsilon(
    betas: Float[np.ndarray, " N"],
    x_t: Float[Array, "B h w c"],
    n: Int[Array, " B"],
    epsilon: Float[Array, "B h w c"],
) -> Float[Array, "B h w c"]:
    """The x0 of x_t if `epsilon` is the noise in it (Ho et al. 2020, eq. 4 solved for x0)."""
    log_alpha = log_alphas(betas)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    return _at(np.exp(-log_alpha), n, x_t) * (x_t - _at(sigma, n, x_t) * epsilon)


def posterior(
    betas: Float[np.ndarray, " N"],
    x0: Float[Array, "B h w c"],
    x_t: Float[Array, "B h w c"],
    n: Int[Array, " B"],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Mean, variance and clipped log variance of x before step n [B], given x0 and x_t.

    Ho et al. 2020, eq. 7. The variance [B, 1, ...] is 0 at n = 0; the log variance is that of
    n = 1 there (Nichol & Dhariwal 2021).
    """
    log_alpha, before, variance = _posterior_tables(betas)
    denominator = -np.expm1(2 * log_alpha)
    of_x0 = np.exp(before) * betas / denominator
    of_x_t = np.sqrt(1 - betas) * -np.expm1(2 * before) / denominator
    mean = _at(of_x0, n, x_t) * x0 + _at(of_x_t, n, x_t) * x_t
    return mean, _at(variance, n, x_t), _at(_clipped_log(variance), n, x_t)


def _posterior_tables(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log alpha after and before each step, and the posterior's variance."""
    log_alpha = log_alphas(betas)
    before = np.concatenate([[0.0], log_alpha[:-1]])
    return log_alpha, before, betas * np.expm1(2 * before) / np.expm1(2 * log_alpha)


def _clipped_log(variance: np.ndarray) -> np.ndarray:
    return np.log(np.concatenate([variance[1:2], variance[1:]]))


def learned_log_variance(
    betas: Float[np.ndarray, " N"], v: Float[Array, "B h w c"], n: Int[Array, " B"]
) -> Float[Array, "B h w c"]:
    """Log variance of a reverse step: v = -1 gives the posterior's, v = 1 gives log beta.

    Nichol & Dhariwal 2021, eq. 15, with v in [-1, 1] instead of [0, 1]. v [B, ...], n [B].
    """
    low = _at(_clipped_log(_posterior_tables(betas)[2]), n, v)
    high = _at(np.log(betas), n, v)
    weight = (v + 1) / 2
    return weight * high + (1 - weight) * low


def normal_kl(mean: Array, log_variance: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL divergence in nats of a normal distribution from a second one, elementwise."""
    difference = log_variance2 - log_variance
    distance = jnp.square(mean - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (difference - 1 + jnp.exp(-difference) + distance)


def discretised_log_likelihood(x: Array, mean: Array, log_variance: Array) -> Array:
    """Log probability in nats of the bin around x, of 256 over [-1, 1] (Ho et al. 2020, eq. 13).

    A bin is 2/255 wide; those at -1 and 1 extend to infinity. At least log 1e-12, as in the code
    that came with the papers; the normal distribution's integral is exact here, where that code
    approximates it by a tanh.
    """
    inverse = jnp.exp(-0.5 * log_variance)
    centred, half = x - mean, 1 / 255
    # Each integral in the left tail, where the difference of two keeps its digits.
    outside = -jnp.abs(centred)
    inside = ndtr((outside + half) * inverse) - ndtr((outside - half) * inverse)
    below = ndtr((half + centred) * inverse)
    above = ndtr((half - centred) * inverse)
    probability = jnp.where(x < -0.999, below, jnp.where(x > 0.999, above, inside))
    return jnp.log(jnp.maximum(probability, 1e-12))


def variational_bound(
    betas: Float[np.ndarray, " N"],
    x0: Float[Array, "B h w c"],
    x_t: Float[Array, "B h w c"],
    n: Int[Array, " B"],
    epsilon: Float[Array, "B h w c"],
    v: Float[Array, "B h w c"],
    channels: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The bound's term of step n [B], in bits per value, averaged over each example: [B].

    The KL divergence of the model's reverse step from the posterior; at n = 0 the negative
    discretised log likelihood of x0 (Nichol & Dhariwal 2021, section 2.1). channels: see `loss`.
    """
    true_mean, _, true_log_variance = posterior(betas, x0, x_t, n)
    mean, _, _ = posterior(betas, x0_from_epsilon(betas, x_t, n, epsilon), x_t, n)
    log_variance = learned_log_variance(betas, v, n)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretised_log_likelihood(x0, mean, log_variance)
    term = jnp.where(_like(n == 0, x0), nll, kl)
    return example_means(term, channels) / np.log(2)


_DPM = ("dpm_fast", "dpmpp_2m", "dpmpp_3m", "ddim")
OBJECTIVES = {
    "epsilon": Objective(
        loss=epsilon_loss,
        samplers=(*_DPM, "ddpm"),
        noise_level=lambda time: time / 1000,
        betas=scaled_linear_betas(),
        first=1,
    ),
    "learned_sigma": Objective(
        loss=learned_sigma_loss,
        samplers=("ddpm", *_DPM),
        noise_level=lambda time: (time + 1) / 1000,
        betas=linear_betas(),
        first=0,
        learned_variance=True,
    ),
    "flow": Objective(
        loss=flow_loss,
        samplers=("dopri5", "euler", "heun"),
        noise_level=lambda time: 1 - time,
    ),
    "meanflow": Objective(
        loss=None,
        samplers=("jumps", "euler", "heun", "dopri5"),
        noise_level=lambda time: 1 - time,
        folded=True,
    ),
}
