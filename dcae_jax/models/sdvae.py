# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Stable Diffusion (arXiv:2112.10752), diffusers' `AutoencoderKL`: the f8
baseline that DC-AE is measured against.

Its encoder gives a Gaussian for each latent; `encode` returns the mean, or a sample of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dcae_jax.config import UserError
from dcae_jax.models import layers
from dcae_jax.models.layers import Array

EPS = 1e-6  # of every GroupNorm
LOG_VARIANCE = (-30.0, 20.0)  # the posterior's is clipped to this


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture. `widths` has one entry a stage, from full size to the deepest."""

    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2  # residual blocks a stage of the encoder; the decoder has one more
    groups: int = 32  # of every GroupNorm
    scaling_factor: float | None = 0.18215  # latent * scaling_factor has an rms of about 1

    @property
    def compression(self) -> int:
        """Pixels a side that one latent position stands for (f)."""
        return 2 ** (len(self.widths) - 1)

    @property
    def encoder_depths(self) -> tuple[int, ...]:
        return (self.depth,) * len(self.widths)

    @property
    def decoder_depths(self) -> tuple[int, ...]:
        return (self.depth + 1,) * len(self.widths)


VARIANTS = {"sd-vae-f8": Variant()}


def variant(name: str) -> Variant:
    """The architecture called `name`, a key of VARIANTS."""
    if name not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UserError(f"model.variant={name!r} is not known; choose one of {known}")
    return VARIANTS[name]


def architecture(model_config: Any) -> Variant:
    """The architecture of a run: config.model's variant with the keys set beside it.

    Empty or zero keys keep the variant's own value. Raises UserError where a key does not fit.
    """
    arch = variant(model_config.variant)
    for key in ("encoder_depths", "decoder_depths"):
        if model_config[key]:
            raise UserError(
                f"model.{key}={tuple(model_config[key])}: {model_config.variant} has "
                f"{arch.depth} blocks in every stage; leave it at ()"
            )
    if not model_config.residual:
        raise UserError(
            f"model.residual=False: {model_config.variant} has no parameter-free shortcuts; "
            "leave it at True"
        )
    keys = ("latent_channels", "scaling_factor")
    changes = {key: model_config[key] for key in keys if model_config[key]}
    if model_config.widths:
        changes["widths"] = tuple(model_config.widths)
    arch = dataclasses.replace(arch, **changes)
    if len(arch.widths) != len(variant(model_config.variant).widths) or any(
        width % arch.groups for width in arch.widths
    ):
        raise UserError(
            f"model.widths={arch.widths}: give {len(variant(model_config.variant).widths)} "
            f"multiples of {arch.groups}"
        )
    return arch


# --- layers ---------------------------------------------------------------------------------------


class GroupNorm(nnx.Module):
    """Normalises each of `groups` runs of channels over (height, width, run), float32 inside."""

    def __init__(self, channels, *, groups, dtype, init):
        self.scale = nnx.Param(init((channels,), layers.ones))
        self.bias = nnx.Param(init((channels,), layers.zeros))
        self.groups, self.dtype = groups, dtype

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        grouped = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + EPS)).reshape(b, h, w, c)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class ResBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, inputs, outputs, *, groups, dtype, init):
        self.norm1 = GroupNorm(inputs, groups=groups, dtype=dtype, init=init)
        self.conv1 = layers.Conv(inputs, outputs, dtype=dtype, init=init)
        self.norm2 = GroupNorm(outputs, groups=groups, dtype=dtype, init=init)
        self.conv2 = layers.Conv(outputs, outputs, dtype=dtype, init=init)
        changes = inputs != outputs
        self.shortcut = (
            layers.Pointwise(inputs, outputs, dtype=dtype, init=init) if changes else None
        )

    def __call__(self, x: Array) -> Array:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """x + softmax attention over all positions, one head of all channels, softmax in float32."""

    def __init__(self, channels, *, groups, dtype, init):
        self.norm = GroupNorm(channels, groups=groups, dtype=dtype, init=init)
        self.q = layers.Pointwise(channels, channels, dtype=dtype, init=init)
        self.k = layers.Pointwise(channels, channels, dtype=dtype, init=init)
        self.v = layers.Pointwise(channels, channels, dtype=dtype, init=init)
        self.out = layers.Pointwise(channels, channels, dtype=dtype, init=init)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(b, h * w, c) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(v.dtype)
        return x + self.out(jnp.einsum("bnm,bmc->bnc", weights, v).reshape(b, h, w, c))


class Downsample(nnx.Module):
    """A convolution of stride 2 that is padded at the bottom and the right only."""

    def __init__(self, channels, *, dtype, init):
        fill = layers.uniform(channels * 9)
        self.kernel = nnx.Param(init((3, 3, channels, channels), fill))
        self.bias = nnx.Param(init((channels,), fill))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (2, 2),
            ((0, 1), (0, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype)


def _middle(width, *, groups, dtype, init) -> nnx.List:
    kwargs = dict(groups=groups, dtype=dtype, init=init)
    return nnx.List(
        [
            ResBlock(width, width, **kwargs),
            Attention(width, **kwargs),
            ResBlock(width, width, **kwargs),
        ]
    )


# --- the model ------------------------------------------------------------------------------------


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> features [B, H/f, W/f, 2 * latent_channels]."""

    def __init__(self, arch: Variant, *, dtype, init):
        kwargs = dict(groups=arch.groups, dtype=dtype, init=init)
        self.conv_in = layers.Conv(3, arch.widths[0], dtype=dtype, init=init)
        self.stages = nnx.List()
        inputs = arch.widths[0]
        for i, width in enumerate(arch.widths):
            blocks = [
                ResBlock(inputs if j == 0 else width, width, **kwargs) for j in range(arch.depth)
            ]
            if i < len(arch.widths) - 1:
                blocks.append(Downsample(width, dtype=dtype, init=init))
            self.stages.append(nnx.List(blocks))
            inputs = width
        self.middle = _middle(inputs, **kwargs)
        self.norm_out = GroupNorm(inputs, **kwargs)
        self.conv_out = layers.Conv(inputs, 2 * arch.latent_channels, dtype=dtype, init=init)
        self.remat = False

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for stage in (*self.stages, self.middle):
            x = layers.run(stage, x, remat=self.remat)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents [B, H/f, W/f, latent_channels] -> images [B, H, W, 3].

    As in DC-AE, `stages` goes from full size to the deepest, which runs first.
    """

    def __init__(self, arch: Variant, *, dtype, init):
        kwargs = dict(groups=arch.groups, dtype=dtype, init=init)
        inputs = arch.widths[-1]
        self.conv_in = layers.Conv(arch.latent_channels, inputs, dtype=dtype, init=init)
        self.middle = _middle(inputs, **kwargs)
        stages: list[nnx.List] = [None] * len(arch.widths)
        for i in reversed(range(len(arch.widths))):  # the order in which they run
            width = arch.widths[i]
            blocks: list[nnx.Module] = []
            for j in range(arch.depth + 1):
                blocks.append(ResBlock(inputs if j == 0 else width, width, **kwargs))
            if i > 0:
                blocks.append(
                    layers.Upsample(
                        width, width, form="nearest", shortcut=False, dtype=dtype, init=init
                    )
                )
            stages[i] = nnx.List(blocks)
            inputs = width
        self.stages = nnx.List(stages)
        self.norm_out = GroupNorm(inputs, **kwargs)
        self.conv_out = layers.Conv(inputs, 3, dtype=dtype, init=init)
        self.remat = False

    def __call__(self, z: Array) -> Array:
        x = self.conv_in(z)
        for stage in (self.middle, *reversed(self.stages)):
            x = layers.run(stage, x, remat=self.remat)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class SDVAE(nnx.Module):
    """The autoencoder, without its KL term."""

    def __init__(self, arch: Variant, *, dtype: Any, init: layers.Init):
        c = arch.latent_channels
        self.encoder = Encoder(arch, dtype=dtype, init=init)
        self.quant_conv = layers.Pointwise(2 * c, 2 * c, dtype=dtype, init=init)
        self.post_quant_conv = layers.Pointwise(c, c, dtype=dtype, init=init)
        self.decoder = Decoder(arch, dtype=dtype, init=init)

    def posterior(self, x: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] in [-1, 1] -> mean and standard deviation, each [B, H/f, W/f, c] float32."""
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))

    def encode(self, x: Array, sample_key: Array | None = None) -> Array:
        """[B, H, W, 3] float in [-1, 1] -> [B, H/f, W/f, c] float32, unscaled.

        The posterior's mean or, with a `sample_key` of jax.random, a sample of it.
        """
        mean, deviation = self.posterior(x)
        if sample_key is None:
            return mean
        return mean + deviation * jax.random.normal(sample_key, mean.shape, jnp.float32)

    def decode(self, z: Array) -> Array:
        """[B, H/f, W/f, c], unscaled -> [B, H, W, 3] float32, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


def create(model_config: Any, *, platform: str, dtype: Any, init: layers.Init) -> SDVAE:
    """The model of config.model, the same for devices of every `platform`."""
    del platform
    return SDVAE(architecture(model_config), dtype=jnp.dtype(dtype), init=init)


def count_parameters(arch: Variant) -> tuple[int, int]:
    """Numbers of parameters of (the whole model, its encoder), without allocating them."""
    _, params, _ = layers.split(SDVAE(arch, dtype=jnp.float32, init=layers.shapes))
    sizes = {path: leaf.size for path, leaf in params.items()}
    encoder = ("encoder.", "quant_conv.")
    return sum(sizes.values()), sum(n for path, n in sizes.items() if path.startswith(encoder))


def reach(arch: Variant) -> tuple[int | None, int | None]:
    """Latents on each side that a result of (encode, decode) depends on; None: on all.

    Attention and the means of GroupNorm see the whole picture.
    """
    del arch
    return None, None


def last_layer(arch: Variant) -> str:
    """Path of the kernel that makes the picture, whose gradient weighs the GAN loss."""
    del arch
    return "decoder.conv_out.kernel"
