# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's autoencoder in the format of diffusers: `AutoencoderKL`'s names and
config.json.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcae_jax.errors import UserError
from dcae_jax.models import sdvae, torch_layout
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.sdvae import Variant
from dcae_jax.models.torch_layout import bad_field, checked_scaling

FORMATS = ("diffusers",)
CLASS_NAME = "AutoencoderKL"

# Fields of AutoencoderKL and the values that absent ones have.
DIFFUSERS_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

# What a model of this file has in these fields; sample_size and force_upcast change no number.
_ONLY = {
    "_class_name": (CLASS_NAME,),
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}

_RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
# Our layer of the attention -> theirs today, theirs in older files.
_ATTENTION = {
    "norm": ("group_norm", "group_norm"),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "out": ("to_out.0", "proj_attn"),
}


def to_torch(weights: Mapping, arch: Variant, form: str) -> dict[str, np.ndarray]:
    """{our path: array} -> {AutoencoderKL's name: float32 array}, kernels [out, in, h, w]."""
    _only_diffusers(form)
    return torch_layout.to_torch(weights, _table(arch), _shapes(arch))


def from_torch(tensors: Mapping, arch: Variant, form: str) -> dict[str, np.ndarray]:
    """{AutoencoderKL's name: array} -> {our path: float32 array}; views where possible.

    Files from before diffusers renamed the attention layers are read too. Raises UserError, in
    one line with the likely cause, when a tensor is missing, unknown or misshapen.
    """
    _only_diffusers(form)
    renamed = {}
    for name, tensor in tensors.items():
        for now, before in _ATTENTION.values():
            name = name.replace(f".attentions.0.{before}.", f".attentions.0.{now}.")
        renamed[name] = tensor
    return torch_layout.from_torch(renamed, _table(arch), _shapes(arch), _cause)


def format_of(found: Iterable[str]) -> str | None:
    """'diffusers' if these are names of an AutoencoderKL, else None."""
    return "diffusers" if any(".resnets." in name for name in found) else None


def recognise(tensors: Mapping[str, Any]) -> Variant | None:
    """Stable Diffusion's autoencoder if these are an AutoencoderKL's tensors, else None."""
    return sdvae.variant("sd-vae-f8") if format_of(tensors) else None


def published_name(arch: Variant) -> str:
    """'': DC-AE's authors have no name for it."""
    del arch
    return ""


def _only_diffusers(form: str) -> None:
    if form not in FORMATS:
        raise UserError(f"export.format={form!r}: an AutoencoderKL travels as diffusers only")


def _shapes(arch: Variant) -> torch_layout.Shapes:
    return weights_lib.shapes(lambda rngs: sdvae.SDVAE(arch, dtype=jnp.float32, rngs=rngs))


def _table(arch: Variant) -> dict[str, torch_layout.Layer]:
    """What each layer is called in AutoencoderKL, whose decoder counts stages as they run."""
    there = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks = {}
    last = len(arch.widths) - 1
    for i in range(last + 1):
        for side, stage, depth in (
            ("encoder", f"encoder.down_blocks.{i}", arch.depth),
            ("decoder", f"decoder.up_blocks.{last - i}", arch.depth + 1),
        ):
            for j in range(depth):
                blocks[f"{side}.stages.{i}.{j}"] = f"{stage}.resnets.{j}"
        there[f"encoder.stages.{i}.{arch.depth}"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        there[f"decoder.stages.{i}.{arch.depth + 1}.conv"] = (
            f"decoder.up_blocks.{last - i}.upsamplers.0.conv"
        )
    for side in ("encoder", "decoder"):
        there[f"{side}.conv_in"] = f"{side}.conv_in"
        there[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        there[f"{side}.conv_out"] = f"{side}.conv_out"
        blocks[f"{side}.middle.0"] = f"{side}.mid_block.resnets.0"
        blocks[f"{side}.middle.2"] = f"{side}.mid_block.resnets.1"
        for ours, (theirs, _) in _ATTENTION.items():
            there[f"{side}.middle.1.{ours}"] = f"{side}.mid_block.attentions.0.{theirs}"
    for block, resnet in blocks.items():
        there.update({f"{block}.{ours}": f"{resnet}.{theirs}" for ours, theirs in _RES.items()})
    return {
        ours: torch_layout.Layer((theirs,), linear=".attentions." in theirs)
        for ours, theirs in there.items()
    }


def _cause(found: torch_layout.Shapes) -> str:
    """The likely reason why the tensors found are not those of the model asked for."""
    if not any(".resnets." in name for name in found):
        return "these are not AutoencoderKL weights; for DC-AE, name one of its variants"
    if lost := next((n for n in found if n.endswith(".quant_conv.weight")), ""):
        prefix = lost.removesuffix("quant_conv.weight")
        return f"the names begin with {prefix!r}; write them without it"
    if "quant_conv.weight" not in found:
        return "an AutoencoderKL without quant_conv, as Flux and SD3 have, is not supported"
    for name, arch in sdvae.VARIANTS.items():
        if torch_layout.shapes_there(_shapes(arch), _table(arch)) == found:
            return f"these are {name} weights; load them as that variant"
    return "the file is incomplete or damaged, or of another AutoencoderKL than Stable Diffusion's"


def config_of(arch: Variant, form: str) -> dict[str, Any]:
    """The content of `config.json` beside the weights. An unknown scaling factor is 1.0."""
    _only_diffusers(form)
    stages = len(arch.widths)
    return {
        "_class_name": CLASS_NAME,
        **DIFFUSERS_DEFAULTS,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": list(arch.widths),
        "layers_per_block": arch.depth,
        "latent_channels": arch.latent_channels,
        "norm_num_groups": arch.groups,
        "scaling_factor": 1.0 if arch.scaling_factor is None else arch.scaling_factor,
    }


def variant_of(config: Mapping[str, Any], form: str) -> Variant:
    """The architecture that the `config.json` of an AutoencoderKL describes.

    Absent fields have AutoencoderKL's defaults. Raises UserError, naming the field, for a model
    that this file cannot build.
    """
    _only_diffusers(form)
    c = {"_class_name": CLASS_NAME, **DIFFUSERS_DEFAULTS, **config}
    for key, value in c.items():
        if key not in DIFFUSERS_DEFAULTS and not key.startswith("_"):
            raise bad_field(key, value, "AutoencoderKL has no such field")
        if key in _ONLY and value not in _ONLY[key]:
            raise bad_field(key, value, f"only {_ONLY[key][0]} is supported")
    for key in ("latent_channels", "layers_per_block", "norm_num_groups"):
        if not isinstance(c[key], int) or c[key] < 1:
            raise bad_field(key, c[key], "give a whole number of at least 1")
    widths = c["block_out_channels"]
    if not isinstance(widths, list | tuple) or not all(
        isinstance(width, int) and width > 0 and width % c["norm_num_groups"] == 0
        for width in widths
    ):
        why = f"give multiples of norm_num_groups, {c['norm_num_groups']}"
        raise bad_field("block_out_channels", widths, why)
    for key in ("down_block_types", "up_block_types"):
        kind = DIFFUSERS_DEFAULTS[key][0]
        if list(c[key]) != [kind] * len(widths):
            raise bad_field(key, c[key], f"only {kind} is supported, one a stage")
    scaling = checked_scaling(c)
    return Variant(
        latent_channels=c["latent_channels"],
        widths=tuple(widths),
        depth=c["layers_per_block"],
        groups=c["norm_num_groups"],
        scaling_factor=scaling,
    )


def settings_of(arch: Variant) -> dict[str, Any]:
    """The keys of config.model that make `arch`, its scaling factor apart.

    Raises UserError where config.model cannot express the architecture.
    """
    for name, row in sdvae.VARIANTS.items():
        sizes = {"latent_channels": arch.latent_channels, "widths": arch.widths}
        made = dataclasses.replace(row, **sizes, scaling_factor=arch.scaling_factor)
        if len(arch.widths) == len(row.widths) and made == arch:
            changed = {key: size for key, size in sizes.items() if size != getattr(row, key)}
            return {"name": "sdvae", "variant": name, **changed}
    raise UserError(
        f"no variant has {len(arch.widths)} stages of {arch.depth} blocks with {arch.groups} "
        "groups; only models shaped as Stable Diffusion's are supported"
    )
