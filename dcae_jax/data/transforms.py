# SPDX-License-Identifier: Apache-2.0
"""Image transforms: RGB conversion, ADM's centre crop, random crops, augmentation.

Also the only conversions between uint8 levels and the models' range [-1, 1].
"""

from __future__ import annotations

import math
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dcae_jax.config.schema import Data

if TYPE_CHECKING:  # reader processes do not import jax
    import jax

    Array = TypeVar("Array", np.ndarray, jax.Array)

MOST_PIXELS = 2**26  # of a resized image: a 1 x 30,000 sliver would become huge

# Formats that are opened, whatever the file extension. Pillow's other readers are unsafe for
# untrusted files: the EPS reader, for example, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


def decode(file: str | IO[bytes], least: int = 0) -> Image.Image:
    """The RGB image in `file`. Raises whatever a decoder raises for a broken one.

    least: a JPEG decodes at 1/2, 1/4 or 1/8 size, with a short side of at least this many pixels;
    0: full size.
    """
    with Image.open(file, formats=FORMATS) as image:
        if least:
            image.draft(None, (least, least))
        return to_rgb(image)


def to_float(levels: Array) -> Array:
    """Levels 0..255, uint8 or integer-valued floats -> float32 in [-1, 1]."""
    return levels.astype(np.float32) / 127.5 - 1


def to_levels(x: Array) -> Array:
    """Rounds images to the 256 levels that a PNG holds, as the published protocol does.

    x: float in [-1, 1] (values outside are clipped) -> the same shape, float32, integers 0..255.
    Both images of a pair go through this before every metric, and samples before they are written
    (mit-han-lab/efficientvit: x * 255 + 0.5, clamped, truncated). NaN stays NaN.
    """
    xp = x.__array_namespace__()
    return xp.floor(xp.clip(x.astype(np.float32) * 127.5 + 128.0, 0.0, 255.0))


def to_uint8(x: Array) -> Array:
    """Images in [-1, 1] -> uint8, rounded by `to_levels`. Non-finite values are undefined."""
    return to_levels(x).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB: EXIF orientation applied, alpha over white, 16 bits rounded to 8."""
    try:
        ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies every image
    except OSError:  # broken pixel data, which is read here
        raise
    except Exception:  # broken EXIF, for which Pillow raises many types; the pixels are good
        image.load()
    if image.mode.startswith("I"):  # convert() would clip at 255 instead of scaling
        levels = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) + 128) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point images have no known range")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()  # raises for a truncated file
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with BOX while possible, BICUBIC to `size`, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square of `size` at the image's own scale; smaller images are enlarged first."""
    if min(image.size) < size:
        image = _resize_short_side(image, size)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image, size: int, area: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A square that covers a fraction of the image's area drawn from `area`, resized to `size`."""
    side = math.sqrt(image.width * image.height * rng.uniform(*area))
    side = int(np.clip(round(side), 1, min(image.size)))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    if shape[0] * shape[1] > MOST_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} is too elongated to enlarge")
    return image.resize(shape, Image.Resampling.BICUBIC)


def least_side(data: Data, size: int) -> int:
    """Smallest short side, in pixels, that an image may be decoded at for `augment`; 0: full.

    ADM's crop halves an image down to this anyway. For random_resized, the smallest crop keeps
    twice the pixels per side that it needs, before the bicubic filter.
    """
    outer = math.ceil(size * _rotated_side(min(data.rotation, 45.0)))  # most at 45 degrees
    if data.crop == "center":
        return outer
    if data.crop == "random_resized":
        return math.ceil(2 * outer / math.sqrt(data.crop_area[0]))
    return 0


def _rotated_side(degrees: float) -> float:
    """Side of the upright square that contains a unit square rotated by `degrees`."""
    angle = math.radians(abs(degrees))
    return abs(math.cos(angle)) + abs(math.sin(angle))


def augment(image: Image.Image, size: int, data: Data, rng: np.random.Generator) -> np.ndarray:
    """A training example [size, size, 3] uint8, cropped and augmented as config.data says."""
    # A rotated square is cut from a larger one, or its corners would be empty.
    angle = rng.uniform(-data.rotation, data.rotation) if data.rotation else 0.0
    outer = math.ceil(size * _rotated_side(angle))
    if data.crop == "center":
        image = center_crop(image, outer)
    elif data.crop == "random_resized":
        image = random_resized_crop(image, outer, data.crop_area, rng)
    else:
        image = random_crop(image, outer, rng)
    if outer > size:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
        margin = (outer - size) // 2
        image = image.crop((margin, margin, margin + size, margin + size))
    if data.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if data.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + rng.uniform(-data.color_jitter, data.color_jitter))
    return np.asarray(image)
