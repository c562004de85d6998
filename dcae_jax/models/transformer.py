# SPDX-License-Identifier: Apache-2.0
"""Parts shared by the diffusion transformers UViT and DiT: attention, MLP, patches, stacked blocks.

Parameters are float32; layers compute in their `dtype`, LayerNorm and the softmax always in
float32.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.nn.initializers import Initializer
from jaxtyping import Float, Float32, Real

from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models.layers import ONES, ZEROS
from dcae_jax.models.weights import Array, only_shapes, zeros_view
from dcae_jax.runtime import sharding
from dcae_jax.runtime.sharding import constrain_activations

MAX_PERIOD = 10000.0  # of the sinusoidal features
FREQUENCIES = 256  # sinusoidal features of a TimeEmbedder
MLP_RATIO = 4  # an MLP's hidden channels / its input's
ATTENTIONS = ("plain", "cudnn")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model size."""

    depth: int  # blocks; for a UViT, without the middle one
    width: int
    heads: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that determines the parameters (and a DiT's positions)."""

    depth: int
    width: int
    heads: int
    latent_size: int  # positions along each side
    latent_channels: int
    out_channels: int  # latent_channels, or twice as many with a learned sigma
    patch_size: int
    num_classes: int  # without the label that means "no class"
    average: bool = False  # predicts average velocities, given an interval of time

    @property
    def side(self) -> int:
        """Patches along each side."""
        return self.latent_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2


# --- layers ---------------------------------------------------------------------------------------


def layer_norm(width: int, *, eps: float, affine: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32; with a scale and a bias if `affine`."""
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        scale_init=ONES,
        bias_init=ZEROS,
        dtype=jnp.float32,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head softmax attention. The 3 C channels of qkv are (q, k, v), each (head, channel).

    linear(inputs, outputs): makes a layer. attention: 'plain' writes out the softmax, for every JAX
    transformation; 'cudnn' is cuDNN's fused kernel, for half precision on NVIDIA GPUs. Under a mesh
    with an axis tensor, the heads are sharded over it. Raises UserError for another attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        linear: Callable[..., nnx.Linear],
        *,
        qkv_bias: bool,
        attention: str = "plain",
    ):
        if attention not in ATTENTIONS:
            raise UserError(
                f"attention={attention!r} is not known; choose one of {', '.join(ATTENTIONS)}"
            )
        self.qkv = linear(width, 3 * width, use_bias=qkv_bias)
        self.proj = linear(width, width)
        self.heads, self.attention = heads, attention

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        b, n, c = x.shape
        qkv = project_to_heads(self.qkv, x, self.heads)  # [B, N, 3, heads, D]
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, heads, D]
        if self.attention == "cudnn":
            mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            mixed = plain_attention(q, k, v)
        mixed = constrain_activations(mixed, 2)  # [B, N, heads, D]
        return constrain_activations(self.proj(mixed.reshape(b, n, c)))  # [B, N, C]


def plain_attention(
    q: Float[Array, "B N heads D"], k: Float[Array, "B N heads D"], v: Float[Array, "B N heads D"]
) -> Float[Array, "B N heads D"]:
    """softmax(q k^T / sqrt(D)) v, [B, N, heads, D] each; scores and softmax in float32."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores = constrain_activations(scores, 1)  # [B, heads, N, N]
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v)


def project_to_heads(
    qkv: nnx.Linear, x: Float[Array, "B N C"], heads: int
) -> Float[Array, "B N 3 {heads} D"]:
    """qkv(x), [B, N, C] -> [B, N, 3, heads, D]: heads can be sharded where 3 C cannot."""
    b, n, c = x.shape
    shape = (3, heads, c // heads)
    if sharding.weights_mesh() is None:
        return qkv(x).reshape(b, n, *shape)
    kernel = sharding.split_qkv_heads(qkv.kernel[...], (c, *shape)).astype(qkv.dtype)
    y = jnp.einsum("bnc,ckhd->bnkhd", constrain_activations(x).astype(qkv.dtype), kernel)
    if qkv.bias is not None:
        y += qkv.bias[...].reshape(shape).astype(qkv.dtype)
    return constrain_activations(y, 3)


class MLP(nnx.Module):
    """Linear to 4 C, GELU (exact, or its tanh approximation), Linear to C.

    linear: as in `Attention`. Under a mesh with an axis tensor, the 4 C are sharded over it.
    """

    def __init__(self, width: int, linear: Callable[..., nnx.Linear], *, approximate: bool):
        self.fc1 = linear(width, MLP_RATIO * width)
        self.fc2 = linear(MLP_RATIO * width, width)
        self.approximate = approximate

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        x = constrain_activations(x)  # [B, N, C]
        x = constrain_activations(self.fc1(x), 2)  # [B, N, 4 C]
        x = jax.nn.gelu(x, approximate=self.approximate)
        return constrain_activations(self.fc2(x))  # [B, N, C]


def stack(count: int, create: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """A module like `create`'s, whose arrays stack those of `count` modules on axis 0."""
    if only_shapes():
        graphdef, state = nnx.split(create(rngs))
        return nnx.merge(
            graphdef, jax.tree.map(lambda leaf: zeros_view((count, *leaf.shape), leaf.dtype), state)
        )
    layers = [nnx.split(create(rngs)) for _ in range(count)]
    graphdef, structure = layers[0][0], jax.tree.structure(layers[0][1])
    rows = [jax.tree.leaves(state) for _, state in layers]
    del layers
    stacked = []
    for _ in range(structure.num_leaves):
        column = [row.pop(0) for row in rows]  # so that at most one array exists twice
        join = jnp.stack if isinstance(column[0], Tracer) else np.stack
        stacked.append(join(column))
    return nnx.merge(graphdef, jax.tree.unflatten(structure, stacked))


class Stacked(nnx.Module):
    """`count` layers of one kind, whose arrays are stacked on a leading layer axis.

    The stack is a module of that kind under the path '*', as in 'blocks.*.attn.qkv.kernel'. It
    cannot be called directly; `scan` runs the layers in order, as one compiled loop.

    create(rngs) -> one layer. remat: the backward pass rematerialises each layer instead of storing
    its intermediates. unroll: one copy of the program per layer instead of a loop.
    """

    def __init__(
        self,
        count: int,
        create: Callable[[nnx.Rngs], nnx.Module],
        *,
        remat: bool,
        unroll: bool,
        rngs: nnx.Rngs,
    ):
        setattr(self, "*", stack(count, create, rngs))
        self.count, self.remat, self.unroll = count, remat, unroll

    def scan(
        self,
        call: Callable[[Any, Array, Any], tuple[Array, Any]],
        x: Float[Array, "B N C"],
        each: Any = None,
    ) -> tuple[Float[Array, "B N C"], Any]:
        """(x after the last layer, the second results of all layers, stacked).

        call(layer, x, one layer's part of `each`) -> (x, second result).
        """
        graphdef, stack = nnx.split(getattr(self, "*"))

        def one(x: Array, inputs: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            state, part = inputs
            layer = sharding.all_gather_weights(nnx.merge(graphdef, state))
            return call(layer, constrain_activations(x), part)

        split = sharding.weights_mesh() is not None
        if self.remat or split:
            # Else the backward pass would hold the all-gathered weights of all layers at once.
            names = () if self.remat else (sharding.ACTIVATION,)
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            # Inside `scan`, prevent_cse is unnecessary.
            one = jax.checkpoint(one, prevent_cse=self.unroll, policy=policy)
        if not self.unroll:
            return jax.lax.scan(one, x, (stack, each))
        results = []
        for i in range(self.count):
            x, result = one(x, jax.tree.map(lambda a, i=i: a[i], (stack, each)))
            results.append(result)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def patch_embed(
    channels: int,
    width: int,
    size: int,
    *,
    kernel_init: Initializer,
    bias_init: Initializer,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution whose stride is its size: [B, h, w, c] -> [B, h / size, w / size, width].

    In float32: the cost is negligible next to a block, and tokens are rounded once, not thrice.
    """
    return nnx.Conv(
        channels,
        width,
        (size, size),
        strides=size,
        padding="VALID",
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=jnp.float32,
        rngs=rngs,
    )


def from_patches(
    x: Float[Array, "B {side**2} p"], size: int, side: int
) -> Float[Array, "B {side*size} {side*size} c"]:
    """[B, side^2, size^2 c] -> [B, h, w, c]; row by row, channels (row, column, c)."""
    b, c = x.shape[0], x.shape[-1] // size**2
    x = x.reshape(b, side, side, size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * size, side * size, c)


def time_features(t: Real[Array, " B"], width: int) -> Float32[Array, "B {width}"]:
    """[B] -> [B, width] float32: cos, then sin, of t at width / 2 frequencies 1 .. ~1/10000."""
    half = width // 2
    scale = np.float32(-math.log(MAX_PERIOD))
    frequencies = np.exp(scale * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t.astype(jnp.float32)[:, None] * frequencies  # [B, width / 2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedder(nnx.Module):
    """Sinusoidal features, Linear, SiLU, Linear; float32.

    linear(inputs, outputs): makes the first layer; last: the second, of zeros for an embedding that
    is added to a trained model.
    """

    def __init__(
        self,
        width: int,
        linear: Callable[..., nnx.Linear],
        last: Callable[..., nnx.Linear] | None = None,
    ):
        self.fc1 = linear(FREQUENCIES, width)
        self.fc2 = (last or linear)(width, width)

    def __call__(self, t: Real[Array, " B"]) -> Float32[Array, "B C"]:
        x = time_features(t, FREQUENCIES)  # [B, 256]
        return self.fc2(jax.nn.silu(self.fc1(x)))  # [B, C] float32


# --- sizes ----------------------------------------------------------------------------------------


def resolve_architecture(
    model_config: Model,
    variants: Mapping[str, Variant],
    *,
    patch_size: int,
    learn_sigma: bool,
    average: bool,
) -> Architecture:
    """The architecture of config.model: its variant, overridden by the sizes set beside it.

    Zero depth, width and heads keep the variant's. learn_sigma: the output has a second half for
    the variance. average: see `Architecture`. Raises UserError if a size does not fit.
    """
    if model_config.variant not in variants:
        raise UserError(
            f"model.variant={model_config.variant!r} is not known; "
            f"choose one of {', '.join(variants)}"
        )
    row = variants[model_config.variant]
    out = {
        key: getattr(model_config, key) or getattr(row, key) for key in ("depth", "width", "heads")
    }
    out.update(
        {k: getattr(model_config, k) for k in ("latent_size", "latent_channels", "num_classes")}
    )
    for key, value in out.items():
        if value < 1:
            raise UserError(f"model.{key}={value}: give an integer of at least 1")
    if patch_size < 1 or out["latent_size"] % patch_size:
        raise UserError(
            f"patch_size={patch_size} does not divide model.latent_size={out['latent_size']}; "
            "take one that does"
        )
    if out["width"] % out["heads"]:
        raise UserError(
            f"model.width={out['width']} is not divisible by model.heads={out['heads']}; "
            "change one of them"
        )
    out_channels = out["latent_channels"] * (2 if learn_sigma else 1)
    return Architecture(**out, out_channels=out_channels, patch_size=patch_size, average=average)


def architecture_of(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    embed: str,
    labels: str,
    predict: str,
    depth: int,
    extras: int,
    heads: int,
    variants: Mapping[str, Variant],
) -> Architecture:
    """The architecture of weights with these {PyTorch's name: shape}.

    embed, labels, predict: names of the patch embedding's, the label table's and the last
    Linear's weights. extras: tokens before the patches in pos_embed; without pos_embed,
    latent_size is 0. heads: 0 takes those of the variant of this width, since no tensor gives them.
    Raises UserError if no model has these shapes.
    """
    width, channels, patch, _ = shapes[embed]
    patches = shapes["pos_embed"][1] - extras if "pos_embed" in shapes else 0
    side = math.isqrt(max(patches, 0))
    if side**2 != patches:
        raise UserError(
            f"pos_embed is {shapes['pos_embed']}: only square latents after {extras} other tokens "
            "are supported"
        )
    known = (row.heads for row in variants.values() if row.width == width)
    heads = heads or next(known, 0)
    if not heads:
        raise UserError(
            f"no variant has width {width}, and the tensors do not give the number of heads; "
            f"name a variant with as many heads, one of {', '.join(variants)}"
        )
    return Architecture(
        depth=depth,
        width=width,
        heads=heads,
        latent_size=side * patch,
        latent_channels=channels,
        out_channels=shapes[predict][0] // patch**2,
        patch_size=patch,
        num_classes=shapes[labels][0] - 1,
    )
