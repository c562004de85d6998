# SPDX-License-Identifier: Apache-2.0
"""The layers of DC-AE.

Images are NHWC. Parameters are float32; a layer computes in its `dtype`; norms and attention
sums are float32 whatever the dtype is. Layers follow PyTorch where numbers depend on it: padding,
initialisation, the unbiased running variance of BatchNorm, the channel order of space-to-channel.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcae_jax.models.weights import Array, Weights, merge, split  # noqa: F401

Fill = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Init = Callable[[tuple[int, ...], Fill], Any]  # makes each parameter: `shapes` or `random(seed)`

HEAD_DIM = 32  # channels of one head of the linear attention [DC-AE, efficientvit]
EXPAND = 8  # hidden channels of GLUMBConv over its input's, both halves of the gate together


# --- modes of modules ----------------------------------------------------------------------------


def train_norms(model: nnx.Module, trained: Callable[[str], bool]) -> None:
    """Puts each BatchNorm that has a trained parameter into training mode, in place.

    The others keep normalising with their running statistics, and keep those as they are: a
    frozen layer whose statistics drift is not frozen.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            prefix = ".".join(map(str, path))
            module.use_running_average = not (
                trained(f"{prefix}.scale") or trained(f"{prefix}.bias")
            )


def remat_blocks(model: nnx.Module) -> None:
    """Makes the backward pass compute each block of an autoencoder again, in place.

    Between the blocks their inputs are kept, inside them nothing.
    """
    model.encoder.remat = model.decoder.remat = True


def run(blocks: Iterable[nnx.Module], x: Array, *, remat: bool) -> Array:
    """x after the blocks, one after the other; see `remat_blocks`."""

    def call(block, x):
        return block(x)

    call = nnx.remat(call) if remat else call
    for block in blocks:
        x = call(block, x)
    return x


# --- rearrangements without parameters ------------------------------------------------------------


def space_to_channel(x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, 4C]; out channel = c*4 + i*2 + j, as PyTorch's unshuffle."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def channel_to_space(x: Array) -> Array:
    """[B, H, W, 4C] -> [B, 2H, 2W, C], the inverse of `space_to_channel`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def average_channels(x: Array, channels: int) -> Array:
    """[..., C] -> [..., channels]: the mean over consecutive groups of C / channels."""
    groups = x.reshape(*x.shape[:-1], channels, x.shape[-1] // channels)
    return groups.mean(-1, dtype=jnp.float32).astype(x.dtype)


def duplicate_channels(x: Array, channels: int) -> Array:
    """[..., C] -> [..., channels]: each channel repeated channels / C times in a row."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def down_shortcut(x: Array, channels: int) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, channels]: space-to-channel, then channel averaging."""
    return average_channels(space_to_channel(x), channels)


def up_shortcut(x: Array, channels: int) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, channels]: channel duplication, then channel-to-space."""
    return channel_to_space(duplicate_channels(x, 4 * channels))


# --- initial values -------------------------------------------------------------------------------
# Drawn on the host: the same on every platform and mesh, and without compiling a program of
# hundreds of random draws, which takes XLA longer than the draws.


def shapes(shape: tuple[int, ...], fill: Fill) -> jax.ShapeDtypeStruct:
    """An Init that allocates nothing."""
    del fill
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def random(seed: int) -> Init:
    """An Init whose n-th parameter depends on (seed, n) alone."""
    numbers = itertools.count()

    def init(shape: tuple[int, ...], fill: Fill) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, next(numbers)]))
        return fill(rng, shape).astype(np.float32, copy=False)

    return init


def uniform(fan_in: int) -> Fill:
    """PyTorch's default for weights and biases of a convolution: U(-1, 1) / sqrt(fan_in)."""
    bound = np.float32(fan_in**-0.5)
    return lambda rng, shape: bound * (2 * rng.random(shape, np.float32) - 1)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.ones(shape, np.float32)


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.zeros(shape, np.float32)


# --- convolutions and norms -----------------------------------------------------------------------


# Positions of the largest map on which a convolution runs as a matrix product on a CPU. Where the
# kernel is as large as the map, XLA changes the two's places, for a program that was measured to
# take up to 60 times longer (2x2 maps of 256 channels); from 8x8 on its own form is the faster.
SMALL_MAP = 16


def convolution(x: Array, kernel: Array, stride: int) -> Array:
    """[B, H, W, in] by [size, size, in, out] -> [B, H/stride, W/stride, out], zeros around."""
    positions = x.shape[1] * x.shape[2]
    # No int in an export for any size.
    if stride == 1 and isinstance(positions, int) and positions <= SMALL_MAP:
        return jax.lax.platform_dependent(x, kernel, cpu=_as_product, default=_as_convolution)
    return _as_convolution(x, kernel, stride)


def _as_convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    pad = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _as_product(x: Array, kernel: Array) -> Array:
    size, outputs = kernel.shape[0], kernel.shape[3]
    patches = jnp.concatenate(_shifts(x, size), axis=-1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, outputs)
    return y.reshape(*x.shape[:3], outputs)


def _shifts(x: Array, size: int) -> list[Array]:
    """What each of a size x size kernel's positions sees: [B, H, W, C], row by row."""
    h, w = x.shape[1:3]
    pad = (size - 1) // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


class Conv(nnx.Module):
    """A dense convolution, padded on both sides by (size - 1) / 2 as in PyTorch.

    'SAME' would pad a stride of 2 by (0, 1) and shift the picture by a pixel.
    kernel [size, size, in, out], bias [out].
    """

    def __init__(self, inputs, outputs, *, size=3, stride=1, use_bias=True, dtype, init):
        fill = uniform(inputs * size * size)
        self.kernel = nnx.Param(init((size, size, inputs, outputs), fill))
        self.bias = nnx.Param(init((outputs,), fill)) if use_bias else None
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        y = convolution(x, kernel, self.stride)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Pointwise(nnx.Module):
    """A 1x1 convolution, which in NHWC is a matrix product. kernel [in, out], bias [out].

    With `groups`, a grouped one: kernel [groups, in / groups, out / groups], no bias.
    """

    def __init__(self, inputs, outputs, *, groups=1, use_bias=True, dtype, init):
        fill = uniform(inputs // groups)
        shape = (inputs // groups, outputs // groups)
        self.kernel = nnx.Param(init(shape if groups == 1 else (groups, *shape), fill))
        self.bias = nnx.Param(init((outputs,), fill)) if use_bias else None
        self.groups, self.dtype = groups, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.groups == 1:
            y = x @ kernel
        else:
            grouped = x.reshape(*x.shape[:-1], self.groups, kernel.shape[1])
            y = jnp.einsum("bhwgi,gio->bhwgo", grouped, kernel).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """A depthwise convolution. kernel [size, size, 1, channels], bias [channels].

    form 'grouped' is XLA's grouped convolution; form 'shifted' is size^2 shifted
    multiply-adds, the same numbers. On a CPU the gradient of the grouped one is up to hundreds
    of times slower; on a TPU both compile to the same work.
    """

    def __init__(self, channels, *, size=3, use_bias=True, form, dtype, init):
        fill = uniform(size * size)
        self.kernel = nnx.Param(init((size, size, 1, channels), fill))
        self.bias = nnx.Param(init((channels,), fill)) if use_bias else None
        self.form, self.dtype = form, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        size, channels = kernel.shape[0], kernel.shape[-1]
        if self.form == "grouped":
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                (((size - 1) // 2,) * 2,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=channels,
            )
        else:
            taps = kernel.reshape(size * size, channels)
            y = sum(part * tap for part, tap in zip(_shifts(x, size), taps, strict=True))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x over channels) * scale + bias ('trms2d' of the original), float32 inside."""

    def __init__(self, channels, *, dtype, init, eps=1e-5):
        self.scale = nnx.Param(init((channels,), ones))
        self.bias = nnx.Param(init((channels,), zeros))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return (x * inverse * self.scale[...] + self.bias[...]).astype(self.dtype)


class BatchNorm(nnx.Module):
    """BatchNorm over (batch, height, width), float32 inside.

    Normalises with the running statistics unless `use_running_average` is False (see
    `train_norms`). Under jit with a sharded batch the statistics are those of the global batch.
    As PyTorch does, the running variance is the unbiased one: var * n / (n - 1).
    """

    def __init__(self, channels, *, dtype, init, eps=1e-5, momentum=0.9):
        self.scale = nnx.Param(init((channels,), ones))
        self.bias = nnx.Param(init((channels,), zeros))
        self.mean = nnx.BatchStat(init((channels,), zeros))
        self.var = nnx.BatchStat(init((channels,), ones))
        self.eps, self.momentum, self.dtype = eps, momentum, dtype
        self.use_running_average = True

    def __call__(self, x: Array) -> Array:
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


def norm(kind: str, channels: int, *, dtype, init) -> nnx.Module:
    """The norm called `kind` in the original: 'trms2d' or 'bn2d'."""
    return {"trms2d": RMSNorm, "bn2d": BatchNorm}[kind](channels, dtype=dtype, init=init)


ACTIVATIONS = {"silu": nnx.silu, "relu": nnx.relu}


# --- attention ------------------------------------------------------------------------------------


def relu_attention(q: Array, k: Array, v: Array, *, eps: float = 1e-15) -> Array:
    """Attention whose similarity is relu(q) . relu(k), float32 inside.

    q, k, v [B, N, heads, D] -> [B, N, heads, D]. Sums over keys first (linear in N); where there
    are no more tokens than channels a head, over channels first, which is the same and cheaper.
    """
    q, k = nnx.relu(q.astype(jnp.float32)), nnx.relu(k.astype(jnp.float32))
    v = v.astype(jnp.float32)
    tokens = q.shape[1]
    few = isinstance(tokens, int) and tokens <= q.shape[-1]  # no int in an export for any size
    form = quadratic_attention if few else linear_attention
    return form(q, k, v, eps)


def linear_attention(q: Array, k: Array, v: Array, eps: float) -> Array:
    """sum_n q (k_n v_n) / (sum_n q k_n + eps); the denominator is v's channel of ones."""
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    kv = jnp.einsum("bnhd,bnhe->bhde", k, v)
    out = jnp.einsum("bnhd,bhde->bnhe", q, kv)
    return out[..., :-1] / (out[..., -1:] + eps)


def quadratic_attention(q: Array, k: Array, v: Array, eps: float) -> Array:
    """The same as `linear_attention`, with the N x N matrix of similarities."""
    similarity = jnp.einsum("bnhd,bmhd->bhnm", q, k)
    similarity = similarity / (similarity.sum(-1, keepdims=True) + eps)
    return jnp.einsum("bhnm,bmhe->bnhe", similarity, v)


class LiteMLA(nnx.Module):
    """Multi-head ReLU linear attention; `scale5` adds heads that see 5x5 neighbourhoods.

    Of the qkv channels, each run of 96 is one head's q, k, v.
    """

    def __init__(self, channels, *, scale5=False, norm_kind="trms2d", depthwise, dtype, init):
        heads = channels // HEAD_DIM
        qkv = 3 * channels
        self.qkv = Pointwise(channels, qkv, use_bias=False, dtype=dtype, init=init)
        self.scale5 = scale5
        if scale5:
            self.aggreg_depth = DepthwiseConv(
                qkv, size=5, use_bias=False, form=depthwise, dtype=dtype, init=init
            )
            self.aggreg_point = Pointwise(
                qkv, qkv, groups=3 * heads, use_bias=False, dtype=dtype, init=init
            )
        wide = channels * (2 if scale5 else 1)
        self.proj = Pointwise(wide, channels, use_bias=False, dtype=dtype, init=init)
        self.norm = norm(norm_kind, channels, dtype=dtype, init=init)

    def __call__(self, x: Array) -> Array:
        b, h, w, _ = x.shape
        qkv = self.qkv(x)
        if self.scale5:
            qkv = jnp.concatenate([qkv, self.aggreg_point(self.aggreg_depth(qkv))], -1)
        heads = qkv.reshape(b, h * w, -1, 3 * HEAD_DIM)
        out = relu_attention(*jnp.split(heads, 3, axis=-1))  # [b, hw, heads, 32]
        return self.norm(self.proj(out.reshape(b, h, w, -1)))


class GLUMBConv(nnx.Module):
    """Inverted bottleneck with a gate: 1x1 to 8C, SiLU, depthwise 3x3, a * SiLU(g), 1x1 to C."""

    def __init__(self, channels, *, norm_kind="trms2d", depthwise, dtype, init):
        hidden = EXPAND * channels
        self.inverted_conv = Pointwise(channels, hidden, dtype=dtype, init=init)
        self.depth_conv = DepthwiseConv(hidden, form=depthwise, dtype=dtype, init=init)
        self.point_conv = Pointwise(hidden // 2, channels, use_bias=False, dtype=dtype, init=init)
        self.norm = norm(norm_kind, channels, dtype=dtype, init=init)

    def __call__(self, x: Array) -> Array:
        x = self.depth_conv(nnx.silu(self.inverted_conv(x)))
        a, gate = jnp.split(x, 2, axis=-1)
        return self.norm(self.point_conv(a * nnx.silu(gate)))


class EfficientViTBlock(nnx.Module):
    """x + LiteMLA(x), then x + GLUMBConv(x)."""

    def __init__(self, channels, *, scale5=False, norm_kind="trms2d", depthwise, dtype, init):
        kwargs = dict(norm_kind=norm_kind, depthwise=depthwise, dtype=dtype, init=init)
        self.context_module = LiteMLA(channels, scale5=scale5, **kwargs)
        self.local_module = GLUMBConv(channels, **kwargs)

    def __call__(self, x: Array) -> Array:
        x = x + self.context_module(x)
        return x + self.local_module(x)


class ResBlock(nnx.Module):
    """x + norm(conv(act(conv(x))))."""

    def __init__(self, channels, *, norm_kind, act, dtype, init):
        self.conv1 = Conv(channels, channels, dtype=dtype, init=init)
        self.conv2 = Conv(channels, channels, use_bias=False, dtype=dtype, init=init)
        self.norm = norm(norm_kind, channels, dtype=dtype, init=init)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return x + self.norm(self.conv2(ACTIVATIONS[self.act](self.conv1(x))))


class Downsample(nnx.Module):
    """Half the size: conv and space-to-channel ('s2c'), or a conv of stride 2 ('stride').

    With `shortcut`, the parameter-free `down_shortcut` is added (DC-AE, section 3.2).
    """

    def __init__(self, inputs, outputs, *, form, shortcut, dtype, init):
        if form == "s2c":
            self.conv = Conv(inputs, outputs // 4, dtype=dtype, init=init)
        else:
            self.conv = Conv(inputs, outputs, stride=2, dtype=dtype, init=init)
        self.form, self.shortcut, self.outputs = form, shortcut, outputs

    def __call__(self, x: Array) -> Array:
        y = self.conv(x)
        if self.form == "s2c":
            y = space_to_channel(y)
        return y + down_shortcut(x, self.outputs) if self.shortcut else y


class Upsample(nnx.Module):
    """Twice the size: conv and channel-to-space ('c2s'), or nearest then conv ('nearest').

    With `shortcut`, the parameter-free `up_shortcut` is added (DC-AE, section 3.2).
    """

    def __init__(self, inputs, outputs, *, form, shortcut, dtype, init):
        wide = 4 * outputs if form == "c2s" else outputs
        self.conv = Conv(inputs, wide, dtype=dtype, init=init)
        self.form, self.shortcut, self.outputs = form, shortcut, outputs

    def __call__(self, x: Array) -> Array:
        if self.form == "c2s":
            y = channel_to_space(self.conv(x))
        else:
            y = self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return y + up_shortcut(x, self.outputs) if self.shortcut else y
