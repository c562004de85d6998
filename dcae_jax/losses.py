# SPDX-License-Identifier: Apache-2.0
"""Losses of the autoencoder and its discriminator. All float32, whatever the models compute in."""

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


def hinge(real: Array, fake: Array) -> Array:
    """The discriminator's loss: 1 where it knows nothing, 0 where all logits pass +-1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def lecam(real: Array, fake: Array, real_mean: Array, fake_mean: Array) -> Array:
    """LeCAM (Tseng et al. 2021, eq. 5): keeps logits near the running mean of the other side."""
    far_real = jnp.mean(jnp.square(jax.nn.relu(real - fake_mean)))
    return far_real + jnp.mean(jnp.square(jax.nn.relu(real_mean - fake)))


def adaptive_weight(reconstruction_norm: Array, gan_norm: Array, limit: float) -> Array:
    """The GAN loss's factor that gives it the pull of the reconstruction loss (Esser et al. 2021).

    Norms are of the two losses' gradients at the last layer's kernel. `limit` bounds the factor:
    with a discriminator that is sure of itself the ratio explodes.
    """
    return jnp.clip(reconstruction_norm / (gan_norm + 1e-6), 0, limit)


def diff_augment(key: Array, x: Array) -> Array:
    """DiffAugment (Zhao et al. 2020): colour, translation by up to 1/8, cut-out of half the side.

    [B, H, W, 3] -> the same shape. Differentiable, drawn for each image from `key`. Real and fake
    pictures both pass through it, so that the discriminator cannot learn few pictures by heart.
    """
    b, h, w, _ = x.shape
    keys = jax.random.split(key, 7)

    def draw(k, low, high):
        return jax.random.uniform(k, (b, 1, 1, 1), jnp.float32, low, high)

    x = x + draw(keys[0], -0.5, 0.5)
    grey = x.mean(-1, keepdims=True)
    x = (x - grey) * draw(keys[1], 0, 2) + grey
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * draw(keys[2], 0.5, 1.5) + mean

    rows, columns = jnp.arange(h)[None, :], jnp.arange(w)[None, :]
    down = jax.random.randint(keys[3], (b, 1), -h // 8, h // 8 + 1)
    right = jax.random.randint(keys[4], (b, 1), -w // 8, w // 8 + 1)
    x = jnp.take_along_axis(x, jnp.clip(rows - down, 0, h - 1)[:, :, None, None], axis=1)
    x = jnp.take_along_axis(x, jnp.clip(columns - right, 0, w - 1)[:, None, :, None], axis=2)
    inside = ((rows >= down) & (rows < h + down))[:, :, None] & (
        (columns >= right) & (columns < w + right)
    )[:, None, :]
    top = jax.random.randint(keys[5], (b, 1), 0, h - h // 2 + 1)
    left = jax.random.randint(keys[6], (b, 1), 0, w - w // 2 + 1)
    hole = ((rows >= top) & (rows < top + h // 2))[:, :, None] & (
        (columns >= left) & (columns < left + w // 2)
    )[:, None, :]
    return x * (inside & ~hole)[..., None]
