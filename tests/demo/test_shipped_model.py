# SPDX-License-Identifier: Apache-2.0
"""The shipped model reaches what its card states."""

import os
import re

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import dcae_jax
from dcae_jax.data import sources, transforms
from dcae_jax.demo import pca, shipped

pytestmark = pytest.mark.slow


def stated() -> dict[str, list[float]]:
    """{model: [PSNR at 256, SSIM, PSNR at 512, SSIM]} on flower and chelsea."""
    with open(os.path.join(shipped.MODEL, "README.md"), encoding="utf-8") as file:
        _, _, table = file.read().partition("flower and chelsea")
    rows = re.findall(r"^\| (\w+) \|((?: [\d.]+ \|){4})$", table, re.M)
    return {name: [float(v) for v in values.split("|")[:-1]] for name, values in rows}


def scores(reconstruct) -> list[float]:
    """As `stated`, by scikit-image."""
    found = []
    source = sources.photos(sources.HELD_OUT_PHOTOS)
    for size in (256, 512):
        pairs = pca.pairs(reconstruct, shipped.SETTINGS, source, size)
        both = [(x, y) for batch in pairs for x, y in zip(*batch, strict=True)]
        assert len(both) == 16
        found.append(np.mean([peak_signal_noise_ratio(x, y, data_range=255) for x, y in both]))
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        found.append(
            np.mean(
                [
                    structural_similarity(x, y, data_range=255, channel_axis=-1, **gaussian)
                    for x, y in both
                ]
            )
        )
    return found


def test_small_reconstructs_as_its_card_states(tmp_path, monkeypatch):
    """Catches weights that are not those of the card, a changed model, crop or baseline, and a name
    that needs the network or a certain folder."""
    monkeypatch.chdir(tmp_path)
    ae = dcae_jax.load_autoencoder("small")
    card = stated()
    assert set(card) == {"PCA", "small"} and ae.num_parameters <= 8e6

    def reconstruct(images):
        return transforms.to_uint8(np.asarray(ae.decode(ae.encode(transforms.to_float(images)))))

    for name, found in (
        ("PCA", scores(pca.load(shipped.LINEAR).reconstruct)),
        ("small", scores(reconstruct)),
    ):
        wrong = np.abs(np.subtract(found, card[name])) / (0.05, 0.005, 0.05, 0.005)
        assert (wrong < 1).all(), (name, found, card[name])


def test_small_is_bit_equal_on_reload():
    """Catches weights that depend on the order or the time of loading."""
    x = transforms.to_float(np.asarray(sources.photos(sources.HELD_OUT_PHOTOS)[0][0])[None])
    x = x[:, :256, :256]
    first, again = (
        (lambda ae: np.asarray(ae.decode(ae.encode(x))))(dcae_jax.load_autoencoder("small"))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
