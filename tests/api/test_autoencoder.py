# SPDX-License-Identifier: Apache-2.0
"""The Python interface, and evaluation through it."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, run_job

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.evaluation import metrics
from dcae_jax.jobs import evaluate, train
from dcae_jax.runtime import mesh as mesh_lib


@pytest.fixture(scope="module")
def ae():
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    return dcae_jax.create_autoencoder("tiny", seed=3, mesh=mesh)


def _images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_encode_and_decode_have_the_promised_shapes(ae):
    """Catches latents that are scaled, transposed or of another dtype."""
    z = ae.encode(_images(2, 32, 48, 3))
    assert z.shape == (2, 2, 3, 32) and z.dtype == jnp.float32
    y = ae.decode(z)
    assert y.shape == (2, 32, 48, 3) and y.dtype == jnp.float32
    assert (ae.compression, ae.latent_channels, ae.num_parameters) == (16, 32, 1_502_284)


@pytest.mark.parametrize(
    "x, words",
    [
        (np.zeros((1, 32, 32, 3), np.uint8), "x is uint8; convert it: x.astype('float32')"),
        (np.zeros((1, 32, 32, 3), np.int32), "dtype int32"),
        (np.zeros((32, 32, 3), np.float32), "shape (32, 32, 3)"),
        (np.zeros((1, 32, 32, 4), np.float32), "[B, H, W, 3]"),
        (np.zeros((1, 40, 32, 3), np.float32), "height 40, not a multiple of 16; pad to 48"),
        (np.full((1, 32, 32, 3), np.nan, np.float32), "not finite"),
        (np.full((1, 32, 32, 3), 255.0, np.float32), "reaches 255; scale it to [-1, 1]"),
        ("photo.jpg", "must be an array"),
    ],
)
def test_input_that_makes_no_sense_is_named(ae, x, words):
    """Catches latents of noise from images in 0..255, and errors from inside XLA."""
    with pytest.raises(ValueError, match=re.escape(words)):
        ae.encode(x)


def test_device_arrays_are_read_only_when_asked(ae):
    """Catches a check that stalls the device on every call, or one that cannot be had."""
    x = jnp.full((1, 32, 32, 3), jnp.nan)
    ae.encode(x)
    with pytest.raises(ValueError, match="not finite"):
        ae.encode(x, check=True)


@pytest.mark.slow
def test_a_trained_workdir_loads_evaluates_and_reconstructs_one_image(small, alone, tmp_path):
    """Catches evaluation of other weights than training evaluated, and padding left in."""
    workdir = str(tmp_path / "run")
    small.evaluate.crops, small.evaluate.count = 4, 7
    run_job(train, small, workdir)
    config = config_lib.load_file(os.path.join(CONFIGS, "evaluate.py"))
    config.init_from = workdir
    config.evaluate.update(small.evaluate)
    run_job(evaluate, config, str(tmp_path / "evaluated"))
    evaluated = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["results"]["32"]
    trained = files.read_rows(workdir)[-1]
    assert evaluated["images"] == 7
    for name in ("psnr", "ssim"):
        assert evaluated[name] == pytest.approx(trained[f"{name}_32"], rel=1e-5)

    photo = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    config.data.source, config.data.path = "folder", str(tmp_path / "photo.png")
    run_job(evaluate, config, str(tmp_path / "one"))
    images = tmp_path / "one" / "images"
    for name in ("input", "reconstruction", "difference"):
        assert Image.open(images / f"{name}.png").size == (50, 37)
    np.testing.assert_array_equal(np.asarray(Image.open(images / "input.png")), photo)
    again = np.asarray(Image.open(images / "reconstruction.png")).astype(np.float32)
    score = float(metrics.psnr(again[None], photo[None].astype(np.float32))[0])
    one = json.loads((tmp_path / "one" / "evaluate.json").read_text())["results"]
    assert next(iter(one.values()))["psnr"] == pytest.approx(score, rel=1e-5)


def test_grids_show_the_difference_and_survive_odd_sizes():
    """Catches images that overlap in the grid, and differences that wrap around in uint8."""
    x = np.full((2, 3, 5, 3), 250, np.uint8)
    y = np.full((2, 3, 5, 3), 0, np.uint8)
    grid = files.image_grid([x, y], tile=6, gap=1)
    assert grid.shape == (2 * 6 + 1, 2 * 10 + 1, 3)
    assert (grid[:6, :10] == 250).all() and (grid[7:, 11:] == 0).all() and grid[6, 0, 0] == 255
    assert (files.difference(x, y) == 0).all() and (files.difference(x, x) == 128).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tile": -1}, "tile=-1 must be an integer"),
        ({"tile": 2, "overlap": 2}, "overlap=2 must be less than tile=2"),
    ],
)
def test_tiles_that_cannot_be_are_refused(change, message):
    """Catches an endless loop over tiles of no size, and an error about something else."""
    ae = dcae_jax.create_autoencoder("tiny")
    with pytest.raises(ValueError, match=message):
        ae.encode(np.zeros((1, 64, 64, 3), np.float32), **change)


@pytest.mark.parametrize("x", [None, [[1.0]], np.zeros((1, 64, 64, 3), np.complex64), np.zeros(3)])
def test_input_of_another_kind_is_named(x):
    """Catches JAX's shape errors from inside the model."""
    with pytest.raises(ValueError, match="x "):
        dcae_jax.create_autoencoder("tiny").encode(x)
