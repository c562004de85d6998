# SPDX-License-Identifier: Apache-2.0
"""DiT, the diffusion transformer with adaptive LayerNorm (arXiv:2212.09748).

Only patches are tokens. Time and label make one vector, from which each block draws the shift,
the scale and the gate of its two parts (adaLN-zero). Positions are a fixed sin-cos table, which
is computed and no parameter.

| initial values                          |                                         |
|-----------------------------------------|-----------------------------------------|
| Linear weights, patch embedding         | U(-1, 1) sqrt(6 / (inputs + outputs))   |
| biases                                  | 0                                       |
| adaLN and the last Linear               | 0: each block begins as the identity    |
| label table, weights of the time's MLP  | N(0, 0.02^2)                            |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcae_jax.config import UserError
from dcae_jax.models import layers, transformer
from dcae_jax.models.layers import Array
from dcae_jax.sharding import Layout, tokens

FREQUENCIES = 256  # features of the time
EPS = 1e-6  # of every LayerNorm; none has parameters


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size; depth counts blocks."""

    depth: int
    width: int
    heads: int


VARIANTS = {
    "tiny": Variant(depth=4, width=128, heads=4),
    "s": Variant(depth=12, width=384, heads=6),
    "b": Variant(depth=12, width=768, heads=12),
    "l": Variant(depth=24, width=1024, heads=16),
    "xl": Variant(depth=28, width=1152, heads=16),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that fixes the parameters and the positions."""

    depth: int
    width: int
    heads: int
    latent_size: int  # positions a side
    latent_channels: int
    out_channels: int  # latent_channels, or twice as many with a learned sigma
    patch_size: int
    num_classes: int  # without the label that means "none"

    @property
    def tokens(self) -> int:
        """Of the whole sequence: the patches."""
        return (self.latent_size // self.patch_size) ** 2


def architecture(model_config: Any, *, patch_size: int, learn_sigma: bool) -> Architecture:
    """The architecture of config.model: its variant with the sizes set beside it.

    learn_sigma: the output has a second half for the variance. Raises UserError where a size
    does not fit.
    """
    sizes = transformer.sizes(model_config, VARIANTS, patch_size)
    if sizes["width"] % 4:
        raise UserError(
            f"model.width={sizes['width']} must be a multiple of 4 for dit: sine and cosine of "
            "row and column"
        )
    return Architecture(**sizes, out_channels=sizes["latent_channels"] * (2 if learn_sigma else 1))


# --- the model ------------------------------------------------------------------------------------


def positions(side: int, width: int) -> np.ndarray:
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


def linear(inputs: int, outputs: int, *, fill: layers.Fill, init) -> transformer.Linear:
    """A Linear in float32, for what acts on all tokens alike and for the prediction.

    It costs nothing beside the tokens' products, and rounding there is an error of the whole
    picture: bfloat16 would double the error of the prediction.
    """
    return transformer.Linear(inputs, outputs, fill=fill, dtype=jnp.float32, init=init)


class TimeEmbedder(nnx.Module):
    """[B] -> [B, width] float32: sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width, *, init):
        fill = transformer.normal(0.02)
        self.fc1 = linear(FREQUENCIES, width, fill=fill, init=init)
        self.fc2 = linear(width, width, fill=fill, init=init)

    def __call__(self, t: Array) -> Array:
        features = transformer.time_features(t, FREQUENCIES)
        return self.fc2(jax.nn.silu(self.fc1(features)))


class Modulation(nnx.Module):
    """[B, width] -> `count` vectors [B, 1, width] float32: SiLU, then a Linear that begins at 0."""

    def __init__(self, width, count, *, init):
        self.linear = linear(width, count * width, fill=layers.zeros, init=init)
        self.count = count

    def __call__(self, c: Array) -> list[Array]:
        vectors = self.linear(jax.nn.silu(c))
        return jnp.split(vectors[:, None], self.count, axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """The normalised x, scaled and shifted, float32."""
    return transformer.normalize(x, EPS) * (1 + scale) + shift


class Block(nnx.Module):
    """Attention, then MLP, each on the modulated input, gated, and added to it."""

    def __init__(self, arch: Architecture, *, dtype, init, layout):
        width, hidden = arch.width, transformer.MLP_RATIO * arch.width
        xavier = transformer.xavier
        self.attn = transformer.Attention(
            width,
            arch.heads,
            qkv_bias=True,
            fill_qkv=xavier(width, 3 * width),
            fill_proj=xavier(width, width),
            dtype=dtype,
            init=init,
            layout=layout,
        )
        fill = xavier(width, hidden)  # the same bound in both directions
        self.mlp = transformer.MLP(
            width,
            approximate=True,
            fill_in=fill,
            fill_out=fill,
            dtype=dtype,
            init=init,
            layout=layout,
        )
        self.adaLN_modulation = Modulation(width, 6, init=init)
        self.layout = layout

    def __call__(self, x: Array, c: Array) -> Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = x + (gate1 * self.attn(modulate(x, shift1, scale1))).astype(x.dtype)
        x = tokens(self.layout, x)
        x = x + (gate2 * self.mlp(modulate(x, shift2, scale2))).astype(x.dtype)
        return tokens(self.layout, x)


class FinalLayer(nnx.Module):
    """LayerNorm, modulation, Linear to the patches' values; float32."""

    def __init__(self, arch: Architecture, *, init):
        outputs = arch.patch_size**2 * arch.out_channels
        self.adaLN_modulation = Modulation(arch.width, 2, init=init)
        self.linear = linear(arch.width, outputs, fill=layers.zeros, init=init)

    def __call__(self, x: Array, c: Array) -> Array:
        return self.linear(modulate(x, *self.adaLN_modulation(c)))


class DiT(nnx.Module):
    """The network: (noisy latents, time, labels) -> prediction. See `create`."""

    def __init__(
        self, arch: Architecture, *, dtype, init, remat: bool, unroll: bool, layout: Layout | None
    ):
        width, patch = arch.width, arch.patch_size
        self.x_embedder = transformer.PatchEmbed(
            arch.latent_channels,
            width,
            size=patch,
            fill=transformer.xavier(arch.latent_channels * patch**2, width),
            fill_bias=layers.zeros,
            dtype=dtype,
            init=init,
        )
        self.t_embedder = TimeEmbedder(width, init=init)
        self.y_embedder = transformer.Embedding(
            arch.num_classes + 1, width, fill=transformer.normal(0.02), init=init
        )
        several = transformer.stacked(init, arch.depth)
        self.blocks = nnx.Dict({"*": Block(arch, dtype=dtype, init=several, layout=layout)})
        self.final_layer = FinalLayer(arch, init=init)
        self.arch, self.dtype, self.remat, self.unroll = arch, dtype, remat, unroll
        self.layout = layout

    def __call__(self, x: Array, t: Array, labels: Array) -> Array:
        side = self.arch.latent_size // self.arch.patch_size
        x = self.x_embedder(x) + positions(side, self.arch.width)
        x = x.astype(self.dtype)  # [B, N, C]
        c = self.t_embedder(t) + self.y_embedder(labels)  # [B, C]
        x, _ = transformer.run_blocks(
            self.blocks["*"],
            x,
            lambda block, x, _: (block(x, c), None),
            remat=self.remat,
            unroll=self.unroll,
            layout=self.layout,
            prefix="blocks.*.",
        )
        return transformer.from_patches(self.final_layer(x, c), self.arch.patch_size, side)


def create(
    arch: Architecture,
    *,
    dtype: Any,
    init: layers.Init,
    remat: bool,
    unroll: bool,
    layout: Layout | None = None,
) -> DiT:
    """The network of `arch`, computing in `dtype`.

    It maps (x [B, h, w, c] float32, t [B] float32, labels [B] int32) to [B, h, w, out_channels]
    float32, where h = w = arch.latent_size. t goes to the sinusoidal features as it is; labels
    are 0 .. num_classes - 1, and num_classes means "none".
    remat, unroll: see `transformer.run_blocks`; neither changes a number beyond rounding.
    layout: where weights lie split. Raises UserError if it cannot split the heads.
    """
    transformer.check_layout(layout, arch.heads)
    return DiT(arch, dtype=jnp.dtype(dtype), init=init, remat=remat, unroll=unroll, layout=layout)


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters."""
    model = create(arch, dtype="float32", init=layers.shapes, remat=False, unroll=False)
    return {path: tuple(leaf.shape) for path, leaf in layers.split(model)[1].items()}


def count_parameters(arch: Architecture) -> int:
    """The number of parameters, without allocating them and without the fixed positions."""
    return transformer.count_parameters(shapes(arch))


def forward_macs(arch: Architecture) -> int:
    """Multiply-adds of the matrix products of one forward pass of one sample."""
    width = arch.width
    patch = arch.patch_size**2 * (arch.latent_channels + arch.out_channels)
    modulation = (6 * arch.depth + 2) * width**2
    return (
        arch.depth * transformer.block_macs(arch.tokens, width)
        + modulation
        + FREQUENCIES * width
        + width**2  # the time's MLP
        + arch.tokens * width * patch  # embedding and prediction
    )
