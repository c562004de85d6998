# SPDX-License-Identifier: Apache-2.0
"""Reconstructions side by side in one small image with captions, WORKDIR/overview.jpg."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax import files

WIDTH, GAP, LINE = 960, 4, 24  # pixels: of the whole, between tiles, of a line of text

Block = tuple[str, np.ndarray]  # caption of a column, its images [N, H, W, 3] uint8


def write(path: str, columns: Sequence[Block]) -> None:
    """Writes a JPEG: `columns` side by side with captions on top, their images scaled to fit."""
    tile = (WIDTH + GAP) // len(columns) - GAP
    height = LINE + len(columns[0][1]) * (tile + GAP) - GAP
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for j, (caption, images) in enumerate(columns):
        x = j * (tile + GAP)
        draw.text((x, 2), caption, "black", font)
        for i, pixels in enumerate(images):
            scaled = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.LANCZOS)
            image.paste(scaled, (x, LINE + i * (tile + GAP)))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=90)
    files.write_file(path, file.getvalue())
