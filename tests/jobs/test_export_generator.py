# SPDX-License-Identifier: Apache-2.0
"""The job `export` of diffusion models: with their autoencoder, to be sampled from anywhere."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import run_job, small_models, to_json
from support.published_weights import PUBLISHED, random_weights, same, write_export

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process
from dcae_jax.training import state as state_lib

NAME = "dc-ae-f32c32-in-1.0"
WIDTH = 128  # of `tiny`, by which the authors' files tell the heads


def export_generator(folder, name, objective, inner, **changes):
    """Writes an export of ours with random weights beside the autoencoder `inner`; -> weights."""
    config = config_lib.default()
    sizes = dict(depth=2, latent_size=2, latent_channels=8, num_classes=3, scaling_factor=0.3189)
    config.model.update({"name": name, "variant": "tiny", **sizes, **changes})
    config.objective = objective
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    weights = state_lib.random_weights(config.model, mesh, 5, config)
    weights = {k: np.asarray(v) for k, v in weights.items()}
    meta = {"kind": "generator", "model": to_json(config.model)}
    meta |= {"objective": objective, "patch_size": 1}
    shutil.copytree(inner, os.path.join(folder, checkpoint_weights.AUTOENCODER))
    checkpoint_weights.save_export(folder, weights, meta)
    return weights


@pytest.fixture
def named(tmp_path, monkeypatch):
    """An autoencoder with a published name, narrow: its own size would be 1.2 GB."""
    arch = dataclasses.replace(PUBLISHED, scaling_factor=None)
    monkeypatch.setitem(dcae.VARIANTS, "f32c32", arch)
    folder = tmp_path / "named"
    weights = random_weights(arch)
    write_export(folder, dcae.variant(NAME), weights)
    return str(folder), weights


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    return small_models.export_autoencoder(str(tmp_path_factory.mktemp("unnamed")))


@pytest.mark.parametrize(
    "name, objective, kind",
    [("uvit", "epsilon", "uvit"), ("uvit", "flow", "usit"), ("dit", "learned_sigma", "dit")],
)
def test_ours_to_the_authors_names_to_ours_is_bit_identical(
    run_export,
    named,
    tmp_path,
    name,
    objective,
    kind,
):
    """Catches a layer of a stack lost, an objective or autoencoder that the name does not tell."""
    inner, inner_weights = named
    ours = str(tmp_path / "ours")
    weights = export_generator(ours, name, objective, inner)
    status, said, there = run_export(ours, "authors", out="there")
    assert status == 0 and "largest difference after reading it back: 0" in said
    assert "scaling factor" not in said
    config = json.loads(open(os.path.join(there, "config.json")).read())
    assert config == {"model_name": f"{NAME}-{kind}-tiny-in-64px"}
    tensors = load_file(os.path.join(there, "model.safetensors"))
    assert {key.split(".")[0] for key in tensors} == {"diffusion_model", "autoencoder"}
    status, said, back = run_export(there, "orbax", out="back")
    assert status == 0, said
    read, saved = checkpoint_weights.load_weights(back, kind="generator")
    same(read, weights)
    same(checkpoint_weights.load_weights(saved.diffusion.autoencoder)[0], inner_weights)
    before, after = (dcae_jax.load_generator(folder) for folder in (ours, back))
    assert after.architecture == before.architecture and after.objective == objective
    assert after.scaling_factor == before.scaling_factor == 0.3189
    assert after.autoencoder.architecture == before.autoencoder.architecture


@pytest.mark.slow
def test_an_export_samples_the_images_of_its_workdir(
    run_export,
    unnamed,
    tmp_path,
    one_device,
    monkeypatch,
):
    """Catches an export that needs the run, its latents or its autoencoder beside it."""
    make_mesh = mesh_lib.make_mesh
    monkeypatch.setattr(
        mesh_lib, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
    )
    inner = str(tmp_path / "inner")
    shutil.copytree(unnamed, inner)
    latents = small_models.write_latents(str(tmp_path / "latents"), inner, str(tmp_path / "images"))
    config = small_models.diffusion_config(latents)
    config.steps, config.sample.steps = 1, 1
    workdir = str(tmp_path / "run")
    assert run_job(train, config, workdir) == train.DONE
    labels = [0, 1, 2]
    want = dcae_jax.load_generator(workdir).sample(labels, guidance=2.0, steps=2, seed=3)
    status, said, out = run_export(os.path.join(workdir, "checkpoints", "1"), "orbax")
    assert status == 0 and "largest difference after reading it back: 0" in said
    for gone in (workdir, inner, latents):
        shutil.rmtree(gone)
    moved = str(tmp_path / "moved")
    os.rename(out, moved)
    model = dcae_jax.load_generator(moved)
    np.testing.assert_array_equal(model.sample(labels, guidance=2.0, steps=2, seed=3), want)
    meta = json.loads(open(os.path.join(moved, "model.json")).read())
    assert meta["scaling_factor_multiplies_latent"] == model.scaling_factor
    assert meta["provenance"]["source"].endswith("checkpoints/1")

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 1

    other = small_models.export_autoencoder(str(tmp_path / "other"), change)
    with pytest.raises(UserError, match="did not make these latents"):
        dcae_jax.load_generator(moved, autoencoder=other)
    status, said, _ = run_export(moved, "authors", out="b")
    assert status == process.MISTAKE and "no variant has 2 heads with 16 channels" in said


def test_without_a_published_autoencoder_the_diffusion_model_goes_alone(
    run_export,
    unnamed,
    tmp_path,
):
    """Catches another autoencoder named in its place, or an objective lost with the name."""
    ours = str(tmp_path / "ours")
    weights = export_generator(ours, "uvit", "flow", unnamed)
    status, said, out = run_export(ours, "authors")
    assert status == 0 and "only the diffusion model is written" in said and "0.3189" in said
    tensors = load_file(os.path.join(out, "model.safetensors"))
    assert all(name.startswith("diffusion_model.") for name in tensors)
    read, saved = checkpoint_weights.load_weights(out, kind="generator")
    same(read, weights)
    assert saved.diffusion.objective == "flow" and saved.diffusion.autoencoder == ""


def test_a_factor_that_the_name_does_not_have_is_told(run_export, named, tmp_path):
    """Catches samples decoded in another scale without a word."""
    ours = str(tmp_path / "ours")
    export_generator(ours, "uvit", "epsilon", named[0], scaling_factor=0.7)
    status, said, _ = run_export(ours, "authors")
    assert status == 0 and "readers will use 0.3189" in said and "instead of 0.7" in said


@pytest.mark.parametrize(
    "form, words",
    [
        ("diffusers", "its DiT pipeline takes no DC-AE; use orbax or authors"),
        ("stablehlo", "the program would fix labels, guidance, sampler and steps"),
    ],
)
def test_formats_without_diffusion_models_say_why(run_export, unnamed, tmp_path, form, words):
    """Catches a folder that no program opens, or a KeyError of the autoencoder's names."""
    ours = str(tmp_path / "ours")
    export_generator(ours, "dit", "learned_sigma", unnamed)
    status, said, out = run_export(ours, form)
    assert status == process.MISTAKE and words in said and not os.path.exists(out)
    assert said.splitlines()[-1].startswith("error: ")


def test_objectives_that_the_names_cannot_tell_are_refused(run_export, unnamed, tmp_path):
    """Catches a DiT that predicts epsilon read back as one that predicts a velocity."""
    ours = str(tmp_path / "ours")
    export_generator(ours, "dit", "epsilon", unnamed)
    status, said, out = run_export(ours, "authors")
    assert status == process.MISTAKE and "cannot express objective='epsilon'" in said
    assert not os.path.exists(out)
