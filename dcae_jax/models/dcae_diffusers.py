# SPDX-License-Identifier: Apache-2.0
"""Writes and reads DC-AE's config.json in the format of diffusers' `AutoencoderDC`.

Every field is checked; models that this package cannot build are rejected.
"""

from collections.abc import Mapping
from typing import Any

from dcae_jax.models.blocks import HEAD_DIM
from dcae_jax.models.dcae import Variant
from dcae_jax.models.torch_layout import bad_field, checked_scaling

CLASS_NAME = "AutoencoderDC"

# Fields of AutoencoderDC and their defaults.
DIFFUSERS_DEFAULTS = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}

_BLOCKS = {"ResBlock": "res", "EfficientViTBlock": "evit"}
_ACTS = {"relu": "relu", "silu": "silu", "swish": "silu"}
# {field: {value in diffusers: value in `Variant`}}.
_CHOICES = {
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "decoder_norm_types": {"rms_norm": "trms2d", "batch_norm": "bn2d"},
    "downsample_block_type": {"pixel_unshuffle": "s2c", "conv": "stride", "Conv": "stride"},
    "upsample_block_type": {"pixel_shuffle": "c2s", "interpolate": "nearest"},
    "decoder_act_fns": _ACTS,
    "decoder_conv_act_fn": _ACTS,
}


def config_of(arch: Variant) -> dict[str, Any]:
    """The config.json of an architecture. An unknown scaling factor becomes 1.0."""
    there = {kind: name for name, kind in _BLOCKS.items()} | {"evit5": "EfficientViTBlock"}
    scaling = arch.scaling_factor
    return {
        "_class_name": CLASS_NAME,
        "in_channels": 3,
        "latent_channels": arch.latent_channels,
        "attention_head_dim": HEAD_DIM,
        "encoder_block_types": [there[kind] for kind in arch.encoder_blocks],
        "decoder_block_types": [there[kind] for kind in arch.decoder_blocks],
        "encoder_block_out_channels": list(arch.widths),
        "decoder_block_out_channels": list(arch.decoder_widths or arch.widths),
        "encoder_layers_per_block": list(arch.encoder_depths),
        "decoder_layers_per_block": list(arch.decoder_depths),
        "encoder_qkv_multiscales": [[5] * (kind == "evit5") for kind in arch.encoder_blocks],
        "decoder_qkv_multiscales": [[5] * (kind == "evit5") for kind in arch.decoder_blocks],
        "upsample_block_type": "pixel_shuffle" if arch.upsample == "c2s" else "interpolate",
        "downsample_block_type": "pixel_unshuffle" if arch.downsample == "s2c" else "conv",
        "decoder_norm_types": [
            "batch_norm" if norm == "bn2d" else "rms_norm" for norm in arch.decoder_norms
        ],
        "decoder_act_fns": ["relu" if norm == "bn2d" else "silu" for norm in arch.decoder_norms],
        "encoder_out_shortcut": arch.latent_shortcuts,
        "decoder_in_shortcut": arch.latent_shortcuts,
        "decoder_conv_act_fn": arch.output_act,
        "scaling_factor": 1.0 if scaling is None else scaling,
    }


def variant_of(config: Mapping[str, Any]) -> Variant:
    """The architecture that the config.json of an AutoencoderDC describes.

    Missing fields take AutoencoderDC's defaults; every field is checked. A scaling factor of 1
    means unknown in diffusers and becomes None. Raises UserError, naming the field, for a model
    that this package cannot build.
    """
    kind = config.get("_class_name", CLASS_NAME)
    if kind != CLASS_NAME:
        raise bad_field("_class_name", kind, "DC-AE is an AutoencoderDC")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in given.items():
        if key not in DIFFUSERS_DEFAULTS:
            raise bad_field(key, value, "AutoencoderDC has no such field")
    c = {**DIFFUSERS_DEFAULTS, **given}
    for key, only in (("in_channels", 3), ("attention_head_dim", HEAD_DIM)):
        if c[key] != only:
            raise bad_field(key, c[key], f"only {only} is supported")
    widths = _counts(c, "encoder_block_out_channels", 1)
    decoder_widths = _counts(c, "decoder_block_out_channels", 1)
    if len(decoder_widths) != len(widths):
        why = f"must be as long as encoder_block_out_channels={list(widths)}"
        raise bad_field("decoder_block_out_channels", c["decoder_block_out_channels"], why)
    stages = len(widths)
    if stages < 2:
        raise bad_field("encoder_block_out_channels", list(widths), "give two stages or more")
    for key in ("encoder_out_shortcut", "decoder_in_shortcut"):
        if not isinstance(c[key], bool) or c[key] != c["encoder_out_shortcut"]:
            raise bad_field(key, c[key], "must be true or false, the same in encoder and decoder")
    scaling = checked_scaling(c)
    arch = Variant(
        latent_channels=_count(c, "latent_channels", c["latent_channels"], 1),
        widths=widths,
        encoder_depths=_depths(c, "encoder_layers_per_block", stages),
        decoder_depths=_depths(c, "decoder_layers_per_block", stages),
        encoder_blocks=_blocks(c, "encoder", stages),
        decoder_blocks=_blocks(c, "decoder", stages),
        decoder_norms=_choices(c, "decoder_norm_types", stages),
        downsample=_choices(c, "downsample_block_type", 1)[0],
        upsample=_choices(c, "upsample_block_type", 1)[0],
        output_act=_choices(c, "decoder_conv_act_fn", 1)[0],
        latent_shortcuts=c["encoder_out_shortcut"],
        decoder_widths=() if decoder_widths == widths else decoder_widths,
        scaling_factor=None if scaling == 1 else scaling,
    )
    _check_decoder(c, arch)
    _check_widths(arch, "encoder", widths, arch.encoder_blocks)
    _check_widths(arch, "decoder", decoder_widths, arch.decoder_blocks)
    return arch


def _check_decoder(c: Mapping[str, Any], arch: Variant) -> None:
    """Here the norm sets the activation; diffusers omits half the batch norms in some blocks."""
    acts = _stages(c, "decoder_act_fns", len(arch.widths))
    for i, norm in enumerate(arch.decoder_norms):
        if not arch.decoder_depths[i]:
            continue
        wanted = "relu" if norm == "bn2d" else "silu"
        if arch.decoder_blocks[i] == "res":
            if _choice("decoder_act_fns", acts[i]) != wanted:
                why = f"stage {i} has norm {norm}, which needs {wanted} here"
                raise bad_field("decoder_act_fns", c["decoder_act_fns"], why)
        elif norm == "bn2d":
            why = f"EfficientViTBlocks, as in stage {i}, are supported with rms_norm only"
            raise bad_field("decoder_norm_types", c["decoder_norm_types"], why)


def _check_widths(
    arch: Variant, side: str, widths: tuple[int, ...], kinds: tuple[str, ...]
) -> None:
    key, value = f"{side}_block_out_channels", list(widths)
    for i, width in enumerate(widths):
        multiple = 4 if kinds[i] == "res" else HEAD_DIM
        if width % multiple:
            raise bad_field(key, value, f"{width} in stage {i} is not a multiple of {multiple}")
    pairs = [(4 * a, b) for a, b in zip(widths, widths[1:], strict=False)]
    if arch.latent_shortcuts:
        pairs.append((widths[-1], arch.latent_channels))
    first = 0 if arch.encoder_depths[0] or arch.decoder_depths[0] else 1
    for wide, narrow in pairs[first:]:
        if wide % narrow:
            raise bad_field(key, value, f"a shortcut cannot average {wide} channels into {narrow}")


def _count(c: Mapping[str, Any], key: str, value: Any, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise bad_field(key, c[key], f"give integers of at least {at_least}")
    return value


def _counts(c: Mapping[str, Any], key: str, at_least: int) -> tuple[int, ...]:
    if not isinstance(c[key], list | tuple):
        raise bad_field(key, c[key], "give a list with one integer per stage")
    return tuple(_count(c, key, value, at_least) for value in c[key])


def _depths(c: Mapping[str, Any], key: str, stages: int) -> tuple[int, ...]:
    depths = _counts(c, key, 0)
    if len(depths) != stages:
        raise bad_field(key, c[key], f"give one integer for each of the {stages} stages")
    if 0 in depths[1:]:
        raise bad_field(key, c[key], "only the first stage may be empty")
    return depths


def _stages(c: Mapping[str, Any], key: str, stages: int) -> tuple[Any, ...]:
    """One value per stage: a single value serves all; extra ones are ignored, as in diffusers."""
    if isinstance(c[key], str):
        return (c[key],) * stages
    if not isinstance(c[key], list | tuple) or len(c[key]) < stages:
        raise bad_field(key, c[key], f"give one value for each of the {stages} stages")
    return tuple(c[key][:stages])


def _choices(c: Mapping[str, Any], key: str, stages: int) -> tuple[Any, ...]:
    return tuple(_choice(key, value) for value in _stages(c, key, stages))


def _choice(key: str, value: Any) -> Any:
    choices = _CHOICES[key]
    if not isinstance(value, str) or value not in choices:
        raise bad_field(key, value, f"only {' and '.join(choices)} are supported")
    return choices[value]


def _blocks(c: Mapping[str, Any], side: str, stages: int) -> tuple[Any, ...]:
    kinds = list(_choices(c, f"{side}_block_types", stages))
    for i, scales in enumerate(_stages(c, f"{side}_qkv_multiscales", stages)):
        if kinds[i] == "evit":
            if list(scales) not in ([], [5]):
                key = f"{side}_qkv_multiscales"
                raise bad_field(key, c[key], "only [] and [5] are supported")
            kinds[i] += "5" * len(scales)
    return tuple(kinds)
