# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Stable Diffusion (arXiv:2112.10752), diffusers' `AutoencoderKL`: the f8
baseline that DC-AE is compared with.

Its encoder outputs a Gaussian for each latent; `encode` returns the mean or a sample.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import Rngs
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Key

from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models.blocks import Upsample
from dcae_jax.models.layers import Layers, run
from dcae_jax.models.weights import Array

EPS = 1e-6  # of every GroupNorm
LOG_VARIANCE = (-30.0, 20.0)  # the posterior's log variance is clipped to this range


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture. `widths` has one entry per stage, from full size to the deepest."""

    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2  # residual blocks per encoder stage; a decoder stage has one more
    groups: int = 32  # of every GroupNorm
    scaling_factor: float | None = 0.18215  # latent * scaling_factor has an rms of about 1

    @property
    def compression(self) -> int:
        """Downsampling factor f: pixels per latent position, along each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def cuttable(self) -> bool:
        """False: see `dcae.Variant`. Its quant_conv mixes the channels."""
        return False

    @property
    def encoder_depths(self) -> tuple[int, ...]:
        return (self.depth,) * len(self.widths)

    @property
    def decoder_depths(self) -> tuple[int, ...]:
        return (self.depth + 1,) * len(self.widths)


VARIANTS = {"sd-vae-f8": Variant()}


def variant(name: str) -> Variant:
    """The architecture called `name`, a key of VARIANTS. Raises UserError."""
    if name not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UserError(f"model.variant={name!r} is not known; choose one of {known}")
    return VARIANTS[name]


def architecture(model_config: Model) -> Variant:
    """The architecture of a run: config.model's variant, overridden by the keys set beside it.

    Empty or zero keys keep the variant's value. Raises UserError if a key does not fit.
    """
    arch = variant(model_config.variant)
    for key in ("decoder_widths", "encoder_depths", "decoder_depths"):
        if getattr(model_config, key):
            raise UserError(
                f"model.{key}={tuple(getattr(model_config, key))}: {model_config.variant} has "
                f"{arch.depth} blocks in every stage, and equal widths in both halves; leave it "
                "at ()"
            )
    if not model_config.residual:
        raise UserError(
            f"model.residual=False: {model_config.variant} has no parameter-free shortcuts; "
            "leave it at True"
        )
    keys = ("latent_channels", "scaling_factor")
    changes = {key: getattr(model_config, key) for key in keys if getattr(model_config, key)}
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


class ResBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, inputs: int, outputs: int, layers: Layers, *, groups: int) -> None:
        self.norm1 = layers.group_norm(inputs, groups=groups, eps=EPS)
        self.conv1 = layers.conv(inputs, outputs)
        self.norm2 = layers.group_norm(outputs, groups=groups, eps=EPS)
        self.conv2 = layers.conv(outputs, outputs)
        self.shortcut = layers.linear(inputs, outputs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        y = self.conv1(nnx.silu(self.norm1(x)))  # [B, H, W, C']
        y = self.conv2(nnx.silu(self.norm2(y)))  # [B, H, W, C']
        return y + (x if self.shortcut is None else self.shortcut(x))  # [B, H, W, C']


class Attention(nnx.Module):
    """x + single-head softmax attention over all positions; softmax in float32."""

    def __init__(self, channels: int, layers: Layers, *, groups: int) -> None:
        self.norm = layers.group_norm(channels, groups=groups, eps=EPS)
        self.q = layers.linear(channels, channels)
        self.k = layers.linear(channels, channels)
        self.v = layers.linear(channels, channels)
        self.out = layers.linear(channels, channels)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, c)  # [B, HW, C]
        q, k, v = self.q(y), self.k(y), self.v(y)  # each [B, HW, C]
        scores = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(v.dtype)  # [B, HW, HW]
        y = jnp.einsum("bnm,bmc->bnc", weights, v).reshape(b, h, w, c)  # [B, H, W, C]
        return x + self.out(y)  # [B, H, W, C]


def middle(width: int, layers: Layers, *, groups: int) -> nnx.List:
    """The blocks at the latents' size: [B, H/f, W/f, width] -> the same shape."""
    return nnx.List(
        [
            ResBlock(width, width, layers, groups=groups),
            Attention(width, layers, groups=groups),
            ResBlock(width, width, layers, groups=groups),
        ]
    )


# --- the model ------------------------------------------------------------------------------------


class Encoder(nnx.Module):
    """Images -> mean and log variance of the latents."""

    def __init__(self, arch: Variant, layers: Layers, *, remat: bool) -> None:
        self.conv_in = layers.conv(3, arch.widths[0])
        self.stages = nnx.List()
        inputs = arch.widths[0]
        for i, width in enumerate(arch.widths):
            stage: list[nnx.Module] = []
            for _ in range(arch.depth):
                stage.append(ResBlock(inputs, width, layers, groups=arch.groups))
                inputs = width
            if i + 1 < len(arch.widths):
                # Padded at the bottom and right only.
                stage.append(layers.conv(width, width, strides=2, padding=(0, 1)))
            self.stages.append(nnx.List(stage))
        self.middle = middle(inputs, layers, groups=arch.groups)
        self.norm_out = layers.group_norm(inputs, groups=arch.groups, eps=EPS)
        self.conv_out = layers.conv(inputs, 2 * arch.latent_channels)
        self.remat = remat

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = self.conv_in(x)  # [B, H, W, C0]
        for stage in self.stages:
            x = run(stage, x, remat=self.remat)  # [B, H/2, W/2, C0] .. [B, H/f, W/f, Cn]
        x = run(self.middle, x, remat=self.remat)  # [B, H/f, W/f, Cn]
        return self.conv_out(nnx.silu(self.norm_out(x)))  # [B, H/f, W/f, 2c]


class Decoder(nnx.Module):
    """Latents -> images. As in DC-AE, `stages` starts at full size; the deepest runs first."""

    def __init__(self, arch: Variant, layers: Layers, *, remat: bool) -> None:
        inputs = arch.widths[-1]
        self.conv_in = layers.conv(arch.latent_channels, inputs)
        self.middle = middle(inputs, layers, groups=arch.groups)
        stages: list[nnx.List] = []
        for i, width in reversed(list(enumerate(arch.widths))):  # the order in which they run
            stage: list[nnx.Module] = []
            for _ in range(arch.depth + 1):
                stage.append(ResBlock(inputs, width, layers, groups=arch.groups))
                inputs = width
            if i > 0:
                stage.append(Upsample(width, width, layers, form="nearest"))
            stages.append(nnx.List(stage))
        self.stages = nnx.List(reversed(stages))
        self.norm_out = layers.group_norm(inputs, groups=arch.groups, eps=EPS)
        self.conv_out = layers.conv(inputs, 3)
        self.remat = remat

    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(z)  # [B, H/f, W/f, Cn]
        x = run(self.middle, x, remat=self.remat)  # [B, H/f, W/f, Cn]
        for stage in reversed(self.stages):
            x = run(stage, x, remat=self.remat)  # [B, 2H/f, 2W/f, Cn] .. [B, H, W, C0]
        return self.conv_out(nnx.silu(self.norm_out(x)))  # [B, H, W, 3]


class SDVAE(nnx.Module):
    """The autoencoder, without its KL term. remat: see `layers.run`."""

    def __init__(self, arch: Variant, *, remat: bool = False, dtype: DTypeLike, rngs: Rngs) -> None:
        c = arch.latent_channels
        layers = Layers(dtype, rngs)
        self.encoder = Encoder(arch, layers, remat=remat)
        self.quant_conv = layers.linear(2 * c, 2 * c)
        self.post_quant_conv = layers.linear(c, c)
        self.decoder = Decoder(arch, layers, remat=remat)

    def posterior(
        self, x: Float[Array, "B H W 3"]
    ) -> tuple[Float32[Array, "B h w c"], Float32[Array, "B h w c"]]:
        """[B, H, W, 3] in [-1, 1] -> mean and standard deviation, each [B, H/f, W/f, c] float32."""
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)  # [B, H/f, W/f, 2c]
        mean, log_variance = jnp.split(moments, 2, axis=-1)  # each [B, H/f, W/f, c]
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))

    def encode(
        self, x: Float[Array, "B H W 3"], sample_key: Key[Array, ""] | None = None
    ) -> Float32[Array, "B h w c"]:
        """[B, H, W, 3] float in [-1, 1] -> [B, H/f, W/f, c] float32, unscaled.

        The posterior's mean, or a sample drawn with `sample_key`, a jax.random key.
        """
        mean, deviation = self.posterior(x)
        if sample_key is None:
            return mean
        return mean + deviation * jax.random.normal(sample_key, mean.shape, jnp.float32)

    def decode(self, z: Float[Array, "B h w c"]) -> Float32[Array, "B H W 3"]:
        """[B, H/f, W/f, c], unscaled -> [B, H, W, 3] float32, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float32[Array, "B H W 3"]:
        return self.decode(self.encode(x))  # [B, H, W, 3]


def create(
    model_config: Model, *, platform: str, remat: bool, dtype: DTypeLike, rngs: Rngs
) -> SDVAE:
    """The model of config.model; the same for every `platform`."""
    del platform
    return SDVAE(architecture(model_config), remat=remat, dtype=dtype, rngs=rngs)


def reach(arch: Variant) -> tuple[int | None, int | None]:
    """Receptive-field radius of (encode, decode) in latents; None: unbounded.

    Attention and GroupNorm's statistics see the whole image.
    """
    del arch
    return None, None


def last_layer(arch: Variant) -> str:
    """Path of the last convolution's kernel; its gradient norms set the weight of the GAN loss."""
    del arch
    return "decoder.conv_out.kernel"
