# SPDX-License-Identifier: Apache-2.0
"""Images of any kind and size, and `Autoencoder.reconstruct`."""

import re

import jax
import numpy as np
import pytest
from PIL import Image

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.api import images
from dcae_jax.data import transforms
from dcae_jax.runtime import mesh as mesh_lib

LEVELS = np.random.default_rng(0).integers(0, 256, (20, 37, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def ae():
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    return dcae_jax.create_autoencoder("tiny", seed=3, mesh=mesh)


def test_every_kind_of_image_is_the_same_reconstruction(ae):
    """Catches levels that are scaled twice or not at all, and padding left in or cut short."""
    padded = np.pad(LEVELS, ((0, 12), (0, 11), (0, 0)), mode="symmetric")
    x = transforms.to_float(padded[None])
    expected = transforms.to_uint8(np.asarray(ae.decode(ae.encode(x))))[0, :20, :37]
    for image in (LEVELS, Image.fromarray(LEVELS), transforms.to_float(LEVELS)):
        result = ae.reconstruct(image)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, expected)
    batch = ae.reconstruct(np.stack([LEVELS, LEVELS[::-1]]))
    assert batch.shape == (2, 20, 37, 3)
    np.testing.assert_allclose(batch[0].astype(int), expected, atol=1)


def test_grey_and_transparent_images_become_rgb(ae):
    """Catches an alpha channel that is dropped, and grey levels that need a channel axis."""
    grey = LEVELS[..., 0]
    three = np.repeat(grey[..., None], 3, axis=2)
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(images.to_float(image), transforms.to_float(three))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(images.to_float(deep), transforms.to_float(three))
    clear = np.concatenate([LEVELS, np.zeros((20, 37, 1), np.uint8)], axis=2)
    assert (images.to_float(clear) == 1).all()  # white


@pytest.mark.parametrize(
    "image, words",
    [
        ("photo.jpg", "image must be a PIL image or an array, not str"),
        (np.zeros((4, 4, 3), np.int32), "dtype int32; give uint8, or float in [-1, 1]"),
        (np.zeros((4, 4, 5), np.uint8), "shape (4, 4, 5); give [H, W, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.full((4, 4, 3), 255.0), "reaches 255; scale it to [-1, 1]"),
        (np.full((4, 4, 3), np.nan), "not finite"),
    ],
)
def test_what_is_no_image_is_named(ae, image, words):
    """Catches noise from floats in 0..255, and errors from inside NumPy."""
    with pytest.raises(ValueError, match=re.escape(words)):
        ae.reconstruct(image)


def test_large_images_go_through_in_tiles(ae, monkeypatch):
    """Catches a large image that is decoded whole, and tiles counted in pixels."""
    whole = ae.reconstruct(LEVELS)
    monkeypatch.setattr(images, "MOST_PIXELS", 20 * 37 - 1)
    monkeypatch.setattr(images, "TILE", 32)
    assert images.tile_for(20, 37, 16) == 2 and images.tile_for(19, 37, 16) == 0
    tiled = ae.reconstruct(LEVELS)
    assert tiled.shape == whole.shape and (tiled != whole).any()
    np.testing.assert_array_equal(ae.reconstruct(LEVELS, tile=0), whole)
    np.testing.assert_array_equal(ae.reconstruct(LEVELS, tile=2), tiled)


def test_output_that_is_not_finite_is_an_error():
    """Catches NaN that becomes black pixels."""
    with pytest.raises(ValueError, match="not finite; use dtype float32"):
        images.to_pixels(np.full((8, 8, 3), np.nan, np.float32), 4, 4)
