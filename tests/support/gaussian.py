# SPDX-License-Identifier: Apache-2.0
"""Diffusion of a Gaussian, whose best prediction and exact solution are known."""

import jax.numpy as jnp
import numpy as np

from dcae_jax.diffusion import objectives

# The data: one number, normally distributed.
MEAN, DEVIATION = 0.7, 0.5
START = np.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
WIDE = np.tile(START, (1, 2, 1, 3))  # [B, h, w, c] of different sizes
BETAS = {"epsilon": objectives.scaled_linear_betas(), "learned_sigma": objectives.linear_betas()}
COUNTS = (120, 240, 480)


def wide(a):
    return a[:, None, None, None]


def epsilon_of(x, log_alpha):
    """The best prediction of the noise in x [B, 1, 1, 1], given log alpha [B]."""
    alpha, variance = wide(jnp.exp(log_alpha)), wide(-jnp.expm1(2 * log_alpha))
    return jnp.sqrt(variance) * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + variance)


def chain_log_alpha(objective, time):
    """log alpha at the time that the network is given, linear between the chain's steps."""
    table = jnp.asarray(np.log(np.cumprod(1 - BETAS[objective])) / 2)
    first = {"epsilon": 1, "learned_sigma": 0}[objective]
    return jnp.interp(time, jnp.arange(1000.0) + first, table)


def chain_model(objective, x, time, cond=None):
    epsilon = epsilon_of(x, chain_log_alpha(objective, time))
    extra = [epsilon] if objective == "learned_sigma" else []
    return jnp.concatenate([epsilon, *extra], axis=-1)


def velocity(x, t, cond=None):
    """The best prediction of data - noise on the line from noise (t = 0) to data (t = 1)."""
    t = wide(t)
    variance = t**2 * DEVIATION**2 + (1 - t) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


def exact(x, log_alpha, log_alpha_end):
    """Where the probability flow ODE takes x: to the same quantile."""
    spread = [
        np.sqrt(np.exp(2 * a) * DEVIATION**2 - np.expm1(2 * a)) for a in (log_alpha, log_alpha_end)
    ]
    return np.exp(log_alpha_end) * MEAN + (x - np.exp(log_alpha) * MEAN) * spread[1] / spread[0]


def order_of(errors):
    """The slope of log error over log steps, for three errors with steps doubled each time."""
    return np.log2(errors[0] / errors[2]) / 2
