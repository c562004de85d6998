# SPDX-License-Identifier: Apache-2.0
"""Several images as one."""

import math
from collections.abc import Sequence

import numpy as np


def image_grid(columns: Sequence[np.ndarray], *, tile: int = 128, gap: int = 2) -> np.ndarray:
    """Columns of equally many images [N, H, W, 3] uint8 -> one image [*, *, 3] uint8.

    Small images are enlarged, by repeating pixels, to at least `tile` pixels per side.
    """
    factor = max(1, math.ceil(tile / columns[0].shape[1]))
    columns = [np.repeat(np.repeat(c, factor, axis=1), factor, axis=2) for c in columns]
    n, h, w, _ = columns[0].shape
    shape = (n * (h + gap) - gap, len(columns) * (w + gap) - gap, 3)
    out = np.full(shape, 255, np.uint8)
    for j, column in enumerate(columns):
        for i, image in enumerate(column):
            top, left = i * (h + gap), j * (w + gap)
            out[top : top + h, left : left + w] = image
    return out


def difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Error map of a reconstruction, uint8: mid-grey plus four times the difference."""
    delta = y.astype(np.int32) - x.astype(np.int32)
    return np.clip(128 + 4 * delta, 0, 255).astype(np.uint8)
