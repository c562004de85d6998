# SPDX-License-Identifier: Apache-2.0
"""UViT, a transformer with long skip connections for diffusion on latents (arXiv:2209.12152).

Label, time and patches are all tokens. The first half of the blocks keep their outputs, and the
second half take them back, last in, first out. The sizes S, H and 2B are those that DC-AE was
judged with (arXiv:2410.10733); USiT there is this network with another objective.

| initial values            |                                             |
|---------------------------|---------------------------------------------|
| Linear weights, positions | N(0, 0.02^2)                                |
| Linear biases             | 0                                           |
| patch embedding           | U(-1, 1) / sqrt(fan in), its bias likewise  |
| label table               | N(0, 1)                                     |
| LayerNorm                 | scale 1, bias 0                             |
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dcae_jax.config import UserError
from dcae_jax.models import layers, transformer
from dcae_jax.models.layers import Array
from dcae_jax.sharding import Layout, tokens

EXTRAS = 2  # tokens before the patches: the label and the time
FILL = transformer.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size. depth counts the blocks with and without skips, not the one in the middle."""

    depth: int
    width: int
    heads: int


VARIANTS = {
    "tiny": Variant(depth=4, width=128, heads=4),
    "s": Variant(depth=12, width=512, heads=8),
    "h": Variant(depth=28, width=1152, heads=16),
    "2b": Variant(depth=28, width=2048, heads=32),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that fixes the parameters."""

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
        """Of the whole sequence: label, time and patches."""
        return EXTRAS + (self.latent_size // self.patch_size) ** 2


def architecture(model_config: Any, *, patch_size: int, learn_sigma: bool) -> Architecture:
    """The architecture of config.model: its variant with the sizes set beside it.

    learn_sigma: the output has a second half for the variance. Raises UserError where a size
    does not fit.
    """
    sizes = transformer.sizes(model_config, VARIANTS, patch_size)
    for key in ("depth", "width"):
        if sizes[key] % 2:
            raise UserError(f"model.{key}={sizes[key]} must be even for uvit")
    return Architecture(**sizes, out_channels=sizes["latent_channels"] * (2 if learn_sigma else 1))


# --- the model ------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention, then MLP, each on the normalised input and added to it.

    With `skip`, first a Linear brings x and a kept output, side by side, back to the width.
    """

    def __init__(self, arch: Architecture, *, skip=False, dtype, init, layout):
        width = arch.width
        if skip:
            self.skip_linear = transformer.Linear(
                2 * width, width, fill=FILL, dtype=dtype, init=init
            )
        self.norm1 = transformer.LayerNorm(width, dtype=dtype, init=init)
        self.attn = transformer.Attention(
            width,
            arch.heads,
            qkv_bias=False,
            fill_qkv=FILL,
            fill_proj=FILL,
            dtype=dtype,
            init=init,
            layout=layout,
        )
        self.norm2 = transformer.LayerNorm(width, dtype=dtype, init=init)
        self.mlp = transformer.MLP(
            width,
            approximate=False,
            fill_in=FILL,
            fill_out=FILL,
            dtype=dtype,
            init=init,
            layout=layout,
        )
        self.layout = layout

    def __call__(self, x: Array, skip: Array | None = None) -> Array:
        if skip is not None:
            x = tokens(self.layout, self.skip_linear(jnp.concatenate([x, skip], axis=-1)))
        x = tokens(self.layout, x + self.attn(self.norm1(x)))
        return tokens(self.layout, x + self.mlp(self.norm2(x)))


class UViT(nnx.Module):
    """The network: (noisy latents, time, labels) -> prediction. See `create`."""

    def __init__(
        self, arch: Architecture, *, dtype, init, remat: bool, unroll: bool, layout: Layout | None
    ):
        half, width = arch.depth // 2, arch.width
        fan_in = arch.latent_channels * arch.patch_size**2
        patch_fill = layers.uniform(fan_in)
        self.patch_embed = transformer.PatchEmbed(
            arch.latent_channels,
            width,
            size=arch.patch_size,
            fill=patch_fill,
            fill_bias=patch_fill,
            dtype=dtype,
            init=init,
        )
        labels = arch.num_classes + 1
        self.label_emb = transformer.Embedding(
            labels, width, fill=transformer.normal(1.0), init=init
        )
        self.pos_embed = nnx.Param(init((arch.tokens, width), FILL))
        several = transformer.stacked(init, half)
        form = dict(dtype=dtype, layout=layout)
        self.in_blocks = nnx.Dict({"*": Block(arch, init=several, **form)})
        self.mid_block = Block(arch, init=init, **form)
        self.out_blocks = nnx.Dict({"*": Block(arch, skip=True, init=several, **form)})
        self.norm = transformer.LayerNorm(width, dtype=jnp.float32, init=init)
        # In float32: it costs nothing beside a block, and the prediction is not rounded.
        self.decoder_pred = transformer.Linear(
            width,
            arch.patch_size**2 * arch.out_channels,
            fill=FILL,
            dtype=jnp.float32,
            init=init,
        )
        self.arch, self.dtype, self.remat, self.unroll = arch, dtype, remat, unroll
        self.layout = layout

    def __call__(self, x: Array, t: Array, labels: Array) -> Array:
        form = dict(remat=self.remat, unroll=self.unroll, layout=self.layout)
        time = transformer.time_features(t, self.arch.width)
        extras = jnp.stack([self.label_emb(labels), time], axis=1)  # [B, 2, C] float32
        x = jnp.concatenate([extras, self.patch_embed(x).astype(jnp.float32)], axis=1)
        x = (x + self.pos_embed[...]).astype(self.dtype)  # [B, 2 + N, C]

        x, kept = transformer.run_blocks(
            self.in_blocks["*"],
            x,
            lambda block, x, _: (block(x),) * 2,
            prefix="in_blocks.*.",
            **form,
        )
        x = transformer.run_block(self.mid_block, x, remat=self.remat)
        x, _ = transformer.run_blocks(
            self.out_blocks["*"],
            x,
            lambda block, x, skip: (block(x, skip), None),
            kept[::-1],  # [depth / 2, B, 2 + N, C], the last kept is the first taken
            prefix="out_blocks.*.",
            **form,
        )
        x = self.decoder_pred(self.norm(x)[:, EXTRAS:])
        return transformer.from_patches(
            x, self.arch.patch_size, self.arch.latent_size // self.arch.patch_size
        )


def create(
    arch: Architecture,
    *,
    dtype: Any,
    init: layers.Init,
    remat: bool,
    unroll: bool,
    layout: Layout | None = None,
) -> UViT:
    """The network of `arch`, computing in `dtype`.

    It maps (x [B, h, w, c] float32, t [B] float32, labels [B] int32) to [B, h, w, out_channels]
    float32, where h = w = arch.latent_size. t goes to the sinusoidal features as it is; labels
    are 0 .. num_classes - 1, and num_classes means "none".
    remat, unroll: see `transformer.run_blocks`; neither changes a number beyond rounding.
    layout: where weights lie split. Raises UserError if it cannot split the heads.
    """
    transformer.check_layout(layout, arch.heads)
    return UViT(arch, dtype=jnp.dtype(dtype), init=init, remat=remat, unroll=unroll, layout=layout)


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters."""
    model = create(arch, dtype="float32", init=layers.shapes, remat=False, unroll=False)
    return {path: tuple(leaf.shape) for path, leaf in layers.split(model)[1].items()}


def count_parameters(arch: Architecture) -> int:
    """The number of parameters, without allocating them."""
    return transformer.count_parameters(shapes(arch))


def forward_macs(arch: Architecture) -> int:
    """Multiply-adds of the matrix products of one forward pass of one sample."""
    width, half = arch.width, arch.depth // 2
    patch = arch.patch_size**2 * (arch.latent_channels + arch.out_channels)
    return (
        (arch.depth + 1) * transformer.block_macs(arch.tokens, width)
        + half * arch.tokens * 2 * width**2  # skips
        + (arch.tokens - EXTRAS) * width * patch  # embedding and prediction
    )
