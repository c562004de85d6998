# SPDX-License-Identifier: Apache-2.0
"""The job `export`: every format is read back by its own reader."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.published_weights import (
    KL,
    PUBLISHED,
    SMALL,
    hollow_file,
    random_weights,
    same,
    write_export,
    write_folder,
)

import dcae_jax
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch, sdvae, sdvae_torch
from dcae_jax.pretrained import export_formats, hub
from dcae_jax.runtime import process

ARCH = dataclasses.replace(
    dcae.VARIANTS["tiny"], widths=(8, 8, 16, 32, 32), latent_channels=8, scaling_factor=0.5
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An export of ours with random weights -> (its path, the weights)."""
    folder = tmp_path_factory.mktemp("exports") / "ours"
    weights = random_weights(ARCH)
    weights = {k: v + 0.5 if k.endswith("var") else v for k, v in weights.items()}
    write_export(folder, ARCH, weights)
    return str(folder), weights


def test_an_export_of_ours_holds_all_that_loading_needs(run_export, source, one_device):
    """Catches an export without its statistics, its scaling factor or its shape."""
    path, weights = source
    status, said, out = run_export(path, "orbax")
    assert status == 0 and "largest difference after reading it back: 0" in said
    ae = dcae_jax.load_autoencoder(out, mesh=one_device)
    same(weights, ae.weights)
    assert ae.architecture == ARCH
    meta = json.loads(open(os.path.join(out, "model.json")).read())
    assert meta["scaling_factor"] == 0.5 and meta["compression"] == 16
    assert meta["provenance"]["source"] == path
    assert not [name for name in os.listdir(os.path.dirname(out)) if name.endswith(".tmp")]


def test_a_given_scaling_factor_comes_before_that_of_the_weights(run_export, source, one_device):
    """Catches the key ignored: a diffusion model then trains on latents of another scale."""
    status, _, out = run_export(source[0], "orbax", "--config.model.scaling_factor=0.25")
    assert status == 0
    assert dcae_jax.load_autoencoder(out, mesh=one_device).scaling_factor == 0.25


def test_ours_to_diffusers_to_ours_is_bit_identical(run_export, source):
    """Catches a tensor rounded or permuted by the file formats on the way."""
    path, weights = source
    _, _, there = run_export(path, "diffusers", out="there")
    status, _, back = run_export(there, "orbax", out="back")
    read, saved = checkpoint_weights.load_weights(back)
    assert status == 0
    same(weights, read)
    assert dcae.architecture(saved.model) == ARCH


def test_authors_names_go_out_and_come_back(run_export, tmp_path, monkeypatch):
    """Catches an export whose model_name is of other weights, and a factor silently replaced.

    A published model's own size would be 1.2 GB: here its name stands for a small one.
    """
    small = dataclasses.replace(PUBLISHED, scaling_factor=None)
    monkeypatch.setitem(dcae.VARIANTS, "f32c32", small)
    weights = random_weights(PUBLISHED)
    write_folder(tmp_path / "hub", PUBLISHED, weights)
    status, said, out = run_export(tmp_path / "hub", "authors")
    assert status == 0, said
    config = json.loads(open(os.path.join(out, "config.json")).read())
    assert config == {"model_name": "dc-ae-f32c32-mix-1.0"}
    tensors = load_file(os.path.join(out, "model.safetensors"))
    assert "encoder.stages.1.op_list.0.main.conv1.conv.weight" in tensors
    same(weights, checkpoint_weights.load_weights(out)[0])
    more = "--config.model.variant=f32c32"
    file = shutil.move(tmp_path / "hub" / hub.DIFFUSERS_FILE, tmp_path)
    status, said, _ = run_export(file, "authors", more, out="b")
    assert status == 0 and "does not store the scaling factor" in said


def test_the_authors_factor_reaches_diffusers(run_export, tmp_path, monkeypatch):
    """Catches a factor that is lost where the variant is named, and one that is made up."""
    small = dataclasses.replace(PUBLISHED, scaling_factor=None)
    monkeypatch.setitem(dcae.VARIANTS, "f32c32", small)
    write_folder(tmp_path / "hub", PUBLISHED, random_weights(PUBLISHED), "authors")
    status, said, out = run_export(
        tmp_path / "hub", "diffusers", "--config.model.variant=f32c32", out="a"
    )
    assert status == 0, said
    with open(os.path.join(out, "config.json")) as file:
        assert json.load(file)["scaling_factor"] == 0.4552
    status, said, out = run_export(
        tmp_path / "hub", "diffusers", "--config.model.variant=dc-ae-f32c32-in-1.0", out="b"
    )
    assert status == process.MISTAKE and "states 0.4552" in said and not os.path.exists(out)
    file = shutil.move(tmp_path / "hub" / hub.AUTHORS_FILE, tmp_path)  # by itself: no factor
    status, said, out = run_export(file, "diffusers", "--config.model.variant=f32c32", out="c")
    assert status == 0 and "is unknown and is written as 1.0" in said


# Runs the example on each NAME.npy where this package cannot be imported -> NAME.npz.
ELSEWHERE = """
import os, runpy, sys
sys.modules["dcae_jax"] = None
example, *names = sys.argv[1:]
for name in names:
    sys.argv = [example, name + ".npy"]
    runpy.run_path(example)
    os.rename("reconstruction.npz", name + ".npz")
"""


def test_stablehlo_runs_without_this_package(run_export, source, tmp_path):
    """Catches weights baked in, a batch or size that is fixed, a platform that is missing."""
    path, weights = source
    pytest.importorskip("flatbuffers")
    status, said, out = run_export(path, "stablehlo")
    assert status == 0, said
    tensors = load_file(os.path.join(out, "weights.safetensors"))
    same(weights, tensors)
    for name in ("encode", "decode"):
        with open(os.path.join(out, f"{name}.stablehlo"), "rb") as file:
            program = file.read()
        assert len(program) < 500_000
        assert jax.export.deserialize(program).platforms == ("cpu", "tpu", "cuda")
    ae = dcae_jax.load_autoencoder(path)
    shapes = {"one": (1, 32, 16, 3), "three": (3, 16, 48, 3)}
    inputs = {k: np.random.default_rng(0).uniform(-1, 1, v) for k, v in shapes.items()}
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    for name, x in inputs.items():
        np.save(tmp_path / f"{name}.npy", x)
    command = [sys.executable, "-c", ELSEWHERE, os.path.join(out, "example.py"), *inputs]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for name, x in inputs.items():
        with np.load(tmp_path / f"{name}.npz") as theirs:
            z = np.asarray(ae.encode(x))
            y = np.asarray(ae.decode(z))
            np.testing.assert_allclose(theirs["latents"], z, atol=1e-4 * np.abs(z).max())
            np.testing.assert_allclose(theirs["images"], y, atol=1e-3 * np.abs(y).max())
    with pytest.raises(UserError, match="kind='stablehlo'"):
        checkpoint_weights.load_weights(out)


def test_the_example_is_short_and_needs_jax_and_safetensors_alone():
    """Catches an example that grows into a program, or imports what its reader has not got."""
    lines = export_formats.EXAMPLE.splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 100
    imports = re.findall(r"^(?:import|from) (.*)$", export_formats.EXAMPLE, re.M)
    assert imports == [
        "json, os, sys",
        "jax, numpy as np",
        "jax import export",
        "safetensors.numpy import load_file",
    ]


def test_what_a_format_cannot_express_is_refused_with_the_reason(run_export, tmp_path):
    """Catches an export that another program opens as another model."""
    tiny = dcae.VARIANTS["tiny"]
    write_export(tmp_path / "ours", tiny, random_weights(tiny), residual=False)
    for form in ("diffusers", "authors"):
        status, said, out = run_export(tmp_path / "ours", form)
        assert status == process.MISTAKE and "cannot express residual=False" in said
        assert said.splitlines()[-1].startswith("error: ") and not os.path.exists(out)
    shapes = sdvae_torch.to_torch(random_weights(sdvae.Variant()), sdvae.Variant(), "diffusers")
    hollow_file(tmp_path / "kl.safetensors", {k: v.shape for k, v in shapes.items()})
    status, said, _ = run_export(tmp_path / "kl.safetensors", "authors")
    assert status == process.MISTAKE and "diffusers only" in said
    assert os.listdir(tmp_path) and not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


def test_mistakes_are_told_before_any_work(run_export, source, tmp_path):
    """Catches an older export overwritten, or mixed with a new one."""
    path, _ = source
    (tmp_path / "out").mkdir()
    assert run_export(path, "orbax")[0] == 0  # an empty folder is taken
    status, said, out = run_export(path, "diffusers")
    assert status == process.MISTAKE and "not empty" in said
    assert sorted(os.listdir(out)) == ["model.json", "params"]
    status, said, _ = run_export(path, "onnx", out="b")
    assert status == process.MISTAKE and "export.format='onnx'" in said
    status, said, _ = run_export("", "orbax", out="b")
    assert status == process.MISTAKE and "init_from is empty" in said


def test_a_difference_after_reading_back_fails_and_leaves_nothing(
    run_export, source, tmp_path, monkeypatch
):
    """Catches an export that is kept though it does not hold the weights."""
    written = dcae_torch.to_torch

    def wrong(*arguments):
        tensors = written(*arguments)
        return {**tensors, "encoder.conv_out.bias": tensors["encoder.conv_out.bias"] + 1e-3}

    monkeypatch.setattr(dcae_torch, "to_torch", wrong)
    with pytest.raises(RuntimeError, match="differs by 0.001"):
        run_export(source[0], "diffusers")
    assert os.listdir(tmp_path) == []


@pytest.mark.torch
@pytest.mark.parametrize("name", ["dc-ae-f32c32-mix-1.0", "dc-ae-lite-f32c32-sana-1.1", "kl"])
def test_diffusers_opens_an_export_and_computes_the_same(run_export, name, tmp_path, one_device):
    """Catches a folder that from_pretrained refuses, or that gives other images there."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    arch = KL if name == "kl" else SMALL[name]
    weights = random_weights(arch)
    weights = {k: v + 0.5 if k.endswith("var") else v for k, v in weights.items()}
    write_export(tmp_path / "ours", arch, weights)
    status, said, out = run_export(tmp_path / "ours", "diffusers")
    assert status == 0, said
    kind = diffusers.AutoencoderKL if name == "kl" else diffusers.AutoencoderDC
    network, loading = kind.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert network.config.scaling_factor == (arch.scaling_factor or 1.0)
    ae = dcae_jax.load_autoencoder(out, mesh=one_device)
    f = arch.compression
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2 * f, 3 * f, 3)).astype(np.float32)
    with torch.no_grad():
        latent = network.eval().encode(torch.from_numpy(x).permute(0, 3, 1, 2))
        latent = latent.latent_dist.mean if name == "kl" else latent.latent
        image = network.decode(latent).sample
    z = ae.encode(x)
    for ours, theirs in ((z, latent), (ae.decode(z), image)):
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        error = np.abs(np.asarray(ours) - theirs) / theirs.std()
        assert error.max() <= 1e-3 and error.mean() <= 1e-4


def test_half_precision_rounds_the_parameters_once(run_export, source, tmp_path):
    """Catches rounding twice, rounded statistics, and float16 passed on to a model."""
    statistics = [name for name in source[1] if name.rsplit(".")[-1] in ("mean", "var")]
    assert statistics
    weights = source[1] | {name: np.full_like(source[1][name], 1 / 3) for name in statistics}
    write_export(tmp_path / "full", ARCH, weights)
    path = str(tmp_path / "full")
    status, said, out = run_export(path, "orbax", "--config.export.dtype=float16")
    assert status == 0 and "largest difference after reading it back: 0" in said
    read, _ = checkpoint_weights.load_weights(out)
    assert {value.dtype for value in read.values()} == {np.dtype(np.float32)}
    for name, value in weights.items():
        rounded = value if name in statistics else value.astype(np.float16)
        np.testing.assert_array_equal(read[name], rounded, err_msg=name)
    status, said, _ = run_export(path, "stablehlo", "--config.export.dtype=float16", out="b")
    assert status == process.MISTAKE and "takes float32" in said
