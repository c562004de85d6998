# SPDX-License-Identifier: Apache-2.0
"""PatchGAN, the discriminator of phase 3 (Isola et al. 2017, section 3.2.2; 3 layers, 64 channels).

It says of each patch of a picture whether it is real. Convolutions of 4x4; each layer halves the
size and doubles the channels; normal(0, 0.02) weights, as published discriminators start from.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcae_jax.models import layers
from dcae_jax.models.layers import Array

MAX_WIDENING = 8  # channels stop growing at this multiple of the first layer's
GROUPS = 8


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 0.02 * rng.standard_normal(shape, np.float32)


def _conv(inputs, outputs, *, stride, use_bias, dtype, init):
    """A 4x4 convolution whose weights start at normal(0, 0.02) and bias at 0."""

    def fill(shape, _):
        return init(shape, layers.zeros if len(shape) == 1 else _normal)

    return layers.Conv(
        inputs, outputs, size=4, stride=stride, use_bias=use_bias, dtype=dtype, init=fill
    )


class GroupNorm(nnx.Module):
    """Statistics over (height, width, channels of a group) of each image, float32 inside."""

    def __init__(self, channels, *, dtype, init, eps=1e-5):
        self.scale = nnx.Param(init((channels,), layers.ones))
        self.bias = nnx.Param(init((channels,), layers.zeros))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        grouped = x.astype(jnp.float32).reshape(b, h, w, GROUPS, c // GROUPS)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        var = grouped.var((1, 2, 4), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(var + self.eps)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class PatchGAN(nnx.Module):
    """Pictures [B, H, W, 3] in [-1, 1] -> logits [B, h, w] float32, above 0 for real."""

    def __init__(self, *, channels: int, depth: int, dtype: Any, init: layers.Init):
        kw = dict(dtype=dtype, init=init)
        widths = [channels * min(2**i, MAX_WIDENING) for i in range(depth + 1)]
        self.convs = nnx.List([_conv(3, widths[0], stride=2, use_bias=True, **kw)])
        self.norms = nnx.List()
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 2 if i < depth else 1
            self.convs.append(_conv(inputs, outputs, stride=stride, use_bias=False, **kw))
            self.norms.append(GroupNorm(outputs, **kw))
        self.project_out = _conv(widths[-1], 1, stride=1, use_bias=True, **kw)

    def __call__(self, x: Array) -> Array:
        x = nnx.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = nnx.leaky_relu(norm(conv(x)), 0.2)
        return self.project_out(x)[..., 0].astype(jnp.float32)


def create(loss_config: Any, *, dtype: Any, init: layers.Init) -> PatchGAN:
    """The discriminator that config.loss describes."""
    return PatchGAN(
        channels=loss_config.gan_channels,
        depth=loss_config.gan_layers,
        dtype=jnp.dtype(dtype),
        init=init,
    )


def smallest_input(depth: int) -> int:
    """Pixels a side below which a PatchGAN of `depth` layers has no patch left."""
    size = 1
    for stride in (1, 1, *(2,) * depth):  # from the output back to the picture
        size = (size - 1) * stride + 4 - 2
    return max(size, 2**depth)
