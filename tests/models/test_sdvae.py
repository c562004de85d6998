# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Stable Diffusion against diffusers' AutoencoderKL."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import make_dcae
from support import parity
from support.parity import close

from dcae_jax.config import default
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch, sdvae, sdvae_torch
from dcae_jax.models.layers import Layers
from dcae_jax.models.weights import abstract, merge, num_parameters, split


def small():
    """The architecture of the golden model."""
    return sdvae_torch.variant_of(make_dcae.KL["sd"], "diffusers")


def graph_of(arch):
    return split(shapes_of(arch))[0]


def shapes_of(arch, dtype=jnp.float32):
    """The model with shapes in place of arrays."""
    return abstract(lambda rngs: sdvae.SDVAE(arch, dtype=dtype, rngs=rngs))


@functools.cache
def runner(arch, quick=True):
    """A compiled function: (weights, x [B, H, W, 3]) -> (latents, images made of them)."""
    return parity.round_trip(graph_of(arch), quick)


def random_weights(arch):
    _, params, _ = split(sdvae.SDVAE(arch, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if name.endswith("scale")
        else np.asarray(leaf)
        for name, leaf in params.items()
    }


def test_parameter_count_is_that_of_stable_diffusion():
    """Catches a missing bias or a block too many; the quant convolutions count."""
    _, params, _ = split(shapes_of(sdvae.VARIANTS["sd-vae-f8"]))
    assert num_parameters(params) == 83_653_863
    assert num_parameters(params, ("encoder.", "quant_conv.")) == 34_163_664
    assert sdvae.VARIANTS["sd-vae-f8"].compression == 8


@pytest.mark.parametrize("shape", make_dcae.SHAPES)
def test_latents_and_images_equal_those_of_diffusers(shape):
    """Catches the downsampling padded on both sides, a wrong eps or group, a transposed key."""
    arch = small()
    weights = sdvae_torch.from_torch(make_dcae.weights("sd"), arch, "diffusers")
    z, y = runner(arch)(weights, make_dcae.picture("sd", shape))
    want_z, want_y = make_dcae.outputs("sd", shape)
    assert z.shape == want_z.shape and y.shape == want_y.shape
    assert close(z, want_z)
    assert close(y, want_y)


def test_samples_have_the_mean_and_deviation_of_the_posterior():
    """Catches a sample that ignores its key, or takes the log variance for the deviation."""
    arch = sdvae.Variant(widths=(8,), depth=1, groups=4)
    weights = random_weights(arch)
    # A log variance of 1 at every place, and beyond the clip in the last channel.
    c = arch.latent_channels
    weights["quant_conv.kernel"] = weights["quant_conv.kernel"] * (np.arange(2 * c) < c)
    weights["quant_conv.bias"] = np.float32([0] * c + [1] * (c - 1) + [-80])
    graph = graph_of(arch)
    encode = jax.jit(
        lambda w, x, key: merge(graph, w).encode(x, key), compiler_options=parity.QUICK
    )
    x = np.repeat(np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3), 16, axis=0)
    mean = np.asarray(encode(weights, x, None))
    sample = np.asarray(encode(weights, x, jax.random.key(3)))
    deviations = ((sample - mean) / np.exp(0.5))[..., :-1]
    assert abs(deviations.mean()) < 0.05 and abs(deviations.std() - 1) < 0.05
    assert 0 < np.abs(sample - mean)[..., -1].max() < 10 * np.exp(-15)
    assert np.array_equal(sample, encode(weights, x, jax.random.key(3)))
    assert not np.array_equal(sample, encode(weights, x, jax.random.key(4)))


def test_norms_and_softmax_compute_in_float32_where_the_rest_is_bfloat16():
    """Catches statistics or a softmax in bfloat16: blotches in smooth areas, at large sizes NaN."""
    x = np.random.default_rng(0).normal(40, 1, (1, 16, 16, 8)).astype(np.float32)
    norm = Layers(jnp.bfloat16, nnx.Rngs(0)).group_norm(8, groups=2, eps=sdvae.EPS)
    y = norm(x)
    grouped = x.reshape(256, 2, 4)
    want = (grouped - grouped.mean((0, 2), keepdims=True)) / grouped.std((0, 2), keepdims=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), want.reshape(x.shape), atol=0.02)

    layer = sdvae.Attention(8, Layers(jnp.bfloat16, nnx.Rngs(0)), groups=2)
    steps = jax.make_jaxpr(lambda x: layer(x))(x.astype(jnp.bfloat16)).jaxpr.eqns
    softmax = [step for step in steps if step.primitive.name in ("exp", "custom_jvp_call")]
    assert softmax and all(step.outvars[0].aval.dtype == np.float32 for step in softmax)

    graph, params, _ = split(shapes_of(small(), jnp.bfloat16))
    run = jax.eval_shape(lambda w, x: merge(graph, w)(x), params, np.zeros((1, 16, 16, 3)))
    assert run.dtype == jnp.float32 and run.shape == (1, 16, 16, 3)


def test_weights_travel_there_and_back_bit_for_bit():
    """Catches a tensor that is transposed on one way only, or decoder stages in wrong order."""
    arch = small()
    weights = random_weights(arch)
    tensors = sdvae_torch.to_torch(weights, arch, "diffusers")
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in make_dcae.weights("sd").items()
    }
    back = sdvae_torch.from_torch(tensors, arch, "diffusers")
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


def test_files_with_the_older_names_of_the_attention_are_read():
    """Catches the published files refused: they are from before diffusers renamed the layers."""
    arch = small()
    tensors = make_dcae.weights("sd")
    older = {}
    for name, tensor in tensors.items():
        for now, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        older[name] = tensor
    assert older.keys() != tensors.keys()
    want = sdvae_torch.from_torch(tensors, arch, "diffusers")
    read = sdvae_torch.from_torch(older, arch, "diffusers")
    for name, value in want.items():
        np.testing.assert_array_equal(read[name], value)


def test_weights_that_do_not_fit_are_explained():
    """Catches a half-loaded model, and an error that does not say what the file is."""
    arch = sdvae.VARIANTS["sd-vae-f8"]
    tensors = make_dcae.weights("sd")

    def refusal(tensors, arch):
        with pytest.raises(UserError) as caught:
            sdvae_torch.from_torch(tensors, arch, "diffusers")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    _, params, _ = split(shapes_of(arch))
    full = {n: np.broadcast_to(np.float32(0), leaf.shape) for n, leaf in params.items()}
    full = sdvae_torch.to_torch(full, arch, "diffusers")
    assert "these are sd-vae-f8 weights" in refusal(full, small())
    assert "incomplete or damaged" in refusal(tensors, arch)
    flux = {name: tensor for name, tensor in tensors.items() if "quant_conv" not in name}
    assert "without quant_conv" in refusal(flux, arch)
    assert "not AutoencoderKL weights" in refusal({"encoder.conv_in.weight": np.zeros(3)}, arch)
    del tensors["decoder.conv_out.bias"]
    assert "1 missing (decoder.conv_out.bias)" in refusal(tensors, small())
    with pytest.raises(UserError, match="exports as diffusers only"):
        sdvae_torch.to_torch({}, arch, "authors")


def test_configurations_travel_there_and_back():
    """Catches a field that is not written or read."""
    for arch in (
        sdvae.VARIANTS["sd-vae-f8"],
        sdvae.Variant(latent_channels=8, widths=(32, 96), depth=1, groups=16, scaling_factor=0.13),
    ):
        config = json.loads(json.dumps(sdvae_torch.config_of(arch, "diffusers")))
        assert sdvae_torch.variant_of(config, "diffusers") == arch


@pytest.mark.parametrize(
    "field, value",
    [
        ("_class_name", "AutoencoderDC"),
        ("in_channels", 4),
        ("act_fn", "relu"),
        ("shift_factor", 0.1159),
        ("latents_mean", [0.0]),
        ("use_quant_conv", False),
        ("mid_block_add_attention", False),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("block_out_channels", [128, 256, 512, 500]),
        ("layers_per_block", 0),
        ("latent_channels", "4"),
        ("scaling_factor", 0),
        ("encoder_depths", 3),
    ],
)
def test_each_field_is_checked_and_named(field, value):
    """Catches a field that is read past: the model would load and give other pictures."""
    config = {**sdvae_torch.config_of(sdvae.VARIANTS["sd-vae-f8"], "diffusers"), field: value}
    with pytest.raises(UserError, match=f"config.json: {field}="):
        sdvae_torch.variant_of(config, "diffusers")


def test_settings_make_the_architecture_again():
    """Catches a loaded model whose configuration, saved with it, builds another one."""
    base = sdvae.VARIANTS["sd-vae-f8"]
    for arch in (base, dataclasses.replace(base, widths=(32, 64, 64, 96), latent_channels=16)):
        config = default().model
        config.update(sdvae_torch.settings_of(arch))
        assert sdvae.architecture(config) == arch
    with pytest.raises(UserError, match="3 stages"):
        sdvae_torch.settings_of(small())
    # A DC-AE folder given to this file, and the other way round, is distinguished by its config.
    with pytest.raises(UserError, match="_class_name"):
        dcae_torch.variant_of(sdvae_torch.config_of(base, "diffusers"), "diffusers")
    assert dcae.VARIANTS.keys().isdisjoint(sdvae.VARIANTS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"variant": "sd-vae-f16"}, "model.variant='sd-vae-f16'"),
        ({"residual": False}, "model.residual=False"),
        ({"encoder_depths": (1, 1, 1, 1)}, "model.encoder_depths="),
        ({"widths": (32, 32)}, "model.widths="),
        ({"widths": (32, 32, 40, 64)}, "model.widths="),
    ],
)
def test_impossible_architectures_are_named(changes, words):
    """Catches a key that is read past, or one that fails deep inside XLA."""
    config = default().model
    config.variant = "sd-vae-f8"
    config.update(changes)
    with pytest.raises(UserError, match=words):
        sdvae.architecture(config)


# --- beside PyTorch -------------------------------------------------------------------------------


def compare(config, arch, sizes, quick):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL.from_config(config).eval()
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    weights = sdvae_torch.from_torch(tensors, arch, "diffusers")
    rng = np.random.default_rng(1)
    for height, width in sizes:
        x = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
        with torch.no_grad():
            want_z = network.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist.mode()
            want_y = network.decode(want_z).sample.permute(0, 2, 3, 1).numpy()
        z, y = runner(arch, quick)(weights, x)
        assert close(z, want_z.permute(0, 2, 3, 1).numpy()), (height, width)
        assert close(y, want_y), (height, width)


@pytest.mark.torch
def test_random_weights_of_diffusers_give_the_same_numbers():
    """Catches golden files that no longer say what diffusers does."""
    compare(make_dcae.KL["sd"], small(), [(28, 28), (20, 36)], quick=True)


@pytest.mark.torch
@pytest.mark.slow
def test_the_full_size_model_gives_the_same_numbers():
    """Catches an error that grows with depth and width until float32 no longer hides it."""
    arch = sdvae.VARIANTS["sd-vae-f8"]
    config = sdvae_torch.config_of(arch, "diffusers")
    compare(config, arch, [(64, 64), (48, 80)], quick=False)


@pytest.mark.torch
def test_diffusers_opens_what_we_write(tmp_path):
    """Catches a configuration or a tensor that from_pretrained does not take as it is."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from safetensors.numpy import save_file

    arch = small()
    weights = random_weights(arch)
    (tmp_path / "config.json").write_text(json.dumps(sdvae_torch.config_of(arch, "diffusers")))
    tensors = sdvae_torch.to_torch(weights, arch, "diffusers")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    network, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    x = make_dcae.picture("sd", (4, 6))
    with torch.no_grad():
        want_z = network.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist.mode()
        want_y = network.decode(want_z).sample.permute(0, 2, 3, 1).numpy()
    z, y = runner(arch)(weights, x)
    assert close(z, want_z.permute(0, 2, 3, 1).numpy()) and close(y, want_y)


@pytest.mark.torch
def test_names_count_and_defaults_are_those_of_diffusers():
    """Catches a default that a new release changed or added, or a name of the full model."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    import inspect

    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert defaults == sdvae_torch.DIFFUSERS_DEFAULTS
    arch = sdvae.VARIANTS["sd-vae-f8"]
    with torch.device("meta"):
        network = diffusers.AutoencoderKL.from_config(sdvae_torch.config_of(arch, "diffusers"))
    _, params, _ = split(shapes_of(arch))
    ours = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in params.items()}
    ours = sdvae_torch.to_torch(ours, arch, "diffusers")
    assert {name: t.shape for name, t in ours.items()} == {
        name: tuple(t.shape) for name, t in network.state_dict().items()
    }
