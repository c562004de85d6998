# SPDX-License-Identifier: Apache-2.0
"""Layers and initialisers: nnx's, with PyTorch's padding and initial values.

Images are NHWC. Parameters are float32; a layer computes in its `dtype`, norms always in float32.
`Layers` makes nnx's standard layers. Our own classes exist only where the numbers differ from
nnx's: BatchNorm's unbiased running variance, RMSNorm's bias, grouped 1x1 convolutions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Float

from dcae_jax.models.weights import Array, only_shapes, zeros_view

NormKind = Literal["trms2d", "bn2d"]  # as the original calls them
DepthwiseForm = Literal["grouped", "shifted"]

# --- nnx's layers with PyTorch's padding and initial values ---------------------------------------


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(bound) * (2 * rng.random(shape, np.float32) - 1)

    return on_host(
        draw, lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    )


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for weights and biases alike: U(-1, 1) / sqrt(fan_in)."""
    return uniform(1 / math.sqrt(fan_in))


def xavier(key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Any:
    """U(-1, 1) sqrt(6 / (inputs + outputs)) for a kernel [inputs, outputs]."""
    return uniform(math.sqrt(6 / sum(shape)))(key, shape, dtype, out_sharding)


def normal(deviation: float) -> Initializer:
    """N(0, deviation^2)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    return on_host(draw, lambda key, shape: deviation * jax.random.normal(key, shape))


def constant(value: float) -> Initializer:
    """`value` everywhere."""
    return on_host(
        lambda _, shape: np.full(shape, value, np.float32), lambda _, shape: jnp.full(shape, value)
    )


def on_host(
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
    traced: Callable[[Array, tuple[int, ...]], Array],
) -> Initializer:
    """An initialiser that draws with NumPy if its key is concrete, with jax.random in a trace.

    XLA takes longer to compile random draws than to run them. An autoencoder has hundreds of
    distinct kernels: `tiny` took 14 to 31 s instead of 0.1 s, f32c32 54 to 166 s instead of 20 s
    (two busy cores, unsafe_rbg to threefry keys). A tiny transformer's stacked draws took 4 s of
    its 17 s startup. Host draws are also the same on every platform and mesh.
    """

    def init(key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Any:
        del out_sharding
        shape, dtype = tuple(shape), jnp.float32 if dtype is None else dtype
        if only_shapes():
            return zeros_view(shape, dtype)
        if isinstance(key, Tracer):
            return traced(key, shape).astype(dtype)
        words = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(key))
        rng = np.random.Generator(np.random.Philox(key=words.view(np.uint64)[0]))
        return draw(rng, shape).astype(dtype, copy=False)

    return init


ZEROS, ONES = constant(0), constant(1)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of one model, in the order of the calls. All compute in `dtype`.

    depthwise: how XLA computes depthwise convolutions. 'grouped' is its grouped convolution;
    'shifted' is size^2 shifted multiply-adds, the same numbers. On a CPU the grouped
    gradient is up to hundreds of times slower; on a TPU both compile to the same work.
    block_scale: first value of the norm's scale that ends each residual branch; with 0 a block
    starts as the identity.
    """

    dtype: DTypeLike
    rngs: nnx.Rngs
    depthwise: DepthwiseForm = "grouped"
    block_scale: float = 1.0

    def linear(self, inputs: int, outputs: int, *, use_bias: bool = True) -> nnx.Linear:
        """A 1x1 convolution: in NHWC, a matrix product. kernel [in, out], bias [out]."""
        init = torch_uniform(inputs)
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def conv(
        self,
        inputs: int,
        outputs: int,
        *,
        size: int = 3,
        strides: int = 1,
        padding: tuple[int, int] | None = None,
        use_bias: bool = True,
        depthwise: bool = False,
    ) -> nnx.Conv:
        """A convolution. kernel [size, size, in, out], [size, size, 1, out] if depthwise.

        padding: (before, after) on both axes; None: size // 2 on every side. 'SAME' would pad a
        stride-2 convolution by (0, 1) and shift the image by a pixel.
        """
        init = torch_uniform(size**2 * (1 if depthwise else inputs))
        run = conv_on_small_maps
        if depthwise:
            run = _shifted if self.depthwise == "shifted" else jax.lax.conv_general_dilated
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides,
            padding=(padding or (size // 2, size // 2),) * 2,
            feature_group_count=inputs if depthwise else 1,
            use_bias=use_bias,
            kernel_init=init,
            bias_init=init,
            conv_general_dilated=run,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, kind: NormKind, channels: int, scale: float = 1.0) -> "RMSNorm | BatchNorm":
        """The norm that the original calls `kind`. scale: first value of its scale."""
        make = BatchNorm if kind == "bn2d" else RMSNorm
        return make(channels, scale=scale, dtype=self.dtype)

    def last_norm(self, kind: NormKind, channels: int) -> "RMSNorm | BatchNorm":
        """The norm that ends a residual branch."""
        return self.norm(kind, channels, self.block_scale)

    def group_norm(self, channels: int, *, groups: int, eps: float) -> nnx.GroupNorm:
        """GroupNorm over (height, width, consecutive channels) of each image, float32 inside."""
        return nnx.GroupNorm(
            channels,
            groups,
            epsilon=eps,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
            promote_dtype=float32_inside,
            scale_init=ONES,
            bias_init=ZEROS,
            dtype=self.dtype,
            rngs=self.rngs,
        )


def depthwise_form(form: Literal["auto", "grouped", "shifted"], platform: str) -> DepthwiseForm:
    """config.model.depthwise, with 'auto' resolved for devices of `platform`."""
    if form != "auto":
        return form
    return "shifted" if platform == "cpu" else "grouped"


def _shifted(
    x: Float[Array, "B H W C"], kernel: Float[Array, "size size 1 C"], *_: Any, **__: Any
) -> Float[Array, "B H W C"]:
    """[B, H, W, C] by [size, size, 1, C] -> [B, H, W, C]: the depthwise form 'shifted'."""
    taps = kernel.reshape(-1, kernel.shape[-1])  # [size^2, C]
    parts = [part * tap for part, tap in zip(_shifts(x, kernel.shape[0]), taps, strict=True)]
    return functools.reduce(jnp.add, parts)


def _shifts(x: Float[Array, "B H W C"], size: int) -> list[Float[Array, "B H W C"]]:
    """x shifted to each tap of a size x size kernel: size^2 times [B, H, W, C], row by row."""
    h, w = x.shape[1:3]
    pad = size // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


# Positions of the largest map whose convolutions run as a matrix product on a CPU. If the kernel is
# as large as the map, XLA swaps the two, which measured up to 60 times slower (2x2 maps of 256
# channels); from 8x8 on, XLA's own convolution is faster.
SMALL_MAP = 16


def conv_on_small_maps(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "size size C out"],
    strides: tuple[int, ...],
    padding: Any,
    **settings: Any,
) -> Float[Array, "B h w out"]:
    """jax.lax.conv_general_dilated; on a CPU, small maps use an equivalent matrix product."""

    def as_convolution(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

    positions = x.shape[1] * x.shape[2]
    # `positions` is symbolic in an export for any size.
    if strides == (1, 1) and isinstance(positions, int) and positions <= SMALL_MAP:
        return jax.lax.platform_dependent(x, kernel, cpu=_as_product, default=as_convolution)
    return as_convolution(x, kernel)


def _as_product(
    x: Float[Array, "B H W C"], kernel: Float[Array, "size size C out"]
) -> Float[Array, "B H W out"]:
    """[B, H, W, in] by [size, size, in, out] -> [B, H, W, out], zero-padded."""
    size, outputs = kernel.shape[0], kernel.shape[3]
    patches = jnp.concatenate(_shifts(x, size), axis=-1)  # [B, H, W, size^2 in]
    return patches @ kernel.reshape(-1, outputs)


class GroupedLinear(nnx.Module):
    """A grouped 1x1 convolution, no bias. kernel [groups, in / groups, out / groups]."""

    def __init__(self, inputs: int, outputs: int, layers: Layers, *, groups: int) -> None:
        shape = (groups, inputs // groups, outputs // groups)
        self.kernel = nnx.Param(torch_uniform(inputs // groups)(layers.rngs.params(), shape))
        self.groups, self.dtype = groups, layers.dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, self.groups, c // self.groups)
        y = jnp.einsum("bhwgi,gio->bhwgo", x, kernel)
        return y.reshape(b, h, w, -1)


def first_channels(z: Float[Array, "B h w c"], channels: int | Array) -> Float[Array, "B h w c"]:
    """z with zeros in the channels from `channels` on: a number c', or one for each example [B].

    It may be traced, so one program serves every c'.
    """
    counts = jnp.reshape(channels, (-1, 1, 1, 1))
    return jnp.where(jnp.arange(z.shape[-1]) < counts, z, 0)


# --- norms ----------------------------------------------------------------------------------------


def float32_inside(arrays: Any, *, dtype: Any = None, **_: Any) -> Any:
    """`promote_dtype` for nnx's norms: they compute in float32 and return their `dtype`.

    nnx's own rounds the input and the parameters to `dtype` first.
    """
    del dtype
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


class RMSNorm(nnx.Module):
    """x / rms(x over channels) * scale + bias ('trms2d' of the original), float32 inside."""

    def __init__(
        self, channels: int, *, dtype: DTypeLike, scale: float = 1.0, eps: float = 1e-5
    ) -> None:
        self.scale = nnx.Param(np.full(channels, scale, np.float32))
        self.bias = nnx.Param(np.zeros(channels, np.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return (x * inverse * self.scale[...] + self.bias[...]).astype(self.dtype)


class BatchNorm(nnx.Module):
    """BatchNorm over (batch, height, width), float32 inside.

    Normalises with the running statistics unless `use_running_average` is False (see
    `training_norms`). Under jit with a sharded batch the statistics are those of the global batch.
    As in PyTorch, the running variance is unbiased: var * n / (n - 1).
    """

    def __init__(
        self,
        channels: int,
        *,
        dtype: DTypeLike,
        scale: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.9,
    ) -> None:
        self.scale = nnx.Param(np.full(channels, scale, np.float32))
        self.bias = nnx.Param(np.zeros(channels, np.float32))
        self.mean = nnx.BatchStat(np.zeros(channels, np.float32))
        self.var = nnx.BatchStat(np.ones(channels, np.float32))
        self.eps, self.momentum, self.dtype = eps, momentum, dtype
        self.use_running_average = True

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        x = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1]
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
            keep, take = self.momentum, 1 - self.momentum
            unbiased = var * (count / max(count - 1, 1))
            self.mean.set_value(keep * self.mean[...] + take * jax.lax.stop_gradient(mean))
            self.var.set_value(keep * self.var[...] + take * jax.lax.stop_gradient(unbiased))
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        return ((x - mean) * scale + self.bias[...]).astype(self.dtype)


def training_norms(model: nnx.Module, trained: Callable[[str], bool]) -> Any:
    """A view of `model` in which each BatchNorm with a trained parameter is in training mode.

    The others normalise with their running statistics and do not update them: a frozen layer
    whose statistics drift is not frozen.
    """

    def is_trained(path: tuple[Any, ...], module: Any) -> bool:
        prefix = ".".join(map(str, path))
        return isinstance(module, BatchNorm) and (
            trained(f"{prefix}.scale") or trained(f"{prefix}.bias")
        )

    return nnx.view(model, only=is_trained, raise_if_not_found=False, use_running_average=False)


def run(blocks: Iterable[nnx.Module], x: Array, *, remat: bool) -> Array:
    """x after all blocks, applied in order.

    remat: the backward pass rematerialises each block. Only the blocks' inputs are stored.
    """

    def call(block: Any, x: Array) -> Array:
        return block(x)

    call = nnx.remat(call) if remat else call
    for block in blocks:
        x = call(block, x)
    return x
