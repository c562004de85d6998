# SPDX-License-Identifier: Apache-2.0
"""Losses of the autoencoder. All float32, whatever dtype the model computes in."""

import jax
import jax.numpy as jnp

from dcae_jax.models import lpips
from dcae_jax.models.layers import Weights

Array = jax.Array


def l1(x: Array, y: Array) -> Array:
    """Mean absolute difference of two batches of images in [-1, 1], a scalar."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def psnr(x: Array, y: Array) -> Array:
    """PSNR in dB over a whole batch of images in [-1, 1], not rounded: for curves in training.

    The reported figure is `metrics.psnr`: per image, on 8-bit levels.
    """
    error = jnp.mean(jnp.square(jnp.clip(x, -1, 1) - y.astype(jnp.float32)))
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def perceptual(weights: Weights, x: Array, y: Array) -> Array:
    """Mean LPIPS (VGG16, v0.1) of two batches of images in [-1, 1], a scalar.

    At the platform's own precision: the reported LPIPS is computed at the highest one.
    """
    precision = jax.lax.Precision.DEFAULT
    return jnp.mean(lpips.distance(weights, x, y, net="vgg", precision=precision))
