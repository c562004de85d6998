# SPDX-License-Identifier: Apache-2.0
"""Crops, rotation, jitter; levels and the range [-1, 1]."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dcae_jax.config.schema import Data
from dcae_jax.data import transforms


def test_levels_round_as_the_protocol():
    """Fails if rounding truncates, goes to even, or a level does not survive [-1, 1] and back."""
    levels = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(transforms.to_levels(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(transforms.to_levels(levels / 127.5 - 1 + 0.003), levels)
    np.testing.assert_array_equal(transforms.to_levels(np.array([-1.2, 1.3, 0.0])), [0, 255, 128])
    assert np.isnan(transforms.to_levels(np.array([np.nan])))[0]


@pytest.mark.parametrize("module", [np, jnp])
def test_uint8_survives_the_range_of_the_models(module):
    """Fails if a level changes on its way, or NumPy and JAX, compiled or not, cut differently."""
    levels = module.arange(256, dtype=module.uint8).reshape(2, 8, 16, 1)
    x = transforms.to_float(levels)
    assert x.dtype == np.float32 and isinstance(x, type(levels))
    np.testing.assert_allclose(x, np.float64(levels) / 127.5 - 1, atol=2e-7)
    back = transforms.to_uint8(x)
    assert back.dtype == np.uint8 and isinstance(back, type(levels))
    np.testing.assert_array_equal(back, levels)
    above = module.asarray((np.arange(255, dtype=np.float32) + 0.51) / 127.5 - 1)
    for found in (jax.jit(transforms.to_uint8)(above), transforms.to_uint8(above)):
        np.testing.assert_array_equal(found, np.arange(1, 256))


def test_sixteen_bits_are_rounded_to_eight():
    """Catches levels that are cut: half a level darker on average, white at full scale alone."""
    deep = np.arange(0, 65536, 61, dtype=np.uint16).reshape(-1, 5)
    found = np.asarray(transforms.to_rgb(Image.fromarray(deep)))[..., 0]
    np.testing.assert_array_equal(found, np.floor(deep / 65535 * 255 + 0.5))


def augmented(pixels, size, **changes):
    """`transforms.augment` of [H, W, 3] uint8, and the generator whose draws it took."""
    settings = {"crop": "center", "rotation": 0.0, "flip": False, "color_jitter": 0.0} | changes
    draws = [np.random.default_rng(2) for _ in range(2)]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    out = transforms.augment(image, size, Data(**settings), draws[0])
    return out.astype(np.float64), draws[1]


def test_rotation_turns_the_image_by_the_angle_drawn():
    """Fails if the image is cropped for a rotation and not rotated, or has empty corners."""
    ramp = np.broadcast_to(np.arange(40, 200, dtype=np.uint8)[None, :, None], (160, 160, 3))
    found, draws = augmented(ramp, 64, rotation=30.0)
    turn = np.radians(draws.uniform(-30.0, 30.0))
    down, across = (slope.mean() for slope in np.gradient(found[..., 0]))
    assert found.shape == (64, 64, 3) and found.min() > 0
    assert abs(turn) > 0.1 and np.arctan2(-down, across) == pytest.approx(turn, abs=0.02)


def test_jitter_changes_brightness_contrast_and_colour():
    """Fails if one of the three is left out; each is seen where the others change nothing new."""
    grey, steps, colour = (np.full((8, 8, 3), 100, np.uint8) for _ in range(3))
    steps[:4] = 60
    colour[..., 0] = 160
    found = [augmented(pixels, 8, color_jitter=0.3) for pixels in (grey, steps, colour)]
    brightness, contrast, saturation = (1 + found[0][1].uniform(-0.3, 0.3) for _ in range(3))
    assert min(abs(v - 1) for v in (brightness, contrast, saturation)) > 0.05
    (grey, _), (steps, _), (colour, _) = found
    assert grey[0, 0, 0] / 100 == pytest.approx(brightness, abs=0.02)
    both = (steps[7, 0, 0] - steps[0, 0, 0]) / 40
    assert both == pytest.approx(brightness * contrast, abs=0.05)
    every = (colour[0, 0, 0] - colour[0, 0, 1]) / 60
    assert every == pytest.approx(brightness * contrast * saturation, abs=0.05)


def test_center_crop_is_adms():
    """Catches a resize in one go, another filter, or a crop one pixel off."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (97, 131, 3), dtype=np.uint8))
    half = image.resize((65, 48), Image.Resampling.BOX)
    scale = 32 / 48
    small = half.resize((round(65 * scale), 32), Image.Resampling.BICUBIC)
    left = (small.width - 32) // 2
    want = np.asarray(small)[:, left : left + 32]
    np.testing.assert_array_equal(np.asarray(transforms.center_crop(image, 32)), want)
    assert transforms.center_crop(Image.new("RGB", (5, 9)), 32).size == (32, 32)


@pytest.mark.parametrize("crop", ["random", "random_resized", "center"])
@pytest.mark.parametrize("size", [(8, 40), (70, 30), (16, 16)])
def test_every_crop_has_the_asked_size(crop, size):
    """Catches crops of images smaller than the resolution, and empty corners of rotation."""
    settings = Data(crop=crop, rotation=20.0, color_jitter=0.1)
    image = Image.new("RGB", size, (200, 200, 200))
    for seed in range(8):
        out = transforms.augment(image, 16, settings, np.random.default_rng(seed))
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8
        assert out.min() > 100  # a black corner would be 0


def test_flips_and_jitter_happen_only_when_asked_for():
    """Catches augmentation that cannot be switched off, or is never on."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 200
    image = Image.fromarray(pixels)

    def variants(**changes):
        settings = Data(crop="center", **changes)
        rngs = (np.random.default_rng(seed) for seed in range(20))
        return {transforms.augment(image, 16, settings, rng).tobytes() for rng in rngs}

    assert variants(flip=False) == {pixels.tobytes()}
    assert variants() == {pixels.tobytes(), pixels[:, ::-1].tobytes()}
    assert len(variants(flip=False, color_jitter=0.3)) > 10


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_an_image_rotated_by_any_angle_has_its_size(crop):
    """Catches a square around a rotated one that shrinks above 90 degrees."""
    settings = Data(rotation=180.0, crop=crop)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    for seed in range(40):
        out = transforms.augment(image, 32, settings, np.random.default_rng(seed))
        assert out.shape == (32, 32, 3), seed
    settings = dataclasses.replace(settings, crop="center")
    assert transforms.least_side(settings, 64) == math.ceil(64 * math.sqrt(2))  # as for 45 degrees
