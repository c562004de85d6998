# SPDX-License-Identifier: Apache-2.0
"""The images, the autoencoder and the finished workdir that tests of `encode` share."""

import jax
import numpy as np
import pytest
from PIL import Image
from support import encoding, run_job, small_models

from dcae_jax.jobs import encode
from dcae_jax.runtime import mesh as mesh_lib


@pytest.fixture(scope="session")
def encode_images(tmp_path_factory):
    """Images of noise on a slope, in three classes."""
    root = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    for i in range(encoding.COUNT):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        slope = np.linspace(0, 160, 40 + i)[None, :, None] + np.zeros((36, 1, 3))
        pixels = (slope + rng.integers(0, 90, slope.shape)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return str(root)


@pytest.fixture(scope="session")
def export_narrow(tmp_path_factory):
    """-> a function that exports a narrow tiny model, after `change(weights)`."""

    def export(change=None, **settings):
        folder = str(tmp_path_factory.mktemp("export"))
        return small_models.export_autoencoder(folder, change, **settings)

    return export


@pytest.fixture(scope="session")
def narrow_export(export_narrow):
    return export_narrow()


@pytest.fixture
def encode_config(encode_images, narrow_export):
    return encoding.config(encode_images, narrow_export)


@pytest.fixture(scope="session")
def encoded(encode_images, narrow_export, tmp_path_factory):
    """The workdir of a job that nothing interrupted, on one device."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(
            mesh_lib, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
        )
        assert (
            run_job(encode, encoding.config(encode_images, narrow_export), workdir) == encode.DONE
        )
    return workdir
