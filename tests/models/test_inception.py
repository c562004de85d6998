# SPDX-License-Identifier: Apache-2.0
"""Inception's features and inputs against torch-fidelity's and pytorch-fid's."""

import functools
import json

import jax
import numpy as np
import pytest
from goldens import judges

from dcae_jax.data import transforms
from dcae_jax.models import inception, inception_torch

KINDS = inception.PREPROCESSINGS


@functools.cache
def state():
    return judges.inception_state(inception.shapes())


@functools.cache
def weights():
    return inception_torch.from_torch(state())


@functools.partial(jax.jit, static_argnames=("kind", "fc_bias"))
def features(weights, levels, kind, fc_bias=False):
    return inception.features(weights, inception.preprocess(levels, kind), fc_bias)


def assert_close(found, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, tolerance, tolerance * np.abs(expected).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_golden_features(kind):
    """Fails on a wrong branch, pooling, BatchNorm eps, padding, resizing or the other input."""
    golden = json.loads(judges.PATH.read_text())
    pool3, logits = features(weights(), judges.pictures(2, 96), kind)
    assert pool3.shape == (2, 2048) and logits.shape == (2, 1008)
    assert_close(pool3[:, ::64], golden[kind]["pool3"])
    assert_close(logits[:, ::32], golden[kind]["logits"])
    other = golden[KINDS[1 - KINDS.index(kind)]]["pool3"]
    assert np.abs(np.asarray(pool3[:, ::64]) - other).max() > 0.01


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """torch-fidelity's network with the random weights, by way of a file."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: torch.from_numpy(v) for k, v in state().items()}, path)
    return judges.fidelity_inception(path)


def assert_parity(original, levels, kind):
    expected = judges.torch_inception(original, levels, kind)
    pool3, logits = features(weights(), levels, kind)
    assert_close(pool3, expected[0])
    assert_close(logits, expected[1])
    return expected


@pytest.mark.torch
@pytest.mark.parametrize("size", [96, 299, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_fidelity_live(original, size, kind):
    """Fails if a resizing up, down or by nothing parts from the tool of that name."""
    levels = judges.pictures(1, size, seed=size)
    expected = assert_parity(original, levels, kind)
    if size == 96:
        _, biased = features(weights(), levels, kind, fc_bias=True)
        assert_close(biased, expected[2])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("size", [96, 299, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_fidelity_on_32_pictures(original, size, kind):
    """Fails if only some pictures agree: 32 of each size."""
    for seed in range(8):
        assert_parity(original, judges.pictures(4, size, seed), kind)


@pytest.mark.torch
def test_preprocessing_equals_torch_interpolate():
    """Fails if half-pixel bilinear has other edges or weights than PyTorch, H and W apart."""
    torch = pytest.importorskip("torch")
    levels = judges.pictures(1, 640)[:, :131, :640]
    x = torch.from_numpy(levels.transpose(0, 3, 1, 2) / np.float32(255))
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    expected = (2 * x - 1).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inception.preprocess(levels, "pytorch-fid"), expected, atol=1e-4)


def test_preprocessings_by_hand():
    """Fails if the scale (255 or 256 steps) or the sampling points of a row are exchanged."""
    levels = np.broadcast_to(np.arange(598.0)[None, :, None, None] / 4, (1, 598, 299, 3))
    row = np.arange(299.0)
    half_pixel = inception.preprocess(levels, "pytorch-fid")[0, :, 0, 0]
    np.testing.assert_allclose(half_pixel, (2 * row + 0.5) / 4 / 127.5 - 1, atol=1e-6)
    corner = inception.preprocess(levels, "torch-fidelity")[0, :, 0, 0]
    np.testing.assert_allclose(corner, (2 * row / 4 - 128) / 128, atol=1e-6)
    same = judges.pictures(1, 299)
    for kind in KINDS:
        np.testing.assert_array_equal(
            inception.preprocess(same, kind), inception.preprocess(same.astype(np.float32), kind)
        )
    found = inception.preprocess(same, "pytorch-fid")
    np.testing.assert_allclose(found, same / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="choose one of pytorch-fid, torch-fidelity"):
        inception.preprocess(same, "clean-fid")
    with pytest.raises(ValueError, match="run `preprocess` first"):
        inception.features(weights(), same[:, :96])


def test_features_feed_the_metrics():
    """Fails if pictures in [-1, 1] lose their way through levels, features and moments."""
    x = judges.pictures(2, 96) / np.float32(127.5) - 1
    pool3, _ = features(weights(), transforms.to_levels(x), "pytorch-fid")
    again, _ = features(weights(), judges.pictures(2, 96), "pytorch-fid")
    assert_close(pool3, again, 1e-5)
