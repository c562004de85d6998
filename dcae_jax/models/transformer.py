# SPDX-License-Identifier: Apache-2.0
"""What the diffusion transformers UViT and DiT share: layers and stacked blocks.

The parameters of repeated blocks are stored stacked, one array for all layers with the layer as
its leading axis, under a path that says so: `blocks.*.attn.qkv.kernel`. One compiled loop then
serves every layer. Parameters are float32, layers compute in their `dtype`; LayerNorm and the
softmax are float32 whatever the dtype is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcae_jax.config import UserError
from dcae_jax.models import layers
from dcae_jax.models.layers import Array, Fill, Init
from dcae_jax.sharding import Layout, tokens

MAX_PERIOD = 10000.0  # of the sinusoidal features
MLP_RATIO = 4  # hidden channels of an MLP over its input's

# --- initial values -------------------------------------------------------------------------------


def normal(deviation: float) -> Fill:
    """N(0, deviation^2)."""
    return lambda rng, shape: np.float32(deviation) * rng.standard_normal(shape, np.float32)


def xavier(inputs: int, outputs: int) -> Fill:
    """U(-1, 1) * sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010)."""
    bound = np.float32(math.sqrt(6 / (inputs + outputs)))
    return lambda rng, shape: bound * (2 * rng.random(shape, np.float32) - 1)


def stacked(init: Init, count: int) -> Init:
    """An Init of `count` layers at once: a leading axis more, and each layer has its own draws."""

    def init_all(shape: tuple[int, ...], fill: Fill) -> Any:
        def fill_all(rng: np.random.Generator, full: tuple[int, ...]) -> np.ndarray:
            return np.stack([fill(rng, full[1:]) for _ in range(count)])

        return init((count, *shape), fill_all)

    return init_all


# --- layers ---------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """A matrix product. kernel [in, out], bias [out], which starts at 0."""

    def __init__(self, inputs, outputs, *, fill, use_bias=True, dtype, init):
        self.kernel = nnx.Param(init((inputs, outputs), fill))
        self.bias = nnx.Param(init((outputs,), layers.zeros)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def normalize(x: Array, eps: float) -> Array:
    """(x - mean) / deviation over the channels, in float32 and returned so."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`normalize`, then * scale + bias."""

    def __init__(self, channels, *, dtype, init, eps=1e-5):
        self.scale = nnx.Param(init((channels,), layers.ones))
        self.bias = nnx.Param(init((channels,), layers.zeros))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        return (normalize(x, self.eps) * self.scale[...] + self.bias[...]).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head softmax attention. The qkv channels are (q, k, v), each of them (head, channel).

    [B, N, C] -> [B, N, C]. With a `layout`, each device of its tensor axis has some of the heads.
    """

    def __init__(self, width, heads, *, qkv_bias, fill_qkv, fill_proj, dtype, init, layout=None):
        self.qkv = Linear(
            width, 3 * width, fill=fill_qkv, use_bias=qkv_bias, dtype=dtype, init=init
        )
        self.proj = Linear(width, width, fill=fill_proj, dtype=dtype, init=init)
        self.heads, self.layout = heads, layout

    def __call__(self, x: Array) -> Array:
        b, n, width = x.shape
        qkv = self._by_head(x) if self.layout else self.qkv(x)
        qkv = qkv.reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, heads, D]
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (width // self.heads) ** -0.5, axis=-1)
        mixed = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v)
        return tokens(self.layout, self.proj(mixed.reshape(b, n, width)))

    def _by_head(self, x: Array) -> Array:
        """self.qkv(x) as [B, N, 3, heads, D], whose heads can be split where 3 C cannot."""
        x, width, dtype = tokens(self.layout, x), x.shape[-1], self.qkv.dtype
        shape = (3, self.heads, width // self.heads)
        kernel = self.layout.by_head(self.qkv.kernel[...], (width, *shape))
        y = jnp.einsum("bnc,ckhd->bnkhd", x.astype(dtype), kernel.astype(dtype))
        if self.qkv.bias is not None:
            y += self.qkv.bias[...].reshape(shape).astype(dtype)
        return tokens(self.layout, y, 3)


class MLP(nnx.Module):
    """Linear to 4 C, GELU (exact, or its tanh approximation), Linear to C.

    With a `layout`, each device of its tensor axis has some of the 4 C.
    """

    def __init__(self, width, *, approximate, fill_in, fill_out, dtype, init, layout=None):
        self.fc1 = Linear(width, MLP_RATIO * width, fill=fill_in, dtype=dtype, init=init)
        self.fc2 = Linear(MLP_RATIO * width, width, fill=fill_out, dtype=dtype, init=init)
        self.approximate, self.layout = approximate, layout

    def __call__(self, x: Array) -> Array:
        hidden = tokens(self.layout, self.fc1(tokens(self.layout, x)), 2)
        hidden = jax.nn.gelu(hidden, approximate=self.approximate)
        return tokens(self.layout, self.fc2(hidden))


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size: [B, h, w, c] -> [B, h w / size^2, width].

    kernel [size, size, c, width], bias [width].
    """

    def __init__(self, channels, width, *, size, fill, fill_bias, dtype, init):
        self.kernel = nnx.Param(init((size, size, channels, width), fill))
        self.bias = nnx.Param(init((width,), fill_bias))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        patches = to_patches(x.astype(self.dtype), kernel.shape[0])
        return patches @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """A learned vector for each label. table [labels, width]; [B] -> [B, width] float32."""

    def __init__(self, count, width, *, fill, init):
        self.table = nnx.Param(init((count, width), fill))

    def __call__(self, labels: Array) -> Array:
        return self.table[...][labels]


def to_patches(x: Array, size: int) -> Array:
    """[B, h, w, c] -> [B, h w / size^2, size^2 c]; row by row, channels (row, column, c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // size) * (w // size), size * size * c)


def from_patches(x: Array, size: int, side: int) -> Array:
    """The inverse of `to_patches` for a square of `side` patches a side."""
    b, c = x.shape[0], x.shape[-1] // size**2
    x = x.reshape(b, side, side, size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * size, side * size, c)


def time_features(t: Array, width: int) -> Array:
    """[B] -> [B, width] float32: cos, then sin, of t at width / 2 frequencies 1 .. ~1/10000."""
    half = width // 2
    scale = np.float32(-math.log(MAX_PERIOD))
    frequencies = np.exp(scale * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def run_blocks(
    blocks: nnx.Module,
    x: Array,
    call: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    each: Any = None,
    *,
    remat: bool,
    unroll: bool,
    layout: Layout | None = None,
    prefix: str = "",
) -> tuple[Array, Any]:
    """Runs stacked blocks one after the other: (x after the last, their second results stacked).

    blocks: the module that holds the parameters of all layers, each with a leading axis.
    call(block, x, one layer's part of `each`) -> (x, second result).
    remat: the backward pass computes a block again instead of keeping what is inside it.
    unroll: one copy of the block's program a layer instead of one loop over the layers.
    layout: where the weights lie split, with the `prefix` of their paths ('blocks.*.'). A layer's
    are put together when its turn comes.
    """
    graph, weights, _ = layers.split(blocks)

    def one(x, inputs):
        layer, part = inputs
        if layout:
            x, layer = tokens(layout, x), layout.use(layer, prefix)
        return call(layers.merge(graph, layer), x, part)

    if remat or layout:
        # A loop's body needs no barrier against the merging of what is computed twice.
        keep = None if remat else _of_tokens(x.shape[0])
        one = jax.checkpoint(one, prevent_cse=unroll, policy=keep)
    if not unroll:
        return jax.lax.scan(one, x, (weights, each))
    results = []
    for i in range(next(iter(weights.values())).shape[0]):
        x, result = one(x, jax.tree.map(lambda a, i=i: a[i], (weights, each)))
        results.append(result)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def _of_tokens(batch: int) -> Callable[..., bool]:
    """What the backward pass keeps of a block: all but weights, which are put together again.

    Kept, the weights of all layers would be whole at once. A result is told by its inputs: of the
    activations, [batch, N, ...], some are of such a shape.
    """

    def keep(primitive: Any, *inputs: Any, **settings: Any) -> bool:
        del primitive, settings
        return any(value.ndim >= 3 and value.shape[0] == batch for value in inputs)

    return keep


def run_block(block: nnx.Module, x: Array, *, remat: bool) -> Array:
    """block(x), computed again by the backward pass if `remat`."""
    graph, weights, _ = layers.split(block)

    def run(layer, x):
        return layers.merge(graph, layer)(x)

    return (jax.checkpoint(run) if remat else run)(weights, x)


def check_layout(layout: Layout | None, heads: int) -> None:
    """Raises UserError unless the heads can be split over mesh.tensor."""
    if layout and heads % layout.mesh.shape["tensor"]:
        raise UserError(
            f"mesh.tensor={layout.mesh.shape['tensor']} does not divide the {heads} heads; take "
            f"{math.gcd(heads, layout.mesh.shape['tensor'])} or another divisor"
        )


# --- sizes ----------------------------------------------------------------------------------------


def sizes(model_config: Any, variants: Mapping[str, Any], patch_size: int) -> dict[str, int]:
    """Checked {field of an Architecture: value} that both backbones have, all but out_channels.

    Zero depth, width and heads keep those of the variant. Raises UserError.
    """
    if model_config.variant not in variants:
        raise UserError(
            f"model.variant={model_config.variant!r} is not known; "
            f"choose one of {', '.join(variants)}"
        )
    row = variants[model_config.variant]
    out = {key: model_config[key] or getattr(row, key) for key in ("depth", "width", "heads")}
    out.update({k: model_config[k] for k in ("latent_size", "latent_channels", "num_classes")})
    for key, value in out.items():
        if value < 1:
            raise UserError(f"model.{key}={value}: give a whole number of at least 1")
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
    return {**out, "patch_size": patch_size}


def heads_of(width: int, variants: Mapping[str, Any]) -> int:
    """The heads of the variant that has this width. Raises UserError if there is none."""
    for row in variants.values():
        if row.width == width:
            return row.heads
    raise UserError(
        f"a width of {width} is that of no variant, and no tensor tells the heads; "
        f"name the variant whose heads it has, one of {', '.join(variants)}"
    )


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of one block's attention and MLP for one sample.

    The products of queries with keys and of weights with values count.
    """
    matrices = (3 + 1 + 2 * MLP_RATIO) * width**2
    return tokens * matrices + 2 * tokens**2 * width


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
