# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of one pair on the host."""

import numpy as np
import pytest

from dcae_jax.evaluation import metrics, pairs


@pytest.mark.parametrize("height, width", [(6, 9), (70, 41), (600, 33)])
def test_scores_are_those_of_the_metrics(height, width, monkeypatch):
    """Catches another window, padding or data range, and strips that leave seams or rows out."""
    monkeypatch.setattr(pairs, "STRIP", 64)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y = np.clip(x + rng.integers(-60, 60, x.shape), 0, 255).astype(np.uint8)
    assert pairs.psnr(x, y) == pytest.approx(float(metrics.psnr(x[None], y[None])[0]), rel=1e-6)
    assert pairs.ssim(x, y) == pytest.approx(float(metrics.ssim(x[None], y[None])[0]), rel=1e-5)


def test_the_ends_of_the_scale():
    """Catches infinity for identical images, and an error for an image of one pixel."""
    x = np.zeros((1, 1, 3), np.uint8)
    assert pairs.psnr(x, x) == metrics.PSNR_CAP and pairs.psnr(x, x + 255) == 0
    assert pairs.ssim(x, x) is None
