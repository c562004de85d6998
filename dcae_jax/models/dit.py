# SPDX-License-Identifier: Apache-2.0
"""DiT, the diffusion transformer with adaptive LayerNorm (arXiv:2212.09748).

Only patches are tokens. Time and label form one conditioning vector, from which each block
computes the shift, scale and gate of its two parts (adaLN-zero). Positions are a fixed sin-cos
table, computed rather than stored as a parameter.

| initial values                          |                                         |
|-----------------------------------------|-----------------------------------------|
| Linear weights, patch embedding         | U(-1, 1) sqrt(6 / (inputs + outputs))   |
| biases                                  | 0                                       |
| adaLN and the last Linear               | 0: each block starts as the identity    |
| embedding of the interval, last Linear  | 0                                       |
| label table, time MLP weights           | N(0, 0.02^2)                            |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int, Real

from dcae_jax.errors import UserError
from dcae_jax.models import transformer
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.layers import ZEROS, normal, uniform, xavier
from dcae_jax.models.transformer import (
    MLP,
    Architecture,
    Attention,
    Stacked,
    TimeEmbedder,
    Variant,
)
from dcae_jax.models.weights import Array
from dcae_jax.runtime.sharding import constrain_activations

EPS = 1e-6  # of every LayerNorm; they have no parameters
NORMAL = normal(0.02)

VARIANTS = {
    "tiny": Variant(depth=4, width=128, heads=4),
    "s": Variant(depth=12, width=384, heads=6),
    "b": Variant(depth=12, width=768, heads=12),
    "l": Variant(depth=24, width=1024, heads=16),
    "xl": Variant(depth=28, width=1152, heads=16),
}


def architecture(
    model_config: Any, *, patch_size: int, learn_sigma: bool, average: bool = False
) -> Architecture:
    """`transformer.resolve_architecture` for a DiT. Raises UserError."""
    arch = transformer.resolve_architecture(
        model_config, VARIANTS, patch_size=patch_size, learn_sigma=learn_sigma, average=average
    )
    if arch.width % 4:
        raise UserError(
            f"model.width={arch.width} must be a multiple of 4 for dit: sine and cosine of "
            "row and column"
        )
    return arch


# --- the model ------------------------------------------------------------------------------------


def positions(side: int, width: int) -> Float32[np.ndarray, "{side**2} {width}"]:
    """[side^2, width] float32: half of the channels encode the column, half the row.

    Each half is the sine, then the cosine, at width / 4 frequencies 1 .. ~1/10000.
    """
    frequencies = transformer.MAX_PERIOD ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)  # [side, width / 2]
    column = np.broadcast_to(line[None, :], (side, side, width // 2))
    row = np.broadcast_to(line[:, None], (side, side, width // 2))
    table = np.concatenate([column, row], axis=-1)
    return table.reshape(side * side, width).astype(np.float32)


# Conditioning and prediction run in float32: their cost is negligible next to the tokens' matrix
# products, and rounding there affects the whole image. bfloat16 would double the prediction's
# error.
Linear = functools.partial(nnx.Linear, bias_init=ZEROS, dtype=jnp.float32)
ZeroLinear = functools.partial(Linear, kernel_init=ZEROS)
layer_norm = functools.partial(transformer.layer_norm, eps=EPS, affine=False)


# fmt: off
class Modulation(nnx.Module):
    """`count` vectors from the conditioning: SiLU, then a zero-initialised Linear."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.linear = ZeroLinear(width, count * width, rngs=rngs)
        self.count = count

    def __call__(self, c: Float32[Array, "B C"]) -> list[Float32[Array, "B 1 C"]]:
        vectors = constrain_activations(self.linear(jax.nn.silu(c)))             # [B, count C]
        return jnp.split(vectors[:, None], self.count, axis=-1)                  # each [B, 1, C]


def modulate(
    x: Float[Array, "B N C"], shift: Float[Array, "B 1 C"], scale: Float[Array, "B 1 C"]
) -> Float[Array, "B N C"]:
    return x * (1 + scale) + shift


class Block(nnx.Module):
    """Attention, then MLP, each on the modulated input, gated, and added to it."""

    def __init__(self, arch: Architecture, *, attention: str = "plain", dtype: Any, rngs: nnx.Rngs):
        c = arch.width
        linear = functools.partial(Linear, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(c, rngs=rngs)
        self.attn = Attention(c, arch.heads, linear, qkv_bias=True, attention=attention)
        self.norm2 = layer_norm(c, rngs=rngs)
        self.mlp = MLP(c, linear, approximate=True)
        self.adaLN_modulation = Modulation(c, 6, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B N C"], c: Float32[Array, "B C"]
    ) -> Float[Array, "B N C"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)  # [B, 1, C]
        h = gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))           # [B, N, C] float32
        x = constrain_activations(x + h.astype(x.dtype))                         # [B, N, C]
        h = gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))            # [B, N, C] float32
        return constrain_activations(x + h.astype(x.dtype))                      # [B, N, C]


class FinalLayer(nnx.Module):
    """LayerNorm, modulation, Linear to each patch's values; float32."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.norm = layer_norm(arch.width, rngs=rngs)
        self.adaLN_modulation = Modulation(arch.width, 2, rngs=rngs)
        self.linear = ZeroLinear(arch.width, arch.patch_size**2 * arch.out_channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B N C"], c: Float32[Array, "B C"]
    ) -> Float32[Array, "B N p"]:
        shift, scale = self.adaLN_modulation(c)                                  # [B, 1, C]
        return self.linear(modulate(self.norm(x), shift, scale))                 # [B, N, p^2 c']


class DiT(nnx.Module):
    """(x [B, h, w, c] float32, t [B] float32, labels [B] int32) -> [B, h, w, c'] float32.

    h = w = arch.latent_size, c' = arch.out_channels. t enters the sinusoidal features unscaled;
    labels are 0 .. num_classes - 1, and num_classes means "no class". h [B], if arch.average: the
    interval from t to average over, 0 by default; see diffusion/meanflow.py. remat, unroll: see
    `Stacked`; neither changes results beyond rounding. attention: see `Attention`.
    """

    def __init__(
        self, arch: Architecture, *,
        dtype: Any, rngs: nnx.Rngs,
        remat: bool = False, unroll: bool = False, attention: str = "plain",
    ):
        self.arch, self.dtype = arch, jnp.dtype(dtype)
        c, patch = arch.width, arch.patch_size
        self.x_embedder = transformer.patch_embed(
            arch.latent_channels, c, patch,
            # Xavier for the flattened patch, as for a Linear.
            kernel_init=uniform((6 / (arch.latent_channels * patch**2 + c)) ** 0.5),
            bias_init=ZEROS, rngs=rngs,
        )
        linear = functools.partial(Linear, kernel_init=NORMAL, rngs=rngs)
        self.t_embedder = TimeEmbedder(c, linear)
        if arch.average:
            self.h_embedder = TimeEmbedder(c, linear, functools.partial(ZeroLinear, rngs=rngs))
        self.y_embedder = nnx.Embed(arch.num_classes + 1, c, embedding_init=NORMAL, rngs=rngs)
        block = functools.partial(Block, arch, attention=attention, dtype=self.dtype)
        self.blocks = Stacked(
            arch.depth, lambda rngs: block(rngs=rngs), remat=remat, unroll=unroll, rngs=rngs
        )
        self.final_layer = FinalLayer(arch, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w c"], t: Real[Array, " B"], labels: Int[Array, " B"],
        h: Real[Array, " B"] | None = None,
    ) -> Float32[Array, "B h w {self.arch.out_channels}"]:
        b, arch = len(x), self.arch
        x = self.x_embedder(x).reshape(b, arch.patches, arch.width)              # [B, N, C] float32
        x = (x + positions(arch.side, arch.width)).astype(self.dtype)            # [B, N, C]
        c = self.t_embedder(t) + self.y_embedder(labels)                         # [B, C] float32
        if arch.average:
            c += self.h_embedder(jnp.zeros_like(t) if h is None else h)          # [B, C] float32
        x, _ = self.blocks.scan(lambda block, x, _: (block(x, c), None), x)      # [B, N, C]
        x = self.final_layer(x, c)                                               # [B, N, p^2 c']
        return transformer.from_patches(x, arch.patch_size, arch.side)           # [B, h, w, c']
# fmt: on


create = DiT  # every model file exposes its model under this name


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters; the fixed positions are not parameters."""
    return weights_lib.shapes(lambda rngs: create(arch, dtype="float32", rngs=rngs))
