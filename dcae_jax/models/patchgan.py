# SPDX-License-Identifier: Apache-2.0
"""PatchGAN, the discriminator of phase 3 (Isola et al. 2017, section 3.2.2; 3 layers, 64 channels).

It classifies each patch of an image as real or fake. 4x4 convolutions; each layer halves the size
and doubles the channels. Weights start from normal(0, 0.02), as in published discriminators.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from flax.nnx import Rngs
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from dcae_jax.config.schema import Loss
from dcae_jax.models.layers import ZEROS, Layers, normal
from dcae_jax.models.weights import Array

MAX_WIDENING = 8  # channels stop growing at this multiple of the first layer's
GROUPS = 8
EPS = 1e-5
SLOPE = 0.2  # of the leaky ReLU


class PatchGAN(nnx.Module):
    """Images [B, H, W, 3] in [-1, 1] -> patch logits [B, h, w] float32, above 0 for real."""

    def __init__(self, *, channels: int, depth: int, dtype: DTypeLike, rngs: Rngs) -> None:
        widths = [channels * min(2**i, MAX_WIDENING) for i in range(depth + 1)]
        layers = Layers(dtype, rngs)
        conv = functools.partial(
            nnx.Conv,
            kernel_size=(4, 4),
            padding=((1, 1), (1, 1)),
            kernel_init=normal(0.02),
            bias_init=ZEROS,
            dtype=dtype,
            rngs=rngs,
        )
        self.convs = nnx.List([conv(3, widths[0], strides=2)])
        self.norms = nnx.List()
        for i in range(1, depth + 1):
            strides = 2 if i < depth else 1
            self.convs.append(conv(widths[i - 1], widths[i], strides=strides, use_bias=False))
            self.norms.append(layers.group_norm(widths[i], groups=GROUPS, eps=EPS))
        self.project_out = conv(widths[-1], 1)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float32[Array, "B h w"]:
        x = nnx.leaky_relu(self.convs[0](x), SLOPE)  # [B, H/2, W/2, C]
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = nnx.leaky_relu(norm(conv(x)), SLOPE)  # [B, H/4, W/4, 2C] .. [B, h+1, w+1, 8C]
        return self.project_out(x)[..., 0].astype(jnp.float32)  # [B, h, w]


def create(loss_config: Loss, *, dtype: DTypeLike, rngs: Rngs) -> PatchGAN:
    """The discriminator that config.loss describes."""
    return PatchGAN(
        channels=loss_config.gan_channels, depth=loss_config.gan_layers, dtype=dtype, rngs=rngs
    )


def smallest_input(depth: int) -> int:
    """The smallest image side in pixels that gives a PatchGAN of `depth` layers an output."""
    size = 1
    for stride in (1, 1, *(2,) * depth):  # from the output back to the image
        size = (size - 1) * stride + 4 - 2
    return max(size, 2**depth)
