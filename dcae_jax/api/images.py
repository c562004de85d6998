# SPDX-License-Identifier: Apache-2.0
"""Images of any kind and size, as an autoencoder takes them: float arrays, padded; and back."""

import numpy as np
from PIL import Image

from dcae_jax.data import transforms
from dcae_jax.errors import UserError
from dcae_jax.models.weights import AnyArray

MOST_PIXELS = 2**21  # of one call of a model: larger images are tiled, smaller ones batched
TILE = 1024  # pixels per side of a tile


def to_float(image: Image.Image | AnyArray) -> np.ndarray:
    """An image as float32 in [-1, 1]: [H, W, 3], or [B, H, W, 3] for a batch.

    image: a PIL image of any mode; uint8 levels [H, W], [H, W, 1 or 4] (alpha over white),
    [H, W, 3] or [B, H, W, 3]; or floats in [-1, 1], with 3 channels. Raises ValueError otherwise.
    """
    if isinstance(image, Image.Image):
        return transforms.to_float(np.asarray(transforms.to_rgb(image.copy())))
    if getattr(image, "shape", None) is None:
        raise ValueError(f"image must be a PIL image or an array, not {type(image).__name__}")
    x = np.asarray(image)
    if x.dtype == np.uint8 and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (1, 4))):
        return to_float(Image.fromarray(x[..., 0] if x.shape[2:] == (1,) else x))
    if x.ndim not in (3, 4) or x.shape[-1] != 3 or not x.size:
        raise ValueError(f"image has shape {x.shape}; give [H, W, 3] or [B, H, W, 3]")
    if x.dtype == np.uint8:
        return transforms.to_float(x)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise ValueError(f"image has dtype {x.dtype}; give uint8, or float in [-1, 1]")
    return x.astype(np.float32)


def pad(x: np.ndarray, multiple: int) -> np.ndarray:
    """Mirrors the bottom and right edges of [..., H, W, 3] until both sides are multiples."""
    pads = [(0, 0)] * x.ndim
    pads[-3], pads[-2] = ((0, -size % multiple) for size in x.shape[-3:-1])
    return np.pad(x, pads, mode="symmetric")


def tile_for(height: int, width: int, compression: int) -> int:
    """Latents per side of the tiles for an image of so many pixels; 0: no tiles."""
    return max(TILE // compression, 1) if height * width > MOST_PIXELS else 0


def to_pixels(y: AnyArray, height: int, width: int) -> np.ndarray:
    """Decoded images [..., H, W, 3], cropped to height x width, as uint8. Raises UserError."""
    y = np.asarray(y)[..., :height, :width, :]
    if not np.isfinite(y).all():
        raise UserError("the decoded image has values that are not finite; use dtype float32")
    return transforms.to_uint8(y)
