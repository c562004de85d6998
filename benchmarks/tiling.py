# SPDX-License-Identifier: Apache-2.0
"""Are tile borders visible in decoded images? Prints a table for each photograph.

    python benchmarks/tiling.py --run=demo-run/phase3

The step at a line between two rows, or two columns, of pixels is the mean absolute difference
across it, along its whole length. Steps are in units of the median step of all lines of the same
direction in the untiled decode: 2 is twice the median neighbour difference.
"""

import argparse

import numpy as np
from PIL import Image

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder, tiling
from dcae_jax.data import sources
from dcae_jax.runtime import mesh as mesh_lib


def steps(image: np.ndarray, axis: int) -> np.ndarray:
    """Mean difference across each line between neighbours along `axis` of [1, H, W, C]."""
    return np.abs(np.diff(image, axis=axis)).mean((0, 3 - axis, 3))


def borders(size: int, tile: int, overlap: int, compression: int) -> list[int]:
    """Lines where a tile begins or ends, in pixels, for `size` latents."""
    axis = tiling._axis(size, tiling.plan(tile, overlap, None), 1)
    edges = {n for start, length, _ in axis for n in (start, start + length)}
    return [compression * n for n in sorted(edges) if 0 < n < size]


def rows_of(ae: autoencoder.Autoencoder, image: Image.Image, tile: int, overlap: int) -> list:
    """[direction, line, step tiled, step untiled, step added by tiling] of an image's borders."""
    f = ae.compression
    pixels = np.asarray(image, np.float32)
    height, width = (size // f * f for size in pixels.shape[:2])
    x = pixels[None, :height, :width] / 127.5 - 1
    z = np.asarray(ae.encode(x))
    whole, tiled = np.asarray(ae.decode(z)), ae.decode(z, tile=tile, overlap=overlap)
    rows = []
    for axis, direction in ((1, "row"), (2, "column")):
        usual = np.median(steps(whole, axis))
        values = [steps(image, axis) / usual for image in (tiled, whole, tiled - whole)]
        for line in borders(z.shape[axis], tile, overlap, f):
            rows.append([direction, line, *(round(float(v[line - 1]), 2) for v in values)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="demo-run/phase3", help="a workdir or an export")
    parser.add_argument("--tile", type=int, default=16)
    parser.add_argument("--overlap", type=int, default=4)
    given = parser.parse_args()
    mesh = mesh_lib.make_mesh(config_lib.default().mesh)
    ae = dcae_jax.load_autoencoder(given.run, mesh=mesh)
    photos = sources.photos((*sources.PHOTOS, *sources.HELD_OUT_PHOTOS))
    every = [["photograph", "border", "at", "tiled", "whole", "added"]]
    largest = [["photograph", "borders", "above 2", "whole above 2", "tiled", "whole", "added"]]
    for i, name in enumerate(photos.names):
        rows = rows_of(ae, photos[i][0], given.tile, given.overlap)
        every += [[name, *row] for row in rows]
        columns = [[row[k] for row in rows] for k in (2, 3, 4)]
        above = [sum(value > 2 for value in column) for column in columns[:2]]
        largest.append([name, len(rows), *above, *map(max, columns)])
    print(files.table(every), "\n\nThe largest of each photograph:\n")
    print(files.table(largest))


if __name__ == "__main__":
    main()
