# SPDX-License-Identifier: Apache-2.0
"""UViT, a transformer with long skip connections for diffusion on latents (arXiv:2209.12152).

Label, time and patches are all tokens. The first half of the blocks stores its outputs;
the second half consumes them, last in, first out. The sizes S, H and 2B are those used to evaluate
DC-AE (arXiv:2410.10733), where USiT is this network with another objective.

| initial values            |                                             |
|---------------------------|---------------------------------------------|
| Linear weights, positions | N(0, 0.02^2)                                |
| Linear biases             | 0                                           |
| patch embedding           | U(-1, 1) / sqrt(fan in), bias included      |
| label table               | N(0, 1)                                     |
| LayerNorm                 | scale 1, bias 0                             |
| embedding of the interval | its last Linear 0                           |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32, Int, Real

from dcae_jax.errors import UserError
from dcae_jax.models import transformer
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.layers import ZEROS, normal, torch_uniform
from dcae_jax.models.transformer import MLP, Architecture, Attention, Stacked, Variant
from dcae_jax.models.weights import Array
from dcae_jax.runtime.sharding import constrain_activations

EXTRAS = 2  # tokens before the patches: the label and the time
EPS = 1e-5  # of every LayerNorm
NORMAL = normal(0.02)
Linear = functools.partial(nnx.Linear, kernel_init=NORMAL, bias_init=ZEROS)

VARIANTS = {
    "tiny": Variant(depth=4, width=128, heads=4),
    "s": Variant(depth=12, width=512, heads=8),
    "h": Variant(depth=28, width=1152, heads=16),
    "2b": Variant(depth=28, width=2048, heads=32),
}


def architecture(
    model_config: Any, *, patch_size: int, learn_sigma: bool, average: bool = False
) -> Architecture:
    """`transformer.resolve_architecture` for a UViT. Raises UserError."""
    arch = transformer.resolve_architecture(
        model_config, VARIANTS, patch_size=patch_size, learn_sigma=learn_sigma, average=average
    )
    for key, value in (("depth", arch.depth), ("width", arch.width)):
        if value % 2:
            raise UserError(f"model.{key}={value} must be even for uvit")
    return arch


def tokens(arch: Architecture) -> int:
    """Sequence length: label, time and patches."""
    return EXTRAS + arch.patches


# --- the model ------------------------------------------------------------------------------------


layer_norm = functools.partial(transformer.layer_norm, eps=EPS, affine=True)


# fmt: off
class Block(nnx.Module):
    """Attention, then MLP, each on the normalised input and added to it.

    With `skip`, a Linear first projects x and a stored output, concatenated, back to the width.
    """

    def __init__(
        self, arch: Architecture, *,
        skip: bool = False, attention: str = "plain", dtype: Any, rngs: nnx.Rngs,
    ):
        c, linear = arch.width, functools.partial(Linear, dtype=dtype, rngs=rngs)
        if skip:
            self.skip_linear = linear(2 * c, c)
        self.norm1 = layer_norm(c, rngs=rngs)
        self.attn = Attention(c, arch.heads, linear, qkv_bias=False, attention=attention)
        self.norm2 = layer_norm(c, rngs=rngs)
        self.mlp = MLP(c, linear, approximate=False)

    def __call__(
        self, x: Float[Array, "B N C"], skip: Float[Array, "B N C"] | None = None
    ) -> Float[Array, "B N C"]:
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)                             # [B, N, 2 C]
            x = constrain_activations(self.skip_linear(x))                      # [B, N, C]
        x = constrain_activations(x + self.attn(self.norm1(x)))                 # [B, N, C]
        return constrain_activations(x + self.mlp(self.norm2(x)))               # [B, N, C]


class UViT(nnx.Module):
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
        self.arch, self.dtype, self.remat = arch, jnp.dtype(dtype), remat
        c, patch, half = arch.width, arch.patch_size, arch.depth // 2
        block = functools.partial(Block, arch, attention=attention, dtype=self.dtype)
        stacked = functools.partial(Stacked, half, remat=remat, unroll=unroll, rngs=rngs)
        init = torch_uniform(arch.latent_channels * patch**2)
        self.patch_embed = transformer.patch_embed(
            arch.latent_channels, c, patch, kernel_init=init, bias_init=init, rngs=rngs
        )
        self.label_emb = nnx.Embed(arch.num_classes + 1, c, embedding_init=normal(1.0), rngs=rngs)
        if arch.average:
            linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
            zeros = functools.partial(linear, kernel_init=ZEROS)
            self.h_embedder = transformer.TimeEmbedder(c, linear, zeros)
        self.pos_embed = nnx.Param(NORMAL(rngs.params(), (tokens(arch), c)))
        self.in_blocks = stacked(lambda rngs: block(rngs=rngs))
        self.mid_block = block(rngs=rngs)
        self.out_blocks = stacked(lambda rngs: block(skip=True, rngs=rngs))
        self.norm = layer_norm(c, rngs=rngs)
        # In float32: the cost is negligible next to a block, and the prediction is not rounded.
        self.decoder_pred = Linear(c, patch**2 * arch.out_channels, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w c"], t: Real[Array, " B"], labels: Int[Array, " B"],
        h: Real[Array, " B"] | None = None,
    ) -> Float32[Array, "B h w {self.arch.out_channels}"]:
        b, arch = len(x), self.arch
        label = self.label_emb(labels)                                          # [B, C] float32
        time = transformer.time_features(t, arch.width)                         # [B, C] float32
        if arch.average:
            time += self.h_embedder(jnp.zeros_like(t) if h is None else h)      # [B, C] float32
        x = self.patch_embed(x).reshape(b, arch.patches, arch.width)            # [B, P, C] float32
        extras = jnp.stack([label, time], axis=1)                               # [B, 2, C] float32
        x = jnp.concatenate([extras, x], axis=1)                                # [B, N = 2 + P, C]
        x = (x + self.pos_embed[...]).astype(self.dtype)                        # [B, N, C]

        x, kept = self.in_blocks.scan(lambda block, x, _: (block(x),) * 2, x)   # [B, N, C]
        x = self.middle(x)                                                      # [B, N, C]
        # The stored outputs [L/2, B, N, C] are consumed last first.
        x, _ = self.out_blocks.scan(lambda block, x, skip: (block(x, skip), None), x, kept[::-1])

        x = self.decoder_pred(self.norm(x)[:, EXTRAS:])                         # [B, P, p^2 c']
        return transformer.from_patches(x, arch.patch_size, arch.side)          # [B, h, w, c']

    def middle(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """mid_block, rematerialised if `remat`; unlike nnx.remat, this may be inside jax.jvp."""
        if not self.remat:
            return self.mid_block(x)
        graph, state = nnx.split(self.mid_block)
        return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)
# fmt: on


create = UViT  # every model file exposes its model under this name


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters."""
    return weights_lib.shapes(lambda rngs: create(arch, dtype="float32", rngs=rngs))
