# SPDX-License-Identifier: Apache-2.0
"""Published autoencoders, from every kind of path."""

import dataclasses
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.published_weights import KL, SMALL, hollow_file, random_weights, same, write_folder

import dcae_jax
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch, sdvae, sdvae_torch
from dcae_jax.models.weights import abstract, split
from dcae_jax.pretrained import hub
from dcae_jax.training import state as state_lib

# --- every kind of path ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "kl"])
def test_a_folder_of_diffusers_gives_weights_and_model(name, tmp_path, one_device):
    """Catches a scaling factor lost, a model built with other blocks, a tensor misplaced."""
    arch = KL if name == "kl" else SMALL[name]
    weights = random_weights(arch)
    write_folder(tmp_path / "hub", arch, weights)
    ae = dcae_jax.load_autoencoder(str(tmp_path / "hub"), mesh=one_device)
    same(weights, ae.weights)
    assert ae.architecture == arch
    assert ae.scaling_factor == arch.scaling_factor
    assert ae.model_config.name == ("sdvae" if name == "kl" else "dcae")
    # A pipeline has its autoencoder in a folder of its own.
    (tmp_path / "pipeline").mkdir()
    os.rename(tmp_path / "hub", tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    same(weights, checkpoint_weights.load_weights(str(tmp_path / "pipeline"))[0])


def test_stable_diffusions_posterior_is_sampled_by_seed(tmp_path, one_device):
    """Catches a seed that is ignored, and a sample where the mean was asked for."""
    write_folder(tmp_path / "hub", KL, random_weights(KL))
    ae = dcae_jax.load_autoencoder(str(tmp_path / "hub"), mesh=one_device)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mean, one, again, other = (
        np.asarray(ae.encode(x, **options))
        for options in (
            {},
            {"sample": True, "seed": 1},
            {"sample": True, "seed": 1},
            {"sample": True, "seed": 2},
        )
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - mean).max() > 0.1
    with pytest.raises(ValueError, match="is not supported with tiles"):
        ae.encode(x, sample=True, tile=1)
    tiny = dcae_jax.create_autoencoder("tiny", mesh=one_device)
    with pytest.raises(ValueError, match="deterministic encoder"):
        tiny.encode(x, sample=True)


def test_a_folder_of_the_authors_has_its_model_by_name(tmp_path):
    """Catches folders with the authors' names that are not recognised."""
    name = "dc-ae-f64c128-in-1.0"
    (tmp_path / "config.json").write_text(json.dumps({"model_name": name}))
    shapes = dcae_torch.shapes_in(dcae.variant(name), "authors")
    hollow_file(tmp_path / "model.safetensors", shapes)
    weights, saved = checkpoint_weights.load_weights(str(tmp_path))
    assert saved.model.variant == name
    assert sum(value.size for value in weights.values()) > 600e6


@pytest.mark.parametrize(
    "variant, given, scaling",
    [
        ("f32c32-sana", "", 0.41407),
        ("f32c32", "", None),
        ("f32c32", "dc-ae-f32c32-in-1.0", 0.3189),
        ("sd-vae-f8", "", 0.18215),
    ],
)
def test_a_bare_file_tells_its_variant_but_not_its_scaling_factor(
    variant, given, scaling, tmp_path
):
    """Catches a file that needs a config.json, and a scaling factor that was made up."""
    if variant == "sd-vae-f8":
        random = random_weights(sdvae.VARIANTS[variant])
        save_file(
            {
                k: np.ascontiguousarray(v)
                for k, v in sdvae_torch.to_torch(random, sdvae.Variant(), "diffusers").items()
            },
            tmp_path / "x.safetensors",
        )
    else:
        shapes = dcae_torch.shapes_in(dcae.VARIANTS[variant], "authors")
        hollow_file(tmp_path / "x.safetensors", shapes)
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "x.safetensors"), variant=given)
    module = sdvae if variant == "sd-vae-f8" else dcae
    assert saved.model.variant == (given or variant)
    assert module.architecture(saved.model).scaling_factor == scaling


def test_fine_tuned_weights_carry_their_own_scaling_factor(tmp_path):
    """Catches the factor of the variant in place of the one in config.json."""
    arch = dataclasses.replace(SMALL["dc-ae-f32c32-sana-1.1"], scaling_factor=0.7)
    write_folder(tmp_path / "hub", arch, random_weights(arch))
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert saved.model.scaling_factor == 0.7
    assert dcae.architecture(saved.model) == arch


def test_half_precision_and_shards_are_read(tmp_path):
    """Catches bfloat16 read as integers, and the first of several files taken for all."""
    arch = SMALL["dc-ae-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        half = {n: tensors[n].astype(ml_dtypes.bfloat16) for n in part}
        save_file(half, tmp_path / "hub" / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "hub" / f"{hub.DIFFUSERS_FILE}.index.json").write_text(json.dumps(index))
    read, _ = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    want = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}
    same(want, read)


def test_a_mistyped_local_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """Catches half a minute of retries, and a private name sent out, for a typing mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail(f"looked up {name}"))
    with pytest.raises(UserError, match="'runs/phase9': there is no such file or folder"):
        checkpoint_weights.load_weights("runs/phase9")


def test_training_starts_from_published_weights(small, one_device, tmp_path):
    """Catches init_from that reads only workdirs, or weights of the mapped file in the state."""
    arch = dcae.architecture(small.model)
    weights = random_weights(arch)
    write_folder(tmp_path / "hub", arch, weights)
    read, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"), "ema")
    assert saved.model.variant == "tiny"
    spec = state_lib.train_spec(small, one_device)
    start = state_lib.init_state(small, one_device, spec, read)
    same(weights, {**start.params, **start.stats})


@pytest.mark.torch
def test_a_pickle_of_weights_is_read_and_code_in_it_is_not_run(tmp_path):
    """Catches .pt files opened as any pickle, and a state dict nested as trainers nest it."""
    torch = pytest.importorskip("torch")
    arch = SMALL["dc-ae-lite-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    plain = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    for content in (plain, {"state_dict": plain}):
        torch.save(content, tmp_path / "hub" / "weights.pt")
        same(weights, checkpoint_weights.load_weights(str(tmp_path / "hub"))[0])

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Hostile()}, tmp_path / "hub" / "weights.pt")
    with pytest.raises(UserError, match="weights.pt is not a readable PyTorch file"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert not (tmp_path / "ran").exists()


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "authors"])
@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.1"])
def test_full_size_weights_travel_there_and_back_bit_for_bit(name, form, tmp_path):
    """Catches a square kernel turned one way only, and two tensors under one name, in the depths
    and widths that are published; both give no error, since all shapes are right."""
    arch = dcae.variant(name)
    module = abstract(
        lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=np.float32, rngs=rngs)
    )
    _, params, stats = split(module)
    rng = np.random.default_rng(0)
    weights = {
        path: rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in {**params, **stats}.items()
    }
    write_folder(tmp_path / "hub", arch, weights, form)
    read, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert saved.model.variant in (name, "f32c32", "f32c32-sana")
    same(weights, read)
    shutil.rmtree(tmp_path / "hub")  # 1.3 GB, which pytest would keep
