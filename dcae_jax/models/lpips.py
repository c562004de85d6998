# SPDX-License-Identifier: Apache-2.0
"""LPIPS v0.1 (Zhang et al. 2018): the distance between two images in a classifier's features.

VGG16 serves the training loss, AlexNet the metric that papers report. Weights are a flat dict
of float32 arrays, passed to every function: `features.N.kernel` (HWIO) and `features.N.bias`
with torchvision's N, and `lin0` .. `lin4`, the learned weight of each channel. The linear layers
ship with this package; `dcae-jax convert` converts torchvision's weights.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Num

from dcae_jax.models.weights import AnyArray, AnyWeights, Array

# torchvision's layers: (index, in, out, kernel, stride, padding), "pool" and "tap" (after ReLU).
_POOL, _TAP = "pool", "tap"
_LAYERS = {
    "vgg": (
        *((0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1), _TAP, _POOL),
        *((5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1), _TAP, _POOL),
        *((10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1), _TAP, _POOL),
        *((17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1), _TAP, _POOL),
        *((24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1), _TAP),
    ),
    "alex": (
        *((0, 3, 64, 11, 4, 2), _TAP, _POOL),
        *((3, 64, 192, 5, 1, 2), _TAP, _POOL),
        *((6, 192, 384, 3, 1, 1), _TAP),
        *((8, 384, 256, 3, 1, 1), _TAP),
        *((10, 256, 256, 3, 1, 1), _TAP),
    ),
}
_POOL_WINDOW = {"vgg": 2, "alex": 3}  # stride 2, no padding
MIN_SIZE = {"vgg": 16, "alex": 31}  # pixels; smaller images are empty after the last pooling
_SHIFT = (-0.030, -0.088, -0.188)  # `ScalingLayer` of the lpips package, for images in [-1, 1]
_SCALE = (0.458, 0.448, 0.450)


def distance(
    weights: AnyWeights,
    x: AnyArray,
    y: AnyArray,
    net: str = "vgg",
    normalize: str = "lpips",
    precision: jax.lax.Precision | None = jax.lax.Precision.HIGHEST,
) -> Float32[Array, " B"]:
    """LPIPS of each pair: [B, H, W, 3] in [-1, 1], twice -> [B] float32, 0 for equal images.

    Differentiable in x and y. `normalize` selects how a feature vector f becomes a unit vector:
    'lpips' f / (|f| + 1e-10), as the lpips package; 'torchmetrics' f / sqrt(|f|^2 + 1e-8), which
    the published LPIPS numbers of DC-AE use. Everything runs in float32, whatever the input's
    dtype; `precision` applies to the convolutions, on devices with a faster, less precise mode
    (None: jax_default_matmul_precision). Raises ValueError.
    """
    _known(net)
    if normalize not in ("lpips", "torchmetrics"):
        raise ValueError(f"normalize={normalize!r}: choose 'lpips' or 'torchmetrics'")
    if x.shape != y.shape or x.ndim != 4 or x.shape[3] != 3:
        raise ValueError(f"LPIPS needs two [B, H, W, 3] of one shape, got {x.shape} and {y.shape}")
    if min(x.shape[1:3]) < MIN_SIZE[net]:
        raise ValueError(
            f"LPIPS with net={net!r} needs images of at least {MIN_SIZE[net]} pixels, "
            f"got {x.shape[1]}x{x.shape[2]}: enlarge them"
        )
    total = jnp.zeros(x.shape[0], jnp.float32)
    taps = zip(_taps(weights, x, net, precision), _taps(weights, y, net, precision), strict=True)
    for i, (a, b) in enumerate(taps):
        difference = jnp.square(_unit(a, normalize) - _unit(b, normalize))
        total += jnp.mean(jnp.sum(difference * weights[f"lin{i}"], axis=3), axis=(1, 2))
    return total


def _taps(
    weights: AnyWeights,
    images: Num[AnyArray, "B H W 3"],
    net: str,
    precision: jax.lax.Precision | None,
) -> list[Float32[Array, "B _h _w _c"]]:
    """Images [B, H, W, 3] -> the five feature maps [B, h, w, c], shallow to deep."""
    x = (jnp.asarray(images, jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    taps = []
    for layer in _LAYERS[net]:
        if layer == _TAP:
            taps.append(x)  # [B, H/2^i, W/2^i, c] of VGG
        elif layer == _POOL:
            window = (1, _POOL_WINDOW[net], _POOL_WINDOW[net], 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        else:
            index, _, _, _, stride, padding = layer
            x = jax.lax.conv_general_dilated(
                x,
                jnp.asarray(weights[f"features.{index}.kernel"]),
                (stride, stride),
                [(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            x = jax.nn.relu(x + weights[f"features.{index}.bias"])
    return taps


def _unit(x: Float32[Array, "B h w c"], normalize: str) -> Float32[Array, "B h w c"]:
    """[B, h, w, c] -> the same shape, each channel vector scaled to unit length."""
    square = jnp.sum(jnp.square(x), axis=3, keepdims=True)
    if normalize == "torchmetrics":
        return x * jax.lax.rsqrt(square + 1e-8)
    # Zero vectors are common after ReLU, and the gradient of sqrt at 0 is infinite.
    positive = square > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return x / (norm + 1e-10)


def shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of `net` ('vgg' or 'alex')."""
    _known(net)
    features, linear, channels = {}, {}, 3
    for layer in _LAYERS[net]:
        if layer == _TAP:
            linear[f"lin{len(linear)}"] = (channels,)
        elif layer != _POOL:
            index, inputs, channels, kernel, _, _ = layer
            features[f"features.{index}.kernel"] = (kernel, kernel, inputs, channels)
            features[f"features.{index}.bias"] = (channels,)
    return features | linear


def linear_layers(net: str) -> dict[str, np.ndarray]:
    """The published weights of the five taps, `lin0` .. `lin4` (v0.1), shipped beside this file.

    They come from the PyPI package lpips 0.1.4, whose license is in lpips_linear.LICENSE.
    """
    from safetensors.numpy import load_file

    _known(net)
    arrays = load_file(Path(__file__).with_name("lpips_linear.safetensors"))
    return {f"lin{i}": arrays[f"{net}.lin{i}"] for i in range(5)}


def _known(net: str) -> None:
    if net not in _LAYERS:
        raise ValueError(f"net={net!r}: choose 'vgg' (training) or 'alex' (the reported metric)")
