# SPDX-License-Identifier: Apache-2.0
"""Tiled encoding and decoding of images that exceed memory, blending overlapping tiles.

All tiles have the same size and share one compiled program. Sizes are in latents, so the result
has the right size at every compression. The last tiles of a row or column are shifted back to end
at the image's border.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes in latents."""

    size: int
    overlap: int  # of neighbours, minimum
    margin: int  # of weight 0, at each inner border


def plan(tile: int, overlap: int | None, reach: int | None) -> Tiles:
    """Checks the sizes. Raises ValueError, naming the argument.

    reach: latents on each side that an output depends on; None: all. If the overlap is at least
    twice this, outputs affected by a tile's border get weight 0, and tiling is exact; else the
    whole overlap is blended.
    """
    for name, value, low in (("tile", tile, 1), ("overlap", overlap, 0)):
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not (integer and value >= low):
            raise ValueError(f"{name}={value!r} must be an integer (latents), at least {low}")
    overlap = tile // 4 if overlap is None else overlap
    if overlap >= tile:
        raise ValueError(f"overlap={overlap} must be less than tile={tile}, both in latents")
    margin = reach if reach is not None and overlap >= 2 * reach else 0
    return Tiles(tile, overlap, margin)


def run(
    function: Callable[[AnyArray], AnyArray],
    x: AnyArray,
    tiles: Tiles,
    scales: tuple[int, int],
    channels: int,
) -> np.ndarray:
    """Applies `function`, [B, h, w, *] -> [B, h', w', channels], to tiles of x; blends in float32.

    scales: positions per side of one latent, in x and in the result.
    """
    before, after = scales
    rows, columns = (_axis(size // before, tiles, after) for size in x.shape[1:3])
    shape = (x.shape[0], *(size // before * after for size in x.shape[1:3]), channels)
    total, weight = np.zeros(shape, np.float32), np.zeros((1, *shape[1:3], 1), np.float32)
    for top, height, down in rows:
        for left, width, across in columns:
            part = x[
                :,
                top * before : (top + height) * before,
                left * before : (left + width) * before,
            ]
            where = np.s_[
                :,
                top * after : (top + height) * after,
                left * after : (left + width) * after,
            ]
            share = (down[:, None] * across[None, :])[None, :, :, None]
            total[where] += share * np.asarray(function(part))
            weight[where] += share
    total /= weight
    return total


def _axis(size: int, tiles: Tiles, scale: int) -> list[tuple[int, int, np.ndarray]]:
    """(first latent, latents, weight of each output position) of the tiles along one axis.

    Weights rise linearly over the overlap; at the image's own borders they are 1.
    """
    length = min(tiles.size, size)
    starts = list(range(0, size - length, max(length - tiles.overlap, 1))) + [size - length]
    ramp = (tiles.overlap - 2 * tiles.margin) * scale
    rise = np.concatenate(
        [
            np.zeros(tiles.margin * scale),
            (np.arange(ramp) + 0.5) / max(ramp, 1),
            np.ones(length * scale),
        ]
    )[: length * scale]
    axis = []
    for start in starts:
        weights = np.ones(length * scale)
        if start > 0:
            weights = np.minimum(weights, rise)
        if start + length < size:
            weights = np.minimum(weights, rise[::-1])
        axis.append((start, length, weights.astype(np.float32)))
    return axis
