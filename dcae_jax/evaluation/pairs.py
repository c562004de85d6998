# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of one pair of images on the host: any size, and no program to compile for it."""

import math

import numpy as np

from dcae_jax.evaluation import metrics

STRIP = 256  # rows for which SSIM is computed at once, in float64
REACH = 5  # pixels, of SSIM's window on each side


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """PSNR in dB of two images [H, W, 3] uint8, as `metrics.psnr`."""
    total = sum(  # row by row: exact integers, no large temporary
        int(np.square(a.astype(np.int64) - b).sum()) for a, b in zip(x, y, strict=True)
    )
    if not total:
        return metrics.PSNR_CAP
    return min(10 * math.log10(255.0**2 * x.size / total), metrics.PSNR_CAP)


def ssim(x: np.ndarray, y: np.ndarray) -> float | None:
    """SSIM of two images [H, W, 3] uint8, as `metrics.ssim`; None below 6 pixels per side."""
    from skimage.metrics import structural_similarity

    height = len(x)
    if min(x.shape[:2]) <= REACH:
        return None
    # scikit-image leaves out 5 pixels at each border: those that are added here.
    edges = ((REACH, REACH), (REACH, REACH), (0, 0))
    x, y = (np.pad(image, edges, mode="reflect") for image in (x, y))
    total = 0.0
    for top in range(0, height, STRIP):
        rows = min(STRIP, height - top)
        a, b = (image[top : top + rows + 2 * REACH].astype(np.float64) for image in (x, y))
        found = structural_similarity(
            a,
            b,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        total += rows * float(found)  # pyright: ignore[reportArgumentType]
    return total / height
