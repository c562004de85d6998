# SPDX-License-Identifier: Apache-2.0
"""Configurations of DC-AE: diffusers' config.json, the authors' model names, our own settings."""

import dataclasses
import json

import pytest
from goldens import make_dcae

from dcae_jax.config import default
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_diffusers, dcae_torch


@pytest.mark.parametrize("name", [*dcae.VARIANTS, *dcae.PUBLISHED])
def test_configurations_travel_there_and_back(name):
    """Catches a field that is not written, or read into another: as the scaling factor."""
    arch = dcae.variant(name)
    config = json.loads(json.dumps(dcae_torch.config_of(arch, "diffusers")))
    back = dcae_torch.variant_of(config, "diffusers")
    assert back == arch
    if name in dcae_torch.AUTHORS_NAMES:
        config = dcae_torch.config_of(arch, "authors")
        assert dcae_torch.variant_of(config, "authors") == arch


def test_absent_fields_have_the_defaults_of_diffusers():
    """Catches our own taste in place of AutoencoderDC's: no field at all is close to sana."""
    arch = dcae_torch.variant_of({}, "diffusers")
    assert arch.encoder_blocks == arch.decoder_blocks == ("res",) * 6
    assert arch.encoder_depths == (2, 2, 2, 3, 3, 3)
    assert (arch.downsample, arch.upsample, arch.output_act) == ("s2c", "c2s", "relu")
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    arch = dcae_torch.variant_of({"encoder_block_types": blocks}, "diffusers")
    assert arch.encoder_blocks == ("res",) * 3 + ("evit5",) * 3


@pytest.mark.parametrize(
    "field, value",
    [
        ("_class_name", "AutoencoderKL"),
        ("in_channels", 2),
        ("attention_head_dim", 64),
        ("latent_channels", 0),
        ("latent_channels", 24),
        ("latent_channels", True),
        ("encoder_block_types", "EViT"),
        ("encoder_block_types", ["ResBlock"]),
        ("encoder_block_out_channels", [128, 256, 512, 512, 1024, 1026]),
        ("encoder_block_out_channels", "128"),
        ("decoder_block_out_channels", [64, 256, 512, 512, 1024]),
        ("decoder_block_out_channels", [64, 256, 512, 512, 1024, 1028]),
        ("encoder_layers_per_block", [1, 0, 1, 1, 1, 1]),
        ("decoder_layers_per_block", [1, 1]),
        ("decoder_qkv_multiscales", [[], [], [], [3], [5], [5]]),
        ("upsample_block_type", "bilinear"),
        ("downsample_block_type", "pool"),
        ("decoder_norm_types", "layer_norm"),
        ("decoder_norm_types", ["rms_norm"] * 5 + ["batch_norm"]),
        ("decoder_act_fns", "relu"),
        ("encoder_out_shortcut", False),
        ("decoder_conv_act_fn", "gelu"),
        ("scaling_factor", 0),
        ("scaling_factor", "1"),
        ("latents_mean", [0.0]),
    ],
)
def test_each_field_is_checked_and_named(field, value):
    """Catches a field that is read past: the model would load and give other pictures."""
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    config = {"encoder_block_types": blocks, "decoder_block_types": blocks, field: value}
    with pytest.raises(UserError, match="config.json: ") as caught:
        dcae_torch.variant_of(config, "diffusers")
    named = str(caught.value)
    if field == "encoder_out_shortcut":  # its fellow of the decoder differs
        assert "_shortcut" in named
    elif field == "latent_channels" and value == 24:
        assert "into 24" in named
    else:
        assert f"{field}=" in named


def test_an_unknown_name_of_the_authors_is_answered_with_the_known_ones():
    """Catches a KeyError instead of a line that helps."""
    for config in ({}, {"model_name": "dc-ae-f16"}):
        with pytest.raises(UserError, match="model_name=.*dc-ae-f32c32-in-1.0"):
            dcae_torch.variant_of(config, "authors")


@pytest.mark.parametrize("name", [*dcae.VARIANTS, *dcae.PUBLISHED, "wide", "ablation"])
def test_settings_make_the_architecture_again(name):
    """Catches a loaded model whose configuration, saved with it, builds another one."""
    if name == "wide":
        arch = dataclasses.replace(dcae.VARIANTS["tiny"], widths=(32, 32, 64, 64, 64))
    elif name == "ablation":
        arch = dataclasses.replace(dcae.VARIANTS["tiny"], residual=False)
    else:
        arch = dcae.variant(name)
    config = default().model
    config.update(dcae_torch.settings_of(arch))
    assert dcae.architecture(config) == arch
    with pytest.raises(UserError, match="4 stages"):
        dcae_torch.settings_of(dcae_torch.variant_of(make_dcae.DCAE["in"], "diffusers"))


@pytest.mark.torch
def test_defaults_are_those_of_diffusers():
    """Catches a default of AutoencoderDC that a new release changed or added."""
    diffusers = pytest.importorskip("diffusers")
    import inspect

    parameters = inspect.signature(diffusers.AutoencoderDC.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert defaults == dcae_diffusers.DIFFUSERS_DEFAULTS
