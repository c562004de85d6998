# SPDX-License-Identifier: Apache-2.0
"""The converter between our layouts and PyTorch's, and the lookup of model files."""

import types

import numpy as np
import pytest

from dcae_jax import models
from dcae_jax.config import default
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dit, sdvae, torch_layout, uvit
from dcae_jax.models.torch_layout import Layer

TABLE = {
    "conv": Layer(("conv",)),
    "grouped": Layer(("grouped",)),
    "norm": Layer(("norm",)),
    "qkv": Layer(("q", "k", "v"), linear=True),
    "labels": Layer(("labels.table",)),
    "pos_embed": Layer(("pos_embed",)),
    "blocks.*.fc": Layer(("blocks.{}.fc",), linear=True),
}
SHAPES = {
    "conv.kernel": (3, 2, 4, 5),
    "grouped.kernel": (2, 3, 4),
    "norm.scale": (5,),
    "norm.mean": (5,),
    "qkv.kernel": (5, 9),
    "labels.embedding": (7, 4),
    "pos_embed": (6, 4),
    "blocks.*.fc.kernel": (3, 2, 4),
    "blocks.*.fc.bias": (3, 4),
}
THERE = {
    "conv.weight": (5, 4, 3, 2),
    "grouped.weight": (8, 3, 1, 1),
    "norm.weight": (5,),
    "norm.running_mean": (5,),
    "q.weight": (3, 5),
    "k.weight": (3, 5),
    "v.weight": (3, 5),
    "labels.table.weight": (7, 4),
    "pos_embed": (1, 6, 4),
    **{f"blocks.{i}.fc.weight": (4, 2) for i in range(3)},
    **{f"blocks.{i}.fc.bias": (4,) for i in range(3)},
}


def random_weights():
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}


def test_every_kind_of_layer_goes_there_and_back():
    """Catches a kernel transposed one way only, a block of a stack lost, the layer of a stack
    taken for another's, a table of labels that is turned as if it were a kernel."""
    weights = random_weights()
    tensors = torch_layout.to_torch(weights, TABLE, SHAPES)
    counter = tensors.pop("norm.num_batches_tracked")
    assert counter.dtype == np.int64 and counter == 0
    assert {name: value.shape for name, value in tensors.items()} == THERE
    assert torch_layout.shapes_there(SHAPES, TABLE) == THERE
    np.testing.assert_array_equal(tensors["conv.weight"][1, 2], weights["conv.kernel"][:, :, 2, 1])
    np.testing.assert_array_equal(tensors["k.weight"], weights["qkv.kernel"][:, 3:6].T)
    np.testing.assert_array_equal(
        tensors["grouped.weight"][5, 2], weights["grouped.kernel"][1, 2, 1]
    )
    np.testing.assert_array_equal(tensors["blocks.1.fc.weight"], weights["blocks.*.fc.kernel"][1].T)
    back = torch_layout.from_torch(tensors, TABLE, SHAPES, lambda found: "")
    assert list(back) == list(SHAPES)
    for path, value in weights.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_a_1x1_convolution_keeps_its_two_axes():
    """Catches a matrix where PyTorch has a convolution, or the other way round."""
    for linear, there in ((True, (4, 2)), (False, (4, 2, 1, 1))):
        table = {"a": Layer(("b",), linear=linear)}
        assert torch_layout.shapes_there({"a.kernel": (2, 4)}, table) == {"b.weight": there}


def test_names_split_evenly():
    """Catches shapes given whole to layers that each hold a third of the channels."""
    table = {"a": Layer(("q", "k", "v"), linear=True)}
    assert torch_layout.shapes_there({"a.kernel": (5, 9)}, table) == {
        f"{name}.weight": (3, 5) for name in "qkv"
    }


def test_what_does_not_fit_is_counted_and_named():
    """Catches a model half loaded, and a cause that never sees what was found."""
    tensors = torch_layout.to_torch(random_weights(), TABLE, SHAPES)
    del tensors["blocks.2.fc.bias"]
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["norm.weight"] = tensors["norm.weight"][:4]
    with pytest.raises(UserError) as caught:
        torch_layout.from_torch(tensors, TABLE, SHAPES, lambda found: f"{len(found)} tensors")
    assert str(caught.value) == (
        "1 missing (blocks.2.fc.bias), 1 unexpected (extra), 1 misshapen (norm.weight is (4,) "
        "instead of (5,)): 15 tensors"
    )
    weights = {**random_weights(), "norm.scale": np.zeros(4, np.float32)}
    with pytest.raises(UserError, match="of another model: 1 misshapen"):
        torch_layout.to_torch(weights, TABLE, SHAPES)


# --- the files of models --------------------------------------------------------------------------


def test_a_variant_is_built_by_the_file_that_has_it():
    """Catches a Stable Diffusion VAE, named by its variant alone, looked for among the DC-AEs."""
    model = default().model
    assert models.find(model) is dcae
    model.variant = "sd-vae-f8"
    assert models.find(model) is sdvae
    model.variant = "dc-ae-f64c128-in-1.0"
    assert models.find(model) is dcae
    model.name = "uvit"
    assert models.find(model) is uvit


def test_each_model_offers_what_the_protocols_list():
    """Catches a model that training knows and that no published weights or exports are found for,
    and a file of layers taken for a model."""
    assert models.autoencoders() == [dcae, sdvae] and models.backbones() == [dit, uvit]
    wanted = {
        "AutoencoderModule": models.autoencoders(),
        "BackboneModule": models.backbones(),
        "AutoencoderNames": [models.autoencoder_names(m) for m in models.autoencoders()],
        "BackboneNames": [models.backbone_names(m) for m in models.backbones()],
    }
    from dcae_jax.models import protocol

    for name, found in wanted.items():
        kind = getattr(protocol, name)
        members = {*kind.__annotations__, *(k for k in vars(kind) if not k.startswith("_"))}
        assert len(members) > 4
        for module in found:
            lacks = {member for member in members if not hasattr(module, member)}
            assert not lacks, (module.__name__, lacks)


def test_a_model_without_foreign_names_says_so():
    """Catches an ImportError, as a traceback, for a backbone that only this package has."""
    mine = types.ModuleType("dcae_jax.models.mine")
    assert not models.has_names(mine)
    with pytest.raises(UserError, match="model.name='mine' has no mine_torch.py"):
        models.backbone_names(mine)
