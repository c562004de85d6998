# SPDX-License-Identifier: Apache-2.0
"""The blocks of DC-AE (arXiv:2410.10733) and its parameter-free shortcuts.

Stages at high resolution use residual blocks, stages at low resolution EfficientViT blocks
(arXiv:2205.14756). Between stages, a shortcut that only rearranges the input bypasses the
convolution that changes the size. Attention sums are float32, whatever the dtype.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32

from dcae_jax.models.layers import GroupedLinear, Layers, NormKind
from dcae_jax.models.weights import Array

DownsampleForm = Literal["s2c", "stride"]
UpsampleForm = Literal["c2s", "nearest"]
Activation = Literal["silu", "relu"]
BlockKind = Literal["res", "evit", "evit5"]  # evit5: with heads that see 5x5 neighbourhoods

HEAD_DIM = 32  # channels of one head of the linear attention [DC-AE, efficientvit]
EXPAND = 8  # GLUMBConv's hidden channels / its input's, counting both halves of the gate
Heads = Float32[Array, "B N heads D"]  # queries, keys or values
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": nnx.silu, "relu": nnx.relu}


# --- parameter-free shortcuts (section 3.2) -------------------------------------------------------


def space_to_channel(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 4*C"]:
    """[B, H, W, C] -> [B, H/2, W/2, 4C]; out channel = c*4 + i*2 + j, as PyTorch's unshuffle."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)  # [B, H/2, i, W/2, j, C]
    x = x.transpose(0, 1, 3, 5, 2, 4)  # [B, H/2, W/2, C, i, j]
    return x.reshape(b, h // 2, w // 2, 4 * c)


def channel_to_space(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C//4"]:
    """[B, H, W, 4C] -> [B, 2H, 2W, C], the inverse of `space_to_channel`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2)  # [B, H, W, C, i, j]
    x = x.transpose(0, 1, 4, 2, 5, 3)  # [B, H, i, W, j, C]
    return x.reshape(b, 2 * h, 2 * w, c // 4)


def average_channels(x: Float[Array, "*n C"], channels: int) -> Float[Array, "*n {channels}"]:
    """[..., C] -> [..., channels]: the mean over consecutive groups of C / channels."""
    groups = x.reshape(*x.shape[:-1], channels, x.shape[-1] // channels)
    return groups.mean(-1, dtype=jnp.float32).astype(x.dtype)


def duplicate_channels(x: Float[Array, "*n C"], channels: int) -> Float[Array, "*n {channels}"]:
    """[..., C] -> [..., channels]: each channel repeated channels / C times, consecutively."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def down_shortcut(
    x: Float[Array, "B H W C"], channels: int
) -> Float[Array, "B H//2 W//2 {channels}"]:
    """[B, H, W, C] -> [B, H/2, W/2, channels]: space-to-channel, then channel averaging."""
    return average_channels(space_to_channel(x), channels)


def up_shortcut(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B 2*H 2*W {channels}"]:
    """[B, H, W, C] -> [B, 2H, 2W, channels]: channel duplication, then channel-to-space."""
    return channel_to_space(duplicate_channels(x, 4 * channels))


# --- EfficientViT blocks --------------------------------------------------------------------------


def relu_attention(
    q: Float[Array, "B N heads D"],
    k: Float[Array, "B N heads D"],
    v: Float[Array, "B N heads D"],
    *,
    eps: float = 1e-15,
) -> Float32[Array, "B N heads D"]:
    """Attention whose similarity is relu(q) . relu(k), float32 inside.

    q, k, v [B, N, heads, D] -> [B, N, heads, D]. Sums over keys first (linear in N). With no
    more tokens than channels per head, sums over channels first: the same result, cheaper.
    """
    q, k = nnx.relu(q.astype(jnp.float32)), nnx.relu(k.astype(jnp.float32))
    v = v.astype(jnp.float32)
    tokens = q.shape[1]
    few = isinstance(tokens, int) and tokens <= q.shape[-1]  # symbolic in an export for any size
    form = quadratic_attention if few else linear_attention
    return form(q, k, v, eps)


def linear_attention(q: Heads, k: Heads, v: Heads, eps: float) -> Heads:
    """sum_n q (k_n v_n) / (sum_n q k_n + eps); a channel of ones in v gives the denominator."""
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)  # [B, N, heads, D+1]
    kv = jnp.einsum("bnhd,bnhe->bhde", k, v)  # [B, heads, D, D+1]
    out = jnp.einsum("bnhd,bhde->bnhe", q, kv)  # [B, N, heads, D+1]
    return out[..., :-1] / (out[..., -1:] + eps)


def quadratic_attention(q: Heads, k: Heads, v: Heads, eps: float) -> Heads:
    """The same as `linear_attention`, through the N x N matrix of similarities."""
    similarity = jnp.einsum("bnhd,bmhd->bhnm", q, k)  # [B, heads, N, N]
    similarity = similarity / (similarity.sum(-1, keepdims=True) + eps)
    return jnp.einsum("bhnm,bmhe->bnhe", similarity, v)  # [B, N, heads, D]


# fmt: off
class LiteMLA(nnx.Module):
    """Multi-head ReLU linear attention; `scale5` adds heads that see 5x5 neighbourhoods.

    Every 96 consecutive qkv channels are the q, k and v of one head.
    """

    def __init__(
        self, channels: int, layers: Layers, *, norm: NormKind = "trms2d", scale5: bool = False
    ) -> None:
        qkv, groups = 3 * channels, 3 * channels // HEAD_DIM
        self.qkv = layers.linear(channels, qkv, use_bias=False)
        self.scale5 = scale5
        if scale5:
            self.aggreg_depth = layers.conv(qkv, qkv, size=5, use_bias=False, depthwise=True)
            self.aggreg_point = GroupedLinear(qkv, qkv, layers, groups=groups)
        wide = 2 * channels if scale5 else channels
        self.proj = layers.linear(wide, channels, use_bias=False)
        self.norm = layers.last_norm(norm, channels)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, _ = x.shape
        qkv = self.qkv(x)                                           # [B, H, W, 3C]
        if self.scale5:
            wide = self.aggreg_point(self.aggreg_depth(qkv))        # [B, H, W, 3C]
            qkv = jnp.concatenate([qkv, wide], -1)                  # [B, H, W, 6C]
        heads = qkv.reshape(b, h * w, -1, 3 * HEAD_DIM)             # [B, HW, heads, 96]
        q, k, v = jnp.split(heads, 3, axis=-1)                      # each [B, HW, heads, 32]
        out = relu_attention(q, k, v)                               # [B, HW, heads, 32]
        out = out.reshape(b, h, w, -1)                              # [B, H, W, C or 2C]
        return self.norm(self.proj(out))                            # [B, H, W, C]


class GLUMBConv(nnx.Module):
    """Inverted bottleneck with a gate: 1x1 to 8C, SiLU, depthwise 3x3, a * SiLU(g), 1x1 to C."""

    def __init__(self, channels: int, layers: Layers, *, norm: NormKind = "trms2d") -> None:
        hidden = EXPAND * channels
        self.inverted_conv = layers.linear(channels, hidden)
        self.depth_conv = layers.conv(hidden, hidden, depthwise=True)
        self.point_conv = layers.linear(hidden // 2, channels, use_bias=False)
        self.norm = layers.last_norm(norm, channels)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = nnx.silu(self.inverted_conv(x))                         # [B, H, W, 8C]
        x = self.depth_conv(x)                                      # [B, H, W, 8C]
        a, gate = jnp.split(x, 2, axis=-1)                          # each [B, H, W, 4C]
        return self.norm(self.point_conv(a * nnx.silu(gate)))       # [B, H, W, C]


class EfficientViTBlock(nnx.Module):
    """x + LiteMLA(x), then x + GLUMBConv(x)."""

    def __init__(self, channels: int, layers: Layers, *, norm: NormKind, scale5: bool) -> None:
        self.context_module = LiteMLA(channels, layers, norm=norm, scale5=scale5)
        self.local_module = GLUMBConv(channels, layers, norm=norm)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = x + self.context_module(x)                              # [B, H, W, C]
        return x + self.local_module(x)                             # [B, H, W, C]


# --- residual blocks, downsampling and upsampling -------------------------------------------------


class ResBlock(nnx.Module):
    """x + norm(conv(act(conv(x)))). The norm sets the activation: bn2d ReLU, trms2d SiLU."""

    def __init__(self, channels: int, layers: Layers, *, norm: NormKind) -> None:
        self.conv1 = layers.conv(channels, channels)
        self.conv2 = layers.conv(channels, channels, use_bias=False)
        self.norm = layers.last_norm(norm, channels)
        self.act: Activation = "relu" if norm == "bn2d" else "silu"

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = ACTIVATIONS[self.act](self.conv1(x))                    # [B, H, W, C]
        return x + self.norm(self.conv2(y))                         # [B, H, W, C]


def block(
    kind: BlockKind, width: int, norm: NormKind, layers: Layers
) -> ResBlock | EfficientViTBlock:
    """One block of a stage: [B, h, w, width] -> the same shape."""
    if kind == "res":
        return ResBlock(width, layers, norm=norm)
    return EfficientViTBlock(width, layers, norm=norm, scale5=kind == "evit5")


class Downsample(nnx.Module):
    """Halves the size: conv, then space-to-channel ('s2c'), or a stride-2 conv ('stride').

    `shortcut` adds the parameter-free `down_shortcut` (DC-AE, section 3.2).
    """

    def __init__(
        self, inputs: int, outputs: int, layers: Layers, *,
        form: DownsampleForm, shortcut: bool = False,
    ) -> None:
        if form == "s2c":
            self.conv = layers.conv(inputs, outputs // 4)
        else:
            self.conv = layers.conv(inputs, outputs, strides=2)
        self.form, self.shortcut, self.outputs = form, shortcut, outputs

    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> Float[Array, "B H//2 W//2 {self.outputs}"]:
        y = self.conv(x)                                            # [B, H, W, C'/4] with 's2c'
        if self.form == "s2c":
            y = space_to_channel(y)                                 # [B, H/2, W/2, C']
        if self.shortcut:
            y = y + down_shortcut(x, self.outputs)                  # [B, H/2, W/2, C']
        return y                                                    # [B, H/2, W/2, C']


class Upsample(nnx.Module):
    """Doubles the size: conv, then channel-to-space ('c2s'), or nearest, then conv ('nearest').

    `shortcut` adds the parameter-free `up_shortcut` (DC-AE, section 3.2).
    """

    def __init__(
        self, inputs: int, outputs: int, layers: Layers, *,
        form: UpsampleForm, shortcut: bool = False,
    ) -> None:
        self.conv = layers.conv(inputs, 4 * outputs if form == "c2s" else outputs)
        self.form, self.shortcut, self.outputs = form, shortcut, outputs

    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> Float[Array, "B 2*H 2*W {self.outputs}"]:
        if self.form == "c2s":
            y = channel_to_space(self.conv(x))                      # [B, 2H, 2W, C']
        else:
            y = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)     # [B, 2H, 2W, C]
            y = self.conv(y)                                        # [B, 2H, 2W, C']
        if self.shortcut:
            y = y + up_shortcut(x, self.outputs)                    # [B, 2H, 2W, C']
        return y                                                    # [B, 2H, 2W, C']
# fmt: on
