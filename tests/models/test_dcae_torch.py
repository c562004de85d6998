# SPDX-License-Identifier: Apache-2.0
"""DC-AE against diffusers' AutoencoderDC and the authors' names: numbers, names."""

import dataclasses
import functools
import hashlib
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from goldens import make_dcae
from support import parity
from support.parity import close

from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch
from dcae_jax.models.weights import abstract, split

# The first 40 digits of the SHA-256 of the sorted lines "name shape" of the state dicts that
# diffusers' AutoencoderDC and the authors' own class (DC-Gen, run once with PyTorch) have for each
# published model, the counters of BatchNorm left out.
DIFFUSERS_NAMES = {
    "f32c32": "3ec565c1ba4f739aa1617509f7cb038ff71fe6d4",
    "f64c128": "a2c62fec33235e184281c1144209ac9aab5a133c",
    "f128c512": "7d84c6c40a6c4238eabafadb408ad0155c7798a8",
    "f32c32-sana": "cd6b2ac19c7e36751ba0274cc8e6e5c53432bb9a",
    "f32c32-lite": "46f0cf2c10eb3d9cfc0143a499d4b7701d059cf2",
    "1.5-f32c128": "c37f5e333a9dcbd11772c5c583b2729191e39964",
    "1.5-f64c128": "e122a1d3b1ccdf2df38f71888203045560ec2161",
}
AUTHORS_NAMES = {
    "f32c32": "82fba6105a16138aa209e9e3242fc512495e4994",
    "f64c128": "b44cf68fbf21dfb7e975ecde2738bf32afbc3543",
    "f128c512": "4194eea94da941544bd530b759227cedb765ea1f",
    "f32c32-sana": "bd97d86f802bca026e5d4ad206de2b6753eed80b",
    "f32c32-lite": "1b6d1786b128f28ecef22883327f8b8671ad70aa",
    "1.5-f32c128": "766787ecc21d24cfa5722f7608bab50df122f519",
    "1.5-f64c128": "af975e83bb21d5ebb6812119462d12ea926188f2",
}

LAYOUTS = tuple(make_dcae.DCAE)


def small(layout):
    """The architecture of a reduced layout."""
    return dcae_torch.variant_of(make_dcae.DCAE[layout], "diffusers")


@functools.cache
def runner(arch, depthwise="shifted", quick=True):
    """A compiled function: (weights, x [B, H, W, 3]) -> (latents, images made of them)."""
    model = abstract(
        lambda rngs: dcae.DCAE(arch, depthwise=depthwise, dtype=jnp.float32, rngs=rngs)
    )
    return parity.round_trip(split(model)[0], quick)


@functools.cache
def shapes(arch):
    model = abstract(
        lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=jnp.float32, rngs=rngs)
    )
    _, params, stats = split(model)
    return {name: tuple(leaf.shape) for name, leaf in {**params, **stats}.items()}


def random_weights(arch):
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in shapes(arch).items()}


def hollow(arch, form):
    """Tensors of the right names and shapes that take no memory."""
    ours = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes(arch).items()}
    return dcae_torch.to_torch(ours, arch, form)


def digest(tensors):
    lines = sorted(
        f"{name} {tuple(t.shape)}"
        for name, t in tensors.items()
        if not name.endswith("num_batches_tracked")
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", make_dcae.SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_and_images_equal_those_of_diffusers(layout, shape):
    """Catches any slip in any block: padding, channel order, gate halves, eps, a swapped norm.

    The golden weights leave no norm trivial, running statistics included. Square pictures take
    the grouped form of the depthwise convolution, the others the shifted one.
    """
    arch = small(layout)
    weights = dcae_torch.from_torch(make_dcae.weights(layout), arch, "diffusers")
    run = runner(arch, "grouped" if shape[0] == shape[1] else "shifted")
    z, y = run(weights, make_dcae.picture(layout, shape))
    want_z, want_y = make_dcae.outputs(layout, shape)
    assert z.shape == want_z.shape and y.shape == want_y.shape
    assert close(z, want_z)
    assert close(y, want_y)


# --- weights there and back -----------------------------------------------------------------------


@pytest.mark.parametrize("form", dcae_torch.FORMATS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "tiny"])
def test_weights_travel_there_and_back_bit_for_bit(layout, form):
    """Catches a tensor that is transposed on one way only, dropped, or rounded."""
    arch = dcae.VARIANTS["tiny"] if layout == "tiny" else small(layout)
    weights = random_weights(arch)
    back = dcae_torch.from_torch(dcae_torch.to_torch(weights, arch, form), arch, form)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("form, digests", [("diffusers", 0), ("authors", 1)])
@pytest.mark.parametrize("variant", DIFFUSERS_NAMES)
def test_names_and_shapes_are_those_of_the_published_files(variant, form, digests):
    """Catches a wrong name in a published model of any size, which no reduced layout has."""
    want = (DIFFUSERS_NAMES, AUTHORS_NAMES)[digests][variant]
    assert digest(hollow(dcae.VARIANTS[variant], form)) == want


def test_the_two_formats_hold_the_same_numbers():
    """Catches to_q, to_k, to_v cut from the qkv channels head by head instead of in thirds."""
    arch = small("sana")
    weights = random_weights(arch)
    a, b = (dcae_torch.to_torch(weights, arch, form) for form in dcae_torch.FORMATS)
    qkv = b["encoder.stages.2.op_list.0.context_module.main.qkv.conv.weight"]
    assert qkv.shape == (96, 32, 1, 1)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        third = a[f"encoder.down_blocks.2.0.attn.{name}.weight"]
        np.testing.assert_array_equal(third, qkv[32 * i : 32 * (i + 1), :, 0, 0])
    # Grouped: the first group's outputs see the first group's inputs.
    grouped = b["encoder.stages.2.op_list.0.context_module.main.aggreg.0.1.weight"]
    ours = weights["encoder.stages.2.0.context_module.aggreg_point.kernel"]
    assert grouped[33, 5, 0, 0] == ours[1, 5, 1]


def test_reading_takes_views_of_the_tensors():
    """Catches a copy of every tensor, which doubles the memory that loading a model takes."""
    arch = small("in")
    tensors = make_dcae.weights("in")
    weights = dcae_torch.from_torch(tensors, arch, "diffusers")
    copied = [
        name
        for name, value in weights.items()
        if not any(np.shares_memory(value, tensor) for tensor in tensors.values())
    ]
    assert copied and all(name.endswith("qkv.kernel") for name in copied)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32(dtype):
    """Catches weights that stay in bfloat16, or bfloat16 refused since NumPy does not know it."""
    arch = small("1.5")
    tensors = {
        name: value.astype(dtype) if value.dtype == np.float32 else value
        for name, value in make_dcae.weights("1.5").items()
    }
    weights = dcae_torch.from_torch(tensors, arch, "diffusers")
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    name = "encoder.stages.1.0.conv1.bias"
    np.testing.assert_array_equal(
        weights[name],
        tensors["encoder.down_blocks.1.0.conv1.bias"].astype(np.float32),
    )


# --- weights that do not fit ----------------------------------------------------------------------


def refusal(tensors, arch, form="diffusers"):
    with pytest.raises(UserError) as caught:
        dcae_torch.from_torch(tensors, arch, form)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("form", dcae_torch.FORMATS)
def test_weights_of_another_variant_are_called_by_their_name(form):
    """Catches an error that lists hundreds of names, or none, and not the reason."""
    sana = hollow(dcae.VARIANTS["f32c32-sana"], form)
    message = refusal(sana, dcae.VARIANTS["f32c32"], form)
    assert "these are f32c32-sana weights" in message
    assert "missing (" in message and "unexpected (" in message


def test_an_incomplete_file_is_called_so():
    """Catches a model that is half loaded when a tensor is missing, unknown or misshapen."""
    arch = small("in")
    tensors = make_dcae.weights("in")
    del tensors["encoder.conv_out.weight"]
    tensors["encoder.extra"] = np.zeros(3, np.float32)
    tensors["decoder.conv_in.bias"] = np.zeros(3, np.float32)
    message = refusal(tensors, arch)
    assert "1 missing (encoder.conv_out.weight)" in message
    assert "1 unexpected (encoder.extra)" in message
    assert "1 misshapen (decoder.conv_in.bias is (3,) instead of (64,))" in message
    assert "incomplete or damaged" in message


def test_other_reasons_for_a_misfit_are_named():
    """Catches one reason for all misfits, which sends the user the wrong way."""
    f32 = dcae.VARIANTS["f32c32"]
    assert "authors format" in refusal(hollow(f32, "authors"), f32)
    assert "diffusers format" in refusal(hollow(f32, "diffusers"), f32, "authors")
    kl = {"encoder.down_blocks.0.resnets.0.conv1.weight": np.zeros(3)}
    assert "sd-vae-f8" in refusal(kl, f32)
    assert "this package's own" in refusal({"encoder.project_out.kernel": np.zeros(3)}, f32)
    assert "not DC-AE weights" in refusal({"features.0.weight": np.zeros(3)}, f32)
    wider = dataclasses.replace(f32, widths=(64, 64, 64, 64, 64, 64))
    assert "match no known variant" in refusal(hollow(wider, "diffusers"), f32)
    more = hollow(dataclasses.replace(f32, decoder_depths=(0, 5, 11, 2, 2, 2)), "diffusers")
    assert "closest to f32c32" in refusal(more, dcae.VARIANTS["f32c32-sana"])


def test_integers_are_refused():
    """Catches quantised weights that are cast to floats without their scales."""
    tensors = make_dcae.weights("1.5")
    tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"].astype(np.int8)
    assert "encoder.conv_out.weight has dtype int8" in refusal(tensors, small("1.5"))


def test_models_that_a_format_cannot_express_are_refused():
    """Catches an export that reads back as another model."""
    tiny = dcae.VARIANTS["tiny"]
    ablation = dataclasses.replace(tiny, residual=False)
    mixed = dataclasses.replace(tiny, decoder_norms=("bn2d",) * 5)
    for form in dcae_torch.FORMATS:
        for call in (
            lambda f: dcae_torch.to_torch({}, ablation, f),
            lambda f: dcae_torch.config_of(ablation, f),
        ):
            with pytest.raises(UserError, match="cannot express residual=False"):
                call(form)
    with pytest.raises(UserError, match="decoder stage 3"):
        dcae_torch.config_of(mixed, "diffusers")
    with pytest.raises(UserError, match="published name"):
        dcae_torch.config_of(tiny, "authors")
    with pytest.raises(UserError, match="another model"):
        dcae_torch.to_torch(random_weights(small("in")), tiny, "diffusers")
    with pytest.raises(UserError, match="export.format='onnx'"):
        dcae_torch.to_torch({}, tiny, "onnx")


# --- beside PyTorch -------------------------------------------------------------------------------


def channels_first(x):
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def theirs(network, x):
    """(latents, images) NHWC of diffusers' network."""
    import torch

    with torch.no_grad():
        z = network.encode(channels_first(x)).latent
        y = network.decode(z).sample
    return z.permute(0, 2, 3, 1).numpy(), y.permute(0, 2, 3, 1).numpy()


def torch_network(config, seed=0):
    """diffusers' network with its own random weights and, as after training, statistics."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    network = diffusers.AutoencoderDC.from_config(config).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3)
    return network


def compare(network, arch, sizes, quick=True):
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    weights = dcae_torch.from_torch(tensors, arch, "diffusers")
    rng = np.random.default_rng(1)
    for height, width in sizes:
        x = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
        want_z, want_y = theirs(network, x)
        z, y = runner(arch, quick=quick)(weights, x)
        assert close(z, want_z), (height, width)
        assert close(y, want_y), (height, width)


@pytest.mark.torch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_weights_of_diffusers_give_the_same_numbers(layout):
    """Catches golden files that no longer say what diffusers does; latents of 7x7 and 1x9."""
    config = make_dcae.DCAE[layout]
    compare(torch_network(config), small(layout), [(56, 56), (8, 72)])


@pytest.mark.torch
@pytest.mark.parametrize("channels", [16, 96])
def test_a_cut_model_gives_the_numbers_of_diffusers_with_as_many_channels(channels):
    """Catches a cut that only agrees with our own mask: diffusers' network has `channels` outputs
    and inputs, and takes slices of the whole network's kernels."""
    torch = pytest.importorskip("torch")
    config = {**make_dcae.DCAE["1.5"], "latent_channels": 128}
    network = torch_network(config)
    arch = dcae_torch.variant_of(config, "diffusers")
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    weights = dcae_torch.from_torch(tensors, arch, "diffusers")
    narrow = torch_network({**config, "latent_channels": channels}, seed=1)
    cut = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        cut[name] = cut[name][:channels]
    cut["decoder.conv_in.weight"] = cut["decoder.conv_in.weight"][:, :channels]
    narrow.load_state_dict(cut)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    want_z, want_y = theirs(narrow, x)
    small_arch = dataclasses.replace(arch, latent_channels=channels)
    z, y = runner(small_arch)(dcae.cut(weights, channels), x)
    assert close(z, want_z) and close(y, want_y)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["f32c32", "f32c32-sana", "tiny-lite"])
def test_full_size_models_give_the_same_numbers(name):
    """Catches an error that grows with depth and width until float32 no longer hides it, and a
    decoder that is narrower than its encoder in one of the two alone."""
    arch = dcae.VARIANTS[name]
    config = dcae_torch.config_of(arch, "diffusers")
    compare(torch_network(config), arch, [(128, 128), (96, 160)], quick=False)


@pytest.mark.torch
def test_diffusers_opens_what_we_write(tmp_path):
    """Catches a configuration or a tensor that from_pretrained does not take as it is."""
    diffusers = pytest.importorskip("diffusers")
    from safetensors.numpy import save_file

    for layout in LAYOUTS:
        arch = small(layout)
        weights = random_weights(arch)
        weights = {k: v + 0.5 if k.endswith("var") else v - 0.5 for k, v in weights.items()}
        folder = tmp_path / layout
        folder.mkdir()
        config = dcae_torch.config_of(arch, "diffusers")
        (folder / "config.json").write_text(json.dumps(config))
        tensors = dcae_torch.to_torch(weights, arch, "diffusers")
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        network, report = diffusers.AutoencoderDC.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        x = make_dcae.picture(layout, (4, 6))
        want_z, want_y = theirs(network.eval(), x)
        z, y = runner(arch)(weights, x)
        assert close(z, want_z) and close(y, want_y)


@pytest.mark.torch
@pytest.mark.parametrize("variant", DIFFUSERS_NAMES)
def test_golden_names_are_those_of_diffusers(variant):
    """Catches golden digests of our own names instead of diffusers'."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = dcae_torch.config_of(dcae.VARIANTS[variant], "diffusers")
    with torch.device("meta"):
        network = diffusers.AutoencoderDC.from_config(config)
    assert digest(network.state_dict()) == DIFFUSERS_NAMES[variant]


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["in", "sana"])
def test_diffusers_reads_the_authors_names_as_we_do(layout):
    """Catches a name of the authors' that we give to another layer: their reader is the judge."""
    pytest.importorskip("torch")
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    import torch

    arch = small(layout)
    weights = random_weights(arch)
    authors = dcae_torch.to_torch(weights, arch, "authors")
    authors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in authors.items()}
    read = single_file.convert_autoencoder_dc_checkpoint_to_diffusers(authors)
    want = dcae_torch.to_torch(weights, arch, "diffusers")
    assert read.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(read[name].numpy(), tensor)
