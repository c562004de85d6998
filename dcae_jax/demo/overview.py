# SPDX-License-Identifier: Apache-2.0
"""Reconstructions and samples in one small image with captions, WORKDIR/overview.jpg."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax import files

WIDTH, GAP, LINE = 812, 4, 24  # pixels: of the whole, between tiles, of a line of text

Block = tuple[str, np.ndarray]  # caption of a column or row, its images [N, H, W, 3] uint8


def write(path: str, columns: Sequence[Block], rows: Sequence[Block]) -> None:
    """Writes a JPEG: `columns` side by side with captions on top, below them `rows`.

    The captions of `rows` are above them. Blocks of one kind have equally many images. Images are
    scaled to fit; the first ones are at the top, or on the left.
    """
    upper, lower = _tile(len(columns)), _tile(len(rows[0][1]))
    top = LINE + len(columns[0][1]) * (upper + GAP)
    image = Image.new("RGB", (WIDTH, top + len(rows) * (LINE + lower + GAP) - GAP), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)

    def paste(pixels: np.ndarray, x: int, y: int, size: int) -> None:
        image.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS), (x, y))

    for j, (caption, images) in enumerate(columns):
        x = j * (upper + GAP)
        draw.text((x, 2), caption, "black", font)
        for i, pixels in enumerate(images):
            paste(pixels, x, LINE + i * (upper + GAP), upper)
    for i, (caption, images) in enumerate(rows):
        y = top + i * (LINE + lower + GAP)
        draw.text((0, y + 2), caption, "black", font)
        for j, pixels in enumerate(images):
            paste(pixels, j * (lower + GAP), y + LINE, lower)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=90)
    files.write_file(path, file.getvalue())


def _tile(count: int) -> int:
    """Pixels per side of `count` tiles side by side."""
    return (WIDTH + GAP) // count - GAP
