# SPDX-License-Identifier: Apache-2.0
"""Tiles: sizes that are right at every compression, borders that do not show."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
import skimage.data
from flax import nnx
from support import CONFIGS, run_job

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import tiling
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.models.weights import split
from dcae_jax.runtime import mesh as mesh_lib

# Convolutions only, so that tiles can equal the whole: a way each of halving and doubling, with
# and without a stage at full size. Three stages are as good as six.
S2C = dataclasses.replace(
    dcae.VARIANTS["1.5-f32c128"],
    latent_channels=8,
    widths=(4, 8, 8),
    encoder_depths=(0, 1, 1),
    decoder_depths=(0, 1, 1),
    encoder_blocks=("res",) * 3,
    decoder_blocks=("res",) * 3,
    decoder_norms=("trms2d",) * 3,
)
CONVOLUTIONS = {
    "s2c": S2C,
    "stride": dataclasses.replace(
        S2C, downsample="stride", upsample="nearest", latent_shortcuts=True
    ),
    "full": dataclasses.replace(
        S2C,
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 2),
        decoder_norms=("bn2d", "bn2d", "trms2d"),
    ),
}


def autoencoder(arch):
    """An Autoencoder of any architecture, with random weights."""
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    model = dcae.DCAE(arch, depthwise="shifted", dtype=np.float32, rngs=nnx.Rngs(0))
    graph, params, stats = split(model)
    settings = config_lib.default().model.to_dict()
    return autoencoder_lib.Autoencoder(graph, {**params, **stats}, arch, settings, mesh)


def fake(f):
    """An encoder and a decoder without weights: averages of squares, and squares again."""

    def encode(x):
        b, h, w, c = x.shape
        return np.asarray(x).reshape(b, h // f, f, w // f, f, c).mean((2, 4))

    def decode(z):
        return np.repeat(np.repeat(np.asarray(z), f, axis=1), f, axis=2)

    return encode, decode


@pytest.mark.parametrize("f", [8, 32, 64, 128])
@pytest.mark.parametrize("size", [(5, 9), (1, 7), (11, 4)])
def test_tiles_give_the_size_and_numbers_of_the_whole(f, size):
    """Catches 2368 pixels for 2048 at f128, a gap, and weights that do not add up to one."""
    encode, decode = fake(f)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, size[0] * f, size[1] * f, 1)).astype(np.float32)
    z = encode(x)
    for tile, overlap in ((4, None), (4, 3), (3, 0), (7, 2), (64, 16)):
        tiles = tiling.plan(tile, overlap, None)
        np.testing.assert_allclose(tiling.run(encode, x, tiles, (f, 1), 1), z, atol=1e-6)
        y = tiling.run(decode, z, tiles, (1, f), 1)
        assert y.shape == x.shape and y.dtype == np.float32
        np.testing.assert_allclose(y, decode(z), atol=1e-6)


def test_all_tiles_have_one_size_and_overlap_enough():
    """Catches a narrow last tile, which costs another compilation and sees too little."""
    for size, tile, overlap in ((100, 16, 4), (17, 16, 8), (33, 8, 7), (64, 16, 0)):
        axis = tiling._axis(size, tiling.plan(tile, overlap, None), 2)
        starts = [start for start, _, _ in axis]
        assert {length for _, length, _ in axis} == {tile}
        assert starts[0] == 0 and starts[-1] == size - tile
        assert all(a < b <= a + tile - overlap for a, b in zip(starts, starts[1:], strict=False))


def test_the_ramp_lies_between_the_margins():
    """Catches a ramp over the whole overlap, margins and all: weights that do not add up to one."""
    tiles = tiling.plan(16, 8, 3)
    assert tiles.margin == 3
    axis = tiling._axis(16 + 3 * 8, tiles, 2)
    total = np.zeros(2 * (16 + 3 * 8))
    for start, length, weights in axis:
        total[2 * start : 2 * (start + length)] += weights
    assert [start for start, *_ in axis] == [0, 8, 16, 24]
    np.testing.assert_allclose(total, 1, atol=1e-6)
    inner = axis[1][2]
    assert not inner[:6].any() and not inner[-6:].any() and (inner[10:-10] == 1).all()
    np.testing.assert_allclose(inner[6:10], [0.125, 0.375, 0.625, 0.875])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_reach_is_how_far_a_change_is_felt(name):
    """Catches a stated receptive field that is too small, or much larger than it is."""
    arch = CONVOLUTIONS[name]
    ae = autoencoder(arch)
    f = arch.compression
    # Padding is what a tile changes: compare the image with its own right part.
    reach = dcae.reach(arch)
    n = 2 * max(reach) + 3
    z = np.random.default_rng(0).normal(size=(1, 1, n, arch.latent_channels)).astype(np.float32)
    z = np.repeat(z, 2, axis=1)
    whole, part = np.asarray(ae.decode(z)), np.asarray(ae.decode(z[:, :, 1:]))
    changed = np.flatnonzero(np.abs(whole[0, :, f:] - part[0]).max((0, 2)) > 1e-5)
    assert reach[1] - 1 <= changed.max() // f + 1 <= reach[1]
    x = np.random.default_rng(1).uniform(-1, 1, (1, f, n * f, 3)).astype(np.float32)
    whole, part = np.asarray(ae.encode(x)), np.asarray(ae.encode(x[:, :, f:]))
    changed = np.flatnonzero(np.abs(whole[0, :, 1:] - part[0]).max((0, 2)) > 1e-5)
    assert reach[0] - 1 <= changed.max() + 1 <= reach[0]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_tiles_of_convolutions_equal_the_whole(name, monkeypatch):
    """Catches a border that its padding has touched and that still has weight."""
    arch = CONVOLUTIONS[name]
    ae = autoencoder(arch)
    monkeypatch.setattr(
        autoencoder_lib.Autoencoder, "reach", property(lambda self: dcae.reach(arch))
    )
    f, (into, out) = arch.compression, dcae.reach(arch)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 3, 5 * out + 4, arch.latent_channels)).astype(np.float32)
    whole = np.asarray(ae.decode(z))
    tiled = ae.decode(z, tile=2 * out + 5, overlap=2 * out)
    assert np.abs(tiled - whole).max() <= 1e-4 * np.abs(whole).max()
    narrow = ae.decode(z, tile=2 * out + 5, overlap=1)
    assert np.abs(narrow - whole).max() > 1e-4 * np.abs(whole).max()
    x = rng.uniform(-1, 1, (1, 2 * f, (5 * into + 4) * f, 3)).astype(np.float32)
    whole = np.asarray(ae.encode(x))
    tiled = ae.encode(x, tile=2 * into + 3, overlap=2 * into + 1)
    assert np.abs(tiled - whole).max() <= 1e-4 * np.abs(whole).max()


def test_reach_of_the_variants():
    """Catches attention counted as if it saw its neighbours alone."""
    reaches = {name: dcae.reach(arch) for name, arch in dcae.VARIANTS.items()}
    assert reaches["f32c32"] == reaches["tiny"] == reaches["f32c32-sana"] == (None, None)
    assert reaches["f32c32-lite"] == (None, 19)
    assert reaches["1.5-f32c128"] == (20, 21)
    assert reaches["1.5-f64c128"] == (19, 20)


def test_the_interface_takes_tiles_and_refuses_what_cannot_be():
    """Catches tiles in pixels, an overlap of the whole tile, and values that go unchecked."""
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    ae = dcae_jax.create_autoencoder("tiny", mesh=mesh)
    assert models.find(ae.model_config) is dcae and ae.reach == (None, None)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 80, 48, 3)).astype(np.float32)
    z = ae.encode(x, tile=3)
    assert z.shape == (1, 5, 3, 32) and ae.decode(z, tile=3, overlap=1).shape == x.shape
    np.testing.assert_allclose(ae.encode(x, tile=8), ae.encode(x), atol=1e-5)
    for call, words in (
        (functools.partial(ae.encode, x, tile=4, overlap=4), "overlap=4 must be less than tile=4"),
        (functools.partial(ae.encode, x, tile=-1), "tile=-1"),
        (functools.partial(ae.encode, x, tile=2.5), "tile=2.5"),
        (functools.partial(ae.encode, x, tile=4, overlap=-1), "overlap=-1"),
        (functools.partial(ae.encode, x[:, :70], tile=4), "height 70, not a multiple of 16"),
        (functools.partial(ae.encode, x * 255, tile=4), "scale it to"),
        (functools.partial(ae.decode, z[..., :3], tile=4), "give [B, H, W, 32]"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)


@pytest.mark.slow
def test_tiles_of_attention_leave_no_step_at_their_borders(tmp_path):
    """Catches tiles that are laid side by side, or blended over a part of their overlap.

    An image has steps of its own where a border happens to be, and a trained model's latents
    make a grid, so what tiling adds to the whole image is measured, and the step beside it.
    """
    c = config_lib.load_file(os.path.join(CONFIGS, "phase1.py"), "tiny")
    c.update({"steps": 100, "save_every": 100, "evaluate_every": 0, "batch_size": 8})
    c.evaluate.count = 8
    c.evaluate.resolutions = (64,)
    run_job(train, c, str(tmp_path / "run"))
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    ae = dcae_jax.load_autoencoder(str(tmp_path / "run"), mesh=mesh)
    x = skimage.data.astronaut()[None].astype(np.float32) / 127.5 - 1
    z = np.asarray(ae.encode(x))
    whole = np.asarray(ae.decode(z))

    def at_borders(tile, overlap):
        """(the largest step that tiling adds at a border, over the median step of neighbours;
        the largest ratio of the steps there, tiled to whole)."""
        tiled = ae.decode(z, tile=tile, overlap=overlap)
        starts = [start for start, *_ in tiling._axis(32, tiling.plan(tile, overlap, None), 16)]
        edges = [16 * n for s in starts for n in (s, s + tile) if 0 < n < 32]
        added, ratios = [], []
        for axis in (1, 2):
            new, old, error = (
                np.abs(np.diff(image, axis=axis)).mean((0, 3 - axis, 3))
                for image in (tiled, whole, tiled - whole)
            )
            added += [error[edge - 1] / np.median(old) for edge in edges]
            ratios += [new[edge - 1] / old[edge - 1] for edge in edges]
        return max(added), max(ratios)

    for tile, overlap in ((16, 4), (8, 2)):
        added, ratio = at_borders(tile, overlap)
        assert added < 1 and ratio < 1.2, (added, ratio)
    added, ratio = at_borders(16, 0)  # so that the measures are known to see a step
    assert added > 2 and ratio > 1.2, (added, ratio)
