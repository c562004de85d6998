# SPDX-License-Identifier: Apache-2.0
"""Generators: samples that depend on seed and number alone, decoded at the right scale."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import small_models
from support.published_weights import PUBLISHED, random_weights, write_export

import dcae_jax
from dcae_jax.api import generator
from dcae_jax.diffusion import samplers
from dcae_jax.errors import UserError
from dcae_jax.models import uvit, uvit_torch
from dcae_jax.runtime import mesh as mesh_lib


def test_a_sample_is_that_of_its_number(generator_run, alone):
    """Catches samples that depend on the batch, and labels or guidance that nothing hears."""
    model = dcae_jax.load_generator(generator_run)
    labels = np.array([0, 1, 2, 0])
    images = model.sample(labels, guidance=2.0, steps=4, seed=3)
    assert images.dtype == np.uint8 and images.shape == (4, 32, 32, 3)
    again = model.sample(labels[2:], guidance=2.0, steps=4, seed=3, first=2)
    np.testing.assert_array_equal(again, images[2:])
    for other in (
        model.sample(np.array([1, 2, 0, 1]), guidance=2.0, steps=4, seed=3),
        model.sample(labels, guidance=4.0, steps=4, seed=3),
        model.sample(labels, guidance=2.0, steps=4, seed=4),
    ):
        assert np.any(other != images)


def test_samples_are_decoded_from_unscaled_latents(generator_run, alone, monkeypatch):
    """Catches a scaling factor that is left out on the way back, or applied the wrong way."""
    model = dcae_jax.load_generator(generator_run)
    z = np.random.default_rng(0).standard_normal((3, 2, 2, 8)).astype(np.float32)
    monkeypatch.setattr(samplers, "sample", lambda *_, **__: jnp.asarray(z))
    generator._sample_fn.cache_clear()
    images = model.sample([0, 1, 2], steps=1)
    generator._sample_fn.cache_clear()
    decoded = np.asarray(model.autoencoder.decode(z / model.scaling_factor))
    want = np.clip(127.5 * decoded + 128, 0, 255).astype(np.uint8)  # truncated
    assert np.mean(images != want) < 1e-3 and np.abs(images.astype(int) - want).max() <= 1


@pytest.mark.slow
def test_samples_on_eight_devices_are_those_of_one(generator_run, alone):
    """Catches noise or labels that follow the layout of the mesh."""
    labels = np.arange(11) % 3
    on_one = dcae_jax.load_generator(generator_run).sample(labels, guidance=1.5, steps=4)
    eight = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2, 1, 1), mesh_lib.AXES)
    on_eight = dcae_jax.load_generator(generator_run, mesh=eight).sample(
        labels, guidance=1.5, steps=4
    )
    assert np.mean(on_one != on_eight) <= 1e-3
    assert np.abs(on_one.astype(int) - on_eight.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": [0, 4]}, "labels=4 is not a class; give 0 to 2, or 3 for unconditional"),
        ({"labels": [-1]}, "labels=-1"),
        ({"labels": [0.5]}, "labels must be integers"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"sampler": "euler"}, "sampler='euler' does not fit"),
        ({"interval": (0.5, 0.2)}, "interval="),
    ],
)
def test_wrong_arguments_are_named(generator_run, alone, change, words):
    """Catches a label past the table, which JAX clamps, and an image made of NaN."""
    model = dcae_jax.load_generator(generator_run)
    with pytest.raises(ValueError, match=re.escape(words)):
        model.sample(**{"labels": [0], "steps": 2, **change})


def test_a_checkpoint_of_other_latents_is_refused(
    generator_run, autoencoder_export, alone, tmp_path
):
    """Catches a diffusion model sampled through an autoencoder that it was not trained on."""
    moved = str(tmp_path / "moved")
    shutil.copytree(generator_run, moved)

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 1

    other = small_models.export_autoencoder(str(tmp_path / "other"), change)
    with pytest.raises(UserError, match="did not make these latents"):
        dcae_jax.load_generator(moved, autoencoder=other)
    assert dcae_jax.load_generator(moved, autoencoder=autoencoder_export).num_classes == 3


def test_a_published_models_autoencoder_has_the_factor_of_its_name(tmp_path, one_device):
    """Catches a model whose name says 0.3189 sampled with the factor 0.4552 of other weights."""
    arch = uvit.Architecture(
        depth=2, width=128, heads=4, latent_size=4, latent_channels=8, out_channels=8,
        patch_size=2, num_classes=10,
    )  # fmt: skip
    tensors = {name: np.zeros(shape, np.float32) for name, shape in uvit.shapes(arch).items()}
    tensors = uvit_torch.to_torch(tensors, arch, "diffusion_model.")
    (tmp_path / "published").mkdir()
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        tmp_path / "published" / "model.safetensors",
    )
    name = {"model_name": "dc-ae-f32c32-in-1.0-usit-s-in-128px"}
    (tmp_path / "published" / "config.json").write_text(json.dumps(name))
    for folder, factor in (("same", 0.3189), ("other", 0.4552), ("unknown", None)):
        own = dataclasses.replace(PUBLISHED, scaling_factor=factor)
        write_export(tmp_path / folder, own, random_weights(own))
        load = functools.partial(
            dcae_jax.load_generator,
            str(tmp_path / "published"),
            autoencoder=str(tmp_path / folder),
            mesh=one_device,
        )
        if folder == "other":
            with pytest.raises(
                UserError, match="scaled by 0.3189, but autoencoder=.* factor 0.4552"
            ):
                load()
        else:
            assert load().scaling_factor == 0.3189
