# SPDX-License-Identifier: Apache-2.0
"""The Inception network of FID: Google's of 2015-12-05, as ported from TensorFlow to PyTorch.

It differs from torchvision's: 1008 classes, average pooling that does not count its padding, and
max pooling in the last block. Weights are a flat dict of float32 arrays, passed to every
function: `NAME.kernel` (HWIO) and `NAME.bias` with PyTorch's names, each BatchNorm (eps 1e-3)
folded into its convolution. `dcae-jax convert` makes the file from
pytorch-fid's pt_inception-2015-12-05-6726825d.pth or from torch-fidelity's weights-inception of
the same date and hash.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dcae_jax.models.weights import AnyArray, AnyWeights, Array

Convolution = Callable[..., jax.Array]  # (x, name, stride=1, same=True)
Pool = Callable[[jax.Array], jax.Array]

SIZE = 299  # pixels per side of the network's input
PREPROCESSINGS = ("pytorch-fid", "torch-fidelity")


def preprocess(levels: AnyArray, kind: str) -> Float32[Array, "B 299 299 3"]:
    """Images as levels 0..255 -> the network's input, [B, 299, 299, 3] float32 near [-1, 1].

    levels: [B, H, W, 3], uint8 or integer-valued floats (`transforms.to_levels`), any size. Two
    tools, two preprocessings; scores are comparable only within one:
    'pytorch-fid' (FID, rFID): x / 127.5 - 1, bilinear with half-pixel centres, no antialiasing;
    'torch-fidelity' (IS, KID, precision, recall): bilinear as in TensorFlow 1, sampled
    at i * H / 299, then (x - 128) / 128.
    Raises ValueError for another kind or shape.
    """
    if kind not in PREPROCESSINGS:
        raise ValueError(f"preprocessing {kind!r}: choose one of {', '.join(PREPROCESSINGS)}")
    if levels.ndim != 4 or levels.shape[3] != 3:
        raise ValueError(f"Inception needs [B, H, W, 3], got {levels.shape}")
    x = jnp.asarray(levels, jnp.float32)
    half_pixel = kind == "pytorch-fid"
    x = _resize(_resize(x, 1, half_pixel), 2, half_pixel)
    return x / 127.5 - 1.0 if half_pixel else (x - 128.0) / 128.0


def _resize(x: jax.Array, axis: int, half_pixel: bool) -> jax.Array:
    """Linear interpolation of one axis to `SIZE`, repeating the outermost pixels."""
    length = x.shape[axis]
    if length == SIZE:
        return x
    position = np.arange(SIZE) * (length / SIZE)
    if half_pixel:
        position = np.maximum((np.arange(SIZE) + 0.5) * (length / SIZE) - 0.5, 0.0)
    low = np.minimum(position.astype(int), length - 1)
    high = np.minimum(low + 1, length - 1)
    shape = [1, 1, 1, 1]
    shape[axis] = SIZE
    weight = jnp.asarray((position - low).reshape(shape), jnp.float32)
    below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
    return below + (above - below) * weight


def features(
    weights: AnyWeights, images: AnyArray, fc_bias: bool = False
) -> tuple[Float32[Array, "B 2048"], Float32[Array, "B 1008"]]:
    """Network input of `preprocess` -> (pool3 [B, 2048], logits [B, 1008]), float32.

    The logits leave out the bias of the last layer, as the Inception score needs them (Salimans
    et al. 2016; torch-fidelity's 'logits_unbiased'); `fc_bias=True` adds it. Runs in full float32
    on every device: lower precision changes the FID. Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"Inception's input is [B, {SIZE}, {SIZE}, 3], got {images.shape}: "
            "run `preprocess` first"
        )
    conv = functools.partial(_conv, weights)
    x = conv(jnp.asarray(images, jnp.float32), "Conv2d_1a_3x3", 2, same=False)  # [B, 149, 149, 32]
    x = conv(x, "Conv2d_2a_3x3", same=False)  # [B, 147, 147, 32]
    x = conv(x, "Conv2d_2b_3x3")  # [B, 147, 147, 64]
    x = _max_pool(x, 2)  # [B, 73, 73, 64]
    x = conv(x, "Conv2d_3b_1x1")  # [B, 73, 73, 80]
    x = conv(x, "Conv2d_4a_3x3", same=False)  # [B, 71, 71, 192]
    x = _max_pool(x, 2)  # [B, 35, 35, 192]
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_a(conv, x, name)  # [B, 35, 35, 256 then 288]
    x = _block_b(conv, x, "Mixed_6a")  # [B, 17, 17, 768]
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _block_c(conv, x, name)  # [B, 17, 17, 768]
    x = _block_d(conv, x, "Mixed_7a")  # [B, 8, 8, 1280]
    x = _block_e(conv, x, "Mixed_7b", _mean_pool)  # [B, 8, 8, 2048]
    x = _block_e(conv, x, "Mixed_7c", functools.partial(_max_pool, stride=1))
    pool3 = jnp.mean(x, axis=(1, 2))  # [B, 2048]
    logits = jnp.matmul(pool3, weights["fc.kernel"], precision=jax.lax.Precision.HIGHEST)
    return pool3, logits + weights["fc.bias"] if fc_bias else logits


def _block_a(conv: Convolution, x: jax.Array, name: str) -> jax.Array:
    a = conv(x, f"{name}.branch1x1")
    b = _chain(conv, x, f"{name}.branch5x5_", "12")
    c = _chain(conv, x, f"{name}.branch3x3dbl_", "123")
    d = conv(_mean_pool(x), f"{name}.branch_pool")
    return jnp.concatenate([a, b, c, d], axis=3)


def _block_b(conv: Convolution, x: jax.Array, name: str) -> jax.Array:
    a = conv(x, f"{name}.branch3x3", 2, same=False)
    b = _chain(conv, x, f"{name}.branch3x3dbl_", "12")
    b = conv(b, f"{name}.branch3x3dbl_3", 2, same=False)
    return jnp.concatenate([a, b, _max_pool(x, 2)], axis=3)


def _block_c(conv: Convolution, x: jax.Array, name: str) -> jax.Array:
    a = conv(x, f"{name}.branch1x1")
    b = _chain(conv, x, f"{name}.branch7x7_", "123")
    c = _chain(conv, x, f"{name}.branch7x7dbl_", "12345")
    d = conv(_mean_pool(x), f"{name}.branch_pool")
    return jnp.concatenate([a, b, c, d], axis=3)


def _block_d(conv: Convolution, x: jax.Array, name: str) -> jax.Array:
    a = conv(x, f"{name}.branch3x3_1")
    a = conv(a, f"{name}.branch3x3_2", 2, same=False)
    b = _chain(conv, x, f"{name}.branch7x7x3_", "123")
    b = conv(b, f"{name}.branch7x7x3_4", 2, same=False)
    return jnp.concatenate([a, b, _max_pool(x, 2)], axis=3)


def _block_e(conv: Convolution, x: jax.Array, name: str, pool: Pool) -> jax.Array:
    a = conv(x, f"{name}.branch1x1")
    b = conv(x, f"{name}.branch3x3_1")
    b = [conv(b, f"{name}.branch3x3_2{side}") for side in "ab"]
    c = _chain(conv, x, f"{name}.branch3x3dbl_", "12")
    c = [conv(c, f"{name}.branch3x3dbl_3{side}") for side in "ab"]
    d = conv(pool(x), f"{name}.branch_pool")
    return jnp.concatenate([a, *b, *c, d], axis=3)


def _chain(conv: Convolution, x: jax.Array, prefix: str, steps: str) -> jax.Array:
    for step in steps:
        x = conv(x, prefix + step)
    return x


def _conv(
    weights: AnyWeights, x: jax.Array, name: str, stride: int = 1, same: bool = True
) -> jax.Array:
    kernel = jnp.asarray(weights[f"{name}.kernel"])
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(k // 2, k // 2) if same else (0, 0) for k in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(x + weights[f"{name}.bias"])


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3: stride 2 without padding, or stride 1 with one pixel of padding."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0)) if stride == 1 else "VALID"
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), pad
    )


def _mean_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 1; averages only pixels inside the image, as in TensorFlow."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), pad)
    rows, columns = (
        np.convolve(np.ones(n, np.float32), np.ones(3, np.float32), "same") for n in x.shape[1:3]
    )
    return total / np.outer(rows, columns)[None, :, :, None]


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight: 94 convolutions and the last layer."""
    convolutions = {  # name -> (kernel height, width, in, out)
        "Conv2d_1a_3x3": (3, 3, 3, 32),
        "Conv2d_2a_3x3": (3, 3, 32, 32),
        "Conv2d_2b_3x3": (3, 3, 32, 64),
        "Conv2d_3b_1x1": (1, 1, 64, 80),
        "Conv2d_4a_3x3": (3, 3, 80, 192),
    }
    for block, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        convolutions |= {
            f"Mixed_{block}.branch1x1": (1, 1, channels, 64),
            f"Mixed_{block}.branch5x5_1": (1, 1, channels, 48),
            f"Mixed_{block}.branch5x5_2": (5, 5, 48, 64),
            f"Mixed_{block}.branch3x3dbl_1": (1, 1, channels, 64),
            f"Mixed_{block}.branch3x3dbl_2": (3, 3, 64, 96),
            f"Mixed_{block}.branch3x3dbl_3": (3, 3, 96, 96),
            f"Mixed_{block}.branch_pool": (1, 1, channels, pool),
        }
    convolutions |= {
        "Mixed_6a.branch3x3": (3, 3, 288, 384),
        "Mixed_6a.branch3x3dbl_1": (1, 1, 288, 64),
        "Mixed_6a.branch3x3dbl_2": (3, 3, 64, 96),
        "Mixed_6a.branch3x3dbl_3": (3, 3, 96, 96),
    }
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        convolutions |= {
            f"Mixed_{block}.branch1x1": (1, 1, 768, 192),
            f"Mixed_{block}.branch7x7_1": (1, 1, 768, c),
            f"Mixed_{block}.branch7x7_2": (1, 7, c, c),
            f"Mixed_{block}.branch7x7_3": (7, 1, c, 192),
            f"Mixed_{block}.branch7x7dbl_1": (1, 1, 768, c),
            f"Mixed_{block}.branch7x7dbl_2": (7, 1, c, c),
            f"Mixed_{block}.branch7x7dbl_3": (1, 7, c, c),
            f"Mixed_{block}.branch7x7dbl_4": (7, 1, c, c),
            f"Mixed_{block}.branch7x7dbl_5": (1, 7, c, 192),
            f"Mixed_{block}.branch_pool": (1, 1, 768, 192),
        }
    convolutions |= {
        "Mixed_7a.branch3x3_1": (1, 1, 768, 192),
        "Mixed_7a.branch3x3_2": (3, 3, 192, 320),
        "Mixed_7a.branch7x7x3_1": (1, 1, 768, 192),
        "Mixed_7a.branch7x7x3_2": (1, 7, 192, 192),
        "Mixed_7a.branch7x7x3_3": (7, 1, 192, 192),
        "Mixed_7a.branch7x7x3_4": (3, 3, 192, 192),
    }
    for block, channels in (("7b", 1280), ("7c", 2048)):
        convolutions |= {
            f"Mixed_{block}.branch1x1": (1, 1, channels, 320),
            f"Mixed_{block}.branch3x3_1": (1, 1, channels, 384),
            f"Mixed_{block}.branch3x3_2a": (1, 3, 384, 384),
            f"Mixed_{block}.branch3x3_2b": (3, 1, 384, 384),
            f"Mixed_{block}.branch3x3dbl_1": (1, 1, channels, 448),
            f"Mixed_{block}.branch3x3dbl_2": (3, 3, 448, 384),
            f"Mixed_{block}.branch3x3dbl_3a": (1, 3, 384, 384),
            f"Mixed_{block}.branch3x3dbl_3b": (3, 1, 384, 384),
            f"Mixed_{block}.branch_pool": (1, 1, channels, 192),
        }
    found = {"fc.kernel": (2048, 1008), "fc.bias": (1008,)}
    for name, shape in convolutions.items():
        found[f"{name}.kernel"] = shape
        found[f"{name}.bias"] = shape[3:]
    return found
