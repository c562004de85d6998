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


@pytest.mark.parametrize(
    "beside, variant, factor",
    [
        ({"model_name": "dc-ae-f32c32-mix-1.0"}, "", 0.4552),
        ({"model_name": "dc-ae-f32c32-mix-1.0"}, "f32c32", 0.4552),
        ({"model_name": "dc-ae-f32c32-mix-1.0"}, "dc-ae-f32c32-mix-1.0", 0.4552),
        ({"model_name": "dc-ae-f32c32-mix-1.0"}, "dc-ae-f32c32-in-1.0", "states 0.4552; leave"),
        ({"model_name": "my-model"}, "f32c32", None),
        ({"model_name": "my-model"}, "dc-ae-f32c32-in-1.0", 0.3189),
        ({"scaling_factor": 0.7}, "f32c32", 0.7),
        ({"scaling_factor": 0.7}, "dc-ae-f32c32-in-1.0", "states 0.7; leave"),
        ({"scaling_factor": 1.0}, "dc-ae-f32c32-in-1.0", 0.3189),
        ({"scaling_factor": "0.7"}, "f32c32", None),
    ],
)
def test_the_factor_beside_the_weights_goes_before_that_of_a_variant(
    beside, variant, factor, tmp_path, monkeypatch
):
    """Catches the factor lost, or replaced by that of other weights, where a variant is named."""
    small = dataclasses.replace(SMALL["dc-ae-f32c32-mix-1.0"], scaling_factor=None)
    monkeypatch.setitem(dcae.VARIANTS, "f32c32", small)
    form = "authors" if "model_name" in beside else "diffusers"
    write_folder(tmp_path / "hub", small, random_weights(small), form)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(beside))
    if isinstance(factor, str):
        with pytest.raises(UserError, match=factor):
            checkpoint_weights.load_weights(str(tmp_path / "hub"), variant=variant)
        return
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"), variant=variant)
    assert dcae.architecture(saved.model).scaling_factor == factor


def test_a_variant_with_a_factor_gives_way_to_the_folders_own(tmp_path, monkeypatch):
    """Catches fine-tuned weights that get the factor of the model they began as."""
    small = SMALL["dc-ae-f32c32-sana-1.1"]
    monkeypatch.setitem(dcae.VARIANTS, "f32c32-sana", small)
    arch = dataclasses.replace(small, scaling_factor=0.7)
    write_folder(tmp_path / "hub", arch, random_weights(arch))
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"), variant="f32c32-sana")
    assert dcae.architecture(saved.model) == arch


def _small_f32c32(tmp_path, monkeypatch, form):
    """The small f32c32 in its variant's place, as a folder -> the file of its weights."""
    small = dataclasses.replace(SMALL["dc-ae-f32c32-mix-1.0"], scaling_factor=None)
    monkeypatch.setitem(dcae.VARIANTS, "f32c32", small)
    write_folder(tmp_path / "hub", small, random_weights(small), form)
    file = hub.AUTHORS_FILE if form == "authors" else hub.DIFFUSERS_FILE
    return small, tmp_path / "hub" / file


@pytest.mark.parametrize(
    "variant, factor",
    [
        ("", 0.4552),
        ("f32c32", 0.4552),
        ("dc-ae-f32c32-mix-1.0", 0.4552),
        ("dc-ae-f32c32-in-1.0", "has the scaling factor 0.3189, but config.json beside .* 0.4552"),
    ],
)
@pytest.mark.parametrize("form", ["authors", "diffusers"])
def test_a_file_has_the_factor_of_the_config_beside_it(
    form, variant, factor, tmp_path, monkeypatch
):
    """Catches a factor that is lost, or replaced by a name's, where the file itself is named."""
    small, file = _small_f32c32(tmp_path, monkeypatch, form)
    config = dcae_torch.config_of(dataclasses.replace(small, scaling_factor=0.4552), form)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    if isinstance(factor, str):
        with pytest.raises(UserError, match=factor):
            checkpoint_weights.load_weights(str(file), variant=variant)
        return
    _, saved = checkpoint_weights.load_weights(str(file), variant=variant)
    assert dcae.architecture(saved.model).scaling_factor == factor


OTHERS = {
    "another variant": json.dumps({"model_name": "dc-ae-f64c128-in-1.0"}),
    "stable diffusion": json.dumps(sdvae_torch.config_of(KL, "diffusers")),
    "a text encoder": json.dumps({"architectures": ["CLIPTextModel"], "scaling_factor": 0.7}),
    "a run": json.dumps({"config": {"model": {"scaling_factor": 0.7}}, "scaling_factor": 0.7}),
    "a list": "[1, 2]",
    "no JSON": "{",
}


@pytest.mark.parametrize("variant", ["", "f32c32", "dc-ae-f32c32-in-1.0"])
@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_a_config_of_something_else_beside_a_file_is_left_alone(
    text, variant, tmp_path, monkeypatch, caplog
):
    """Catches another model's scaling factor, and a file that cannot be read for its neighbour."""
    _, file = _small_f32c32(tmp_path, monkeypatch, "authors")
    (tmp_path / "hub" / "config.json").write_text(text)
    _, saved = checkpoint_weights.load_weights(str(file), variant=variant)
    factor = 0.3189 if variant.startswith("dc") else None
    assert dcae.architecture(saved.model).scaling_factor == factor
    assert f"{file}: read without the config.json beside it" in caplog.text


def test_a_file_of_no_variant_is_what_the_config_beside_it_describes(tmp_path):
    """Catches a fine-tuned model of other sizes that is found in its folder alone."""
    arch = dataclasses.replace(SMALL["dc-ae-f32c32-sana-1.1"], scaling_factor=0.7)
    write_folder(tmp_path / "hub", arch, random_weights(arch))
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "hub" / hub.DIFFUSERS_FILE))
    assert dcae.architecture(saved.model) == arch


def test_a_variant_that_the_config_contradicts_is_refused(tmp_path, monkeypatch):
    """Catches weights of a model without shortcuts at the latent that get them from a variant."""
    small, _ = _small_f32c32(tmp_path, monkeypatch, "diffusers")
    config = dcae_torch.config_of(small, "diffusers")
    config |= {"encoder_out_shortcut": False, "decoder_in_shortcut": False}
    monkeypatch.setitem(dcae.VARIANTS, "plain", dataclasses.replace(small, latent_shortcuts=False))
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'f32c32' is another model than .* config.json .* plain;"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"), variant="f32c32")
    checkpoint_weights.load_weights(str(tmp_path / "hub"), variant="plain")


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


@pytest.mark.parametrize("stem", [hub.DIFFUSERS_FILE, hub.AUTHORS_FILE])
@pytest.mark.parametrize("naming", ["{}.index.fp16.json", "{stem}.fp16.safetensors.index.json"])
def test_full_precision_goes_before_half(stem, naming, tmp_path, caplog):
    """Catches half precision that is not found alone, and that wins unsaid beside the full one."""
    caplog.set_level("INFO")
    arch = SMALL["dc-ae-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    halves = {n: v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}
    bare = stem.removesuffix(".safetensors")

    def write(index, file, content):
        save_file(content, tmp_path / "hub" / file)
        index = tmp_path / "hub" / index
        index.write_text(json.dumps({"weight_map": dict.fromkeys(content, file)}))

    write(naming.format(stem, stem=bare), f"{bare}.fp16-00001-of-00001.safetensors", halves)
    read, _ = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    same({k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}, read)
    assert "read the half-precision weights" in caplog.text
    caplog.clear()
    write(f"{stem}.index.json", f"{bare}-00001-of-00001.safetensors", tensors)
    same(weights, checkpoint_weights.load_weights(str(tmp_path / "hub"))[0])
    assert "read the full-precision weights, not the half ones" in caplog.text


@pytest.mark.parametrize("kind", ["dcae", "sdvae"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema."])
def test_what_wrappers_put_before_names_is_removed(prefix, kind, tmp_path, caplog):
    """Catches a DistributedDataParallel's or a compiled model's weights refused as another's."""
    caplog.set_level("INFO")
    arch = KL if kind == "sdvae" else SMALL["dc-ae-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    wrapped = {prefix + name: value for name, value in tensors.items()}
    if prefix == "ema.":
        wrapped |= {f"model.{name}": value + 1 for name, value in tensors.items()}
    save_file(wrapped, tmp_path / "hub" / hub.DIFFUSERS_FILE)
    same(weights, checkpoint_weights.load_weights(str(tmp_path / "hub"))[0])
    said = prefix.replace("_orig_mod.", "")
    assert not said or f"read the tensors named {said}*" in caplog.text


def test_an_unknown_prefix_is_called_one(tmp_path):
    """Catches Stable Diffusion's weights called Flux's for the names before them."""
    tensors = write_folder(tmp_path / "hub", KL, random_weights(KL))
    strange = {f"my_vae.{name}": value for name, value in tensors.items()}
    save_file(strange, tmp_path / "hub" / hub.DIFFUSERS_FILE)
    with pytest.raises(UserError, match="the names begin with 'my_vae.'; write them without it"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))


def test_quantised_tensors_are_refused_by_name(tmp_path):
    """Catches a traceback, or codes of quantised weights taken for their values."""
    arch = SMALL["dc-ae-f32c32-sana-1.1"]
    tensors = write_folder(tmp_path / "hub", arch, random_weights(arch))
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].astype(np.int8)
    save_file(tensors, tmp_path / "hub" / hub.DIFFUSERS_FILE)
    with pytest.raises(UserError, match="conv_in.bias has dtype int8; convert quantised weights"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))


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
    wrong = {name: value + 1 for name, value in plain.items()}
    for content in (
        plain,
        {"state_dict": plain},
        {"model": plain, "optimizer": {}, "epoch": 3},
        {"params": wrong, "params_ema": {f"module.{name}": v for name, v in plain.items()}},
        {"model": wrong, "ema": {"module": plain}},
        {name: torch.nn.Parameter(value) for name, value in plain.items()},
    ):
        torch.save(content, tmp_path / "hub" / "weights.pt")
        same(weights, checkpoint_weights.load_weights(str(tmp_path / "hub"))[0])
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = next(iter(plain))
        torch.save({**plain, name: plain[name].to(kind)}, tmp_path / "hub" / "weights.pt")
        with pytest.raises(UserError, match=f"{name} has dtype float8_e.*quantised weights"):
            checkpoint_weights.load_weights(str(tmp_path / "hub"))
    itself = {}
    itself["model"] = itself
    torch.save(itself, tmp_path / "hub" / "weights.pt")
    with pytest.raises(UserError, match="is not a state dict"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))

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
    _, params, stats = split(
        abstract(lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=np.float32, rngs=rngs))
    )
    rng, leaves = np.random.default_rng(0), {**params, **stats}
    weights = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in leaves.items()}
    write_folder(tmp_path / "hub", arch, weights, form)
    read, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert saved.model.variant in (name, "f32c32", "f32c32-sana")
    same(weights, read)
    shutil.rmtree(tmp_path / "hub")  # 1.3 GB, which pytest would keep
