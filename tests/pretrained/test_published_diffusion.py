# SPDX-License-Identifier: Apache-2.0
"""Published UViT, USiT and DiT: every kind of file, read and written bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
from goldens import make_diffusion
from safetensors.numpy import save_file

from dcae_jax import models
from dcae_jax.errors import UserError
from dcae_jax.models import dit, dit_torch, uvit, uvit_torch
from dcae_jax.models import weights as weights_lib
from dcae_jax.pretrained import published

SIZES = dict(latent_size=4, latent_channels=8, patch_size=2, num_classes=10)
UVIT = uvit.Architecture(depth=2, width=128, heads=4, out_channels=8, **SIZES)
DIT = dit.Architecture(depth=2, width=128, heads=4, out_channels=16, **SIZES)
BOTH = [(uvit, UVIT), (dit, DIT)]


def random_weights(module, arch):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32) for name, shape in module.shapes(arch).items()
    }


def contiguous(tensors):
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def write_folder(folder, module, arch, weights, model_name="", others=()):
    """A folder as the authors publish it."""
    folder.mkdir()
    tensors = contiguous(models.backbone_names(module).to_torch(weights, arch, "diffusion_model."))
    save_file({**tensors, **dict(others)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_name": model_name}))
    return folder


def same(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("module,arch", BOTH)
def test_weights_go_there_and_back_bit_for_bit(module, arch):
    """Catches a kernel transposed once too often, a layer of a stack lost, a rounding."""
    weights = random_weights(module, arch)
    names = models.backbone_names(module)
    tensors = names.to_torch(weights, arch, "diffusion_model.")
    assert all(name.startswith("diffusion_model.") for name in tensors)
    same(names.from_torch(tensors, arch, "diffusion_model."), weights)
    again = models.backbone_names(module).to_torch(
        models.backbone_names(module).from_torch(tensors, arch, "diffusion_model."), arch
    )
    same({f"diffusion_model.{name}": value for name, value in again.items()}, tensors)


def test_folders_of_the_hub_are_read(tmp_path):
    """Catches the autoencoder's tensors taken for the model's, and a misread size or objective."""
    weights = random_weights(uvit, UVIT)
    others = {"autoencoder.encoder.project_in.conv.weight": np.zeros((2, 3, 3, 3), np.float32)}
    folder = write_folder(
        tmp_path / "a", uvit, UVIT, weights, "dc-ae-f64c128-in-1.0-uvit-h-in-512px", others
    )
    found, saved = published.read_generator(str(folder))
    same(found, weights)
    model, diffusion = saved.model, saved.diffusion
    assert (diffusion.patch_size, diffusion.objective) == (2, "epsilon")
    assert diffusion.autoencoder == str(folder)
    assert (model.name, model.variant) == ("uvit", "tiny")
    assert (model.depth, model.width, model.heads) == (2, 0, 0)
    assert (model.latent_size, model.latent_channels, model.num_classes) == (4, 8, 10)

    name = "dc-ae-f32c32-in-1.0-usit-2b-in-512px"
    folder = write_folder(tmp_path / "b", uvit, UVIT, weights, name)
    saved = published.read_generator(str(folder))[1]
    assert saved.diffusion.objective == "flow"
    assert saved.diffusion.autoencoder == "mit-han-lab/dc-ae-f32c32-in-1.0"

    weights = random_weights(dit, DIT)
    name = "dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024"
    found, saved = published.read_generator(
        str(write_folder(tmp_path / "c", dit, DIT, weights, name))
    )
    same(found, weights)
    assert saved.model.name == "dit"
    assert saved.diffusion.objective == "learned_sigma"


@pytest.mark.parametrize(
    "model_name, objective",
    [
        ("dc-ae-f32c32-in-1.0-usit-2b-in-512px", "flow"),
        ("dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024", "epsilon"),
        ("dc-ae-f32c32-in-1.0", "epsilon"),
    ],
)
def test_a_file_has_the_objective_of_the_config_beside_it(model_name, objective, tmp_path):
    """Catches a USiT sampled as a UViT, which has its tensors, and the name of another model."""
    folder = write_folder(tmp_path / "a", uvit, UVIT, random_weights(uvit, UVIT), model_name)
    _, saved = published.read_generator(str(folder / "model.safetensors"))
    assert saved.diffusion.objective == objective
    known = "mit-han-lab/dc-ae-f32c32-in-1.0" if objective == "flow" else ""
    assert saved.diffusion.autoencoder == known


def test_settings_make_the_same_architecture_again(tmp_path):
    """Catches settings that build another model than the one whose weights were read."""
    for module, arch in BOTH:
        arch = dataclasses.replace(arch, depth=4, out_channels=16)
        weights = random_weights(module, arch)
        path = tmp_path / f"{module.__name__}.safetensors"
        save_file(contiguous(models.backbone_names(module).to_torch(weights, arch)), path)
        _, saved = published.read_generator(str(path))
        patch_size, objective = saved.diffusion.patch_size, saved.diffusion.objective
        again = module.architecture(
            saved.model, patch_size=patch_size, learn_sigma=objective == "learned_sigma"
        )
        assert again == arch


def test_names_of_the_first_uvit_are_read(tmp_path):
    """Catches the old name of the label table refused."""
    weights = random_weights(uvit, UVIT)
    tensors = contiguous(uvit_torch.to_torch(weights, UVIT))
    tensors["label_emb.weight"] = tensors.pop("label_emb.embedding_table.weight")
    save_file(tensors, tmp_path / "old.safetensors")
    found, saved = published.read_generator(str(tmp_path / "old.safetensors"))
    same(found, weights)
    assert saved.diffusion.autoencoder == ""


def test_half_precision_is_widened(tmp_path):
    """Catches float16 weights handed on, and DiT's rounded positions refused."""
    tensors = dit_torch.to_torch(random_weights(dit, DIT), DIT)
    halves = {name: np.ascontiguousarray(v.astype(np.float16)) for name, v in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    found, _ = published.read_generator(str(tmp_path / "half.safetensors"))
    rounded = {name: value.astype(np.float32) for name, value in halves.items()}
    same(found, dit_torch.from_torch(rounded, DIT))


def test_positions_of_dit_may_be_left_out_but_not_differ():
    """Catches learned or resized positions dropped without a word."""
    weights = random_weights(dit, DIT)
    tensors = dit_torch.to_torch(weights, DIT)
    changed = {**tensors, "pos_embed": tensors["pos_embed"][:, ::-1]}
    with pytest.raises(UserError, match="pos_embed .* sin-cos"):
        dit_torch.from_torch(changed, DIT)
    del tensors["pos_embed"]
    same(dit_torch.from_torch(tensors, DIT), weights)
    assert dit_torch.recognise(tensors, 0) == dataclasses.replace(DIT, latent_size=0)


def test_a_width_of_no_variant_needs_to_be_told_the_heads(tmp_path):
    """Catches heads guessed: the numbers would be wrong, and nothing would say so."""
    arch = dataclasses.replace(UVIT, width=64, heads=8)
    weights = random_weights(uvit, arch)
    path = str(tmp_path / "odd.safetensors")
    save_file(contiguous(uvit_torch.to_torch(weights, arch)), path)
    with pytest.raises(UserError, match="no variant has width 64.* tiny, s, h, 2b"):
        published.read_generator(path)
    found, saved = published.read_generator(path, "s")
    same(found, weights)
    model = saved.model
    assert (model.variant, model.depth, model.width, model.heads) == ("s", 2, 64, 0)


@pytest.mark.parametrize(
    "variant,words", [("s", "512 channels, but these weights have 128"), ("xl", "tiny, s, h, 2b")]
)
def test_a_variant_of_another_width_is_refused(tmp_path, variant, words):
    """Catches a wrong variant believed."""
    path = str(tmp_path / "model.safetensors")
    save_file(contiguous(uvit_torch.to_torch(random_weights(uvit, UVIT), UVIT)), path)
    with pytest.raises(UserError, match=words) as caught:
        published.read_generator(path, variant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module,arch", BOTH)
def test_damaged_files_are_refused_with_the_first_names(tmp_path, module, arch):
    """Catches a block that keeps its random weights since its tensors are not there."""
    tensors = contiguous(models.backbone_names(module).to_torch(random_weights(module, arch), arch))
    missing = next(name for name in tensors if name.endswith("attn.proj.bias"))
    grown = next(name for name in tensors if name.endswith("mlp.fc1.weight"))
    cases = {
        f"1 missing \\({missing}\\)": {k: v for k, v in tensors.items() if k != missing},
        "1 unexpected \\(final_layer.extra\\)": {**tensors, "final_layer.extra": np.ones(3)},
        f"1 misshapen \\({grown} is ": {**tensors, grown: np.ones((3, 3), np.float32)},
        f"{grown} has dtype int8": {**tensors, grown: tensors[grown].astype(np.int8)},
    }
    for number, (words, broken) in enumerate(cases.items()):
        path = str(tmp_path / f"{number}.safetensors")
        save_file(broken, path)
        with pytest.raises(UserError, match=words) as caught:
            published.read_generator(path)
        assert "\n" not in str(caught.value)


def test_other_models_are_refused(tmp_path):
    """Catches an autoencoder's file that ends in a KeyError."""
    path = str(tmp_path / "other.safetensors")
    save_file({"encoder.conv_in.weight": np.ones((4, 3, 3, 3), np.float32)}, path)
    with pytest.raises(UserError, match="neither a UViT nor a DiT"):
        published.read_generator(path)


# --- with PyTorch ---------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("model", list(make_diffusion.MODELS))
def test_pytorch_takes_our_names_and_gives_the_golden_numbers(model):
    """Catches a name PyTorch does not have, and golden numbers that PyTorch no longer gives."""
    torch = pytest.importorskip("torch")
    sizes, backbone = make_diffusion.MODELS[model], model.split("-")[0]
    module = {"uvit": uvit, "dit": dit}[backbone]
    arch = module.Architecture(**sizes)
    net = make_diffusion.network(sizes, backbone)
    tensors = models.backbone_names(module).to_torch(
        models.backbone_names(module).from_torch(make_diffusion.weights(model), arch), arch
    )
    net.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, strict=True)
    y = make_diffusion.run(net, *make_diffusion.inputs(model))
    want = make_diffusion.output(model)
    assert np.abs(y - want).max() <= 1e-4 * want.std()


@pytest.mark.torch
@pytest.mark.parametrize("backbone", ["uvit", "dit"])
def test_trainers_files_are_read(tmp_path, backbone):
    """Catches raw weights taken where there are averaged ones, and averages keyed by a float."""
    torch = pytest.importorskip("torch")
    module, arch = {"uvit": (uvit, UVIT), "dit": (dit, DIT)}[backbone]
    weights = random_weights(module, arch)
    tensors = models.backbone_names(module).to_torch(weights, arch, f"{backbone}.")
    tensors = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    other = {name: value + 1 for name, value in tensors.items() if name != f"{backbone}.pos_embed"}
    other[f"{backbone}.pos_embed"] = tensors[f"{backbone}.pos_embed"]
    files = {
        "both": {"ema": {0.999: other, 0.9999: tensors}, "state_dict": other, "step": 7},
        "raw": {"state_dict": tensors, "step": 7},
        "flat": {"ema": {k.removeprefix(f"{backbone}."): v for k, v in tensors.items()}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        same(published.read_generator(str(tmp_path / f"{name}.pt"))[0], weights)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("module,variant", [(uvit, "s"), (dit, "b")])
def test_full_size_models_give_the_same_numbers(module, variant):
    """Catches an error that grows with depth and width until float32 no longer hides it."""
    torch = pytest.importorskip("torch")
    import jax

    row = dataclasses.asdict(module.VARIANTS[variant])
    sizes = dict(latent_size=16, latent_channels=32, patch_size=1, num_classes=1000)
    arch = module.Architecture(**row, **sizes, out_channels=64)
    torch.manual_seed(0)
    net = make_diffusion.network(dataclasses.asdict(arch), module.__name__.rpartition(".")[2])
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    weights = models.backbone_names(module).from_torch(tensors, arch)
    graph, _, _ = weights_lib.split(
        weights_lib.abstract(lambda rngs: module.create(arch, dtype="float32", rngs=rngs))
    )
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 32), np.float32)
    inputs = (x, np.array([999.0, 30.5], np.float32), np.array([1000, 7], np.int32))
    want = make_diffusion.run(net, *inputs)
    y = np.asarray(jax.jit(lambda w, *args: weights_lib.merge(graph, w)(*args))(weights, *inputs))
    error = np.abs(y - want) / want.std()
    assert error.max() <= 1e-3 and error.mean() <= 1e-4
