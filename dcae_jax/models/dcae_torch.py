# SPDX-License-Identifier: Apache-2.0
"""DC-AE's weights and configuration in the two PyTorch formats in which they are published.

'diffusers': diffusers' `AutoencoderDC`, `diffusion_pytorch_model.safetensors` + `config.json`.
'authors': mit-han-lab/efficientvit and dc-ai-projects/DC-Gen, `model.safetensors` +
`config.json` with the key `model_name`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_diffusers, torch_layout
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.dcae import Variant

FORMATS = ("diffusers", "authors")
CLASS_NAME = dcae_diffusers.CLASS_NAME

# Values of `model_name` that the authors' code accepts. The others exist only on the hub.
AUTHORS_NAMES = tuple(
    name
    for name in dcae.PUBLISHED
    if name != "dc-ae-lite-f32c32" and not name.startswith("dc-ae-1.5-")
)

# Our name of a layer inside a block -> theirs.
_RES = {
    "diffusers": {"conv1": "conv1", "conv2": "conv2", "norm": "norm"},
    "authors": {"conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm"},
}
_EVIT = {
    "diffusers": {
        "context_module.qkv": "attn.to_q attn.to_k attn.to_v",  # thirds of qkv, not q, k, v
        "context_module.aggreg_depth": "attn.to_qkv_multiscale.0.proj_in",
        "context_module.aggreg_point": "attn.to_qkv_multiscale.0.proj_out",
        "context_module.proj": "attn.to_out",
        "context_module.norm": "attn.norm_out",
        "local_module.inverted_conv": "conv_out.conv_inverted",
        "local_module.depth_conv": "conv_out.conv_depth",
        "local_module.point_conv": "conv_out.conv_point",
        "local_module.norm": "conv_out.norm",
    },
    "authors": {
        "context_module.qkv": "context_module.main.qkv.conv",
        "context_module.aggreg_depth": "context_module.main.aggreg.0.0",
        "context_module.aggreg_point": "context_module.main.aggreg.0.1",
        "context_module.proj": "context_module.main.proj.conv",
        "context_module.norm": "context_module.main.proj.norm",
        "local_module.inverted_conv": "local_module.main.inverted_conv.conv",
        "local_module.depth_conv": "local_module.main.depth_conv.conv",
        "local_module.point_conv": "local_module.main.point_conv.conv",
        "local_module.norm": "local_module.main.point_conv.norm",
    },
}
_STAGES = {
    "diffusers": {"encoder": "encoder.down_blocks.{}.{}", "decoder": "decoder.up_blocks.{}.{}"},
    "authors": {
        "encoder": "encoder.stages.{}.op_list.{}",
        "decoder": "decoder.stages.{}.op_list.{}",
    },
}
_LINEAR = ("context_module.qkv", "context_module.proj")  # in diffusers


# --- weights --------------------------------------------------------------------------------------


def to_torch(weights: Mapping, arch: Variant, form: str) -> dict[str, np.ndarray]:
    """{our path: array} -> {name in `form`: float32 array}, parameters and statistics together.

    Kernels become [out, in, height, width]. BatchNorm's counters, which we do not keep, are 0.
    Raises UserError for a model that the format cannot express.
    """
    _refuse(arch, form)
    return torch_layout.to_torch(weights, _table(arch, form), _shapes(arch))


def from_torch(tensors: Mapping, arch: Variant, form: str) -> dict[str, np.ndarray]:
    """{name in `form`: array} -> {our path: float32 array}; views of the tensors where possible.

    Raises UserError, in one line with the likely cause, when a tensor is missing, unknown or
    misshapen; then nothing is converted.
    """
    _refuse(arch, form)
    return torch_layout.from_torch(
        tensors, _table(arch, form), _shapes(arch), lambda found: _cause(found, arch, form)
    )


def format_of(found: Iterable[str]) -> str | None:
    """The format that uses these names: 'diffusers', 'authors', 'ours' or None."""
    found = set(found)
    if any(name.endswith(".kernel") for name in found):
        return "ours"
    if any(".op_list." in name for name in found):
        return "authors"
    if any(".resnets." in name for name in found):
        return None  # AutoencoderKL, which uses the same stage names
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in found):
        return "diffusers"
    return None


def recognise(tensors: Mapping[str, Any]) -> Variant | None:
    """The variant with exactly these tensors, or None. Its scaling factor stays unknown."""
    form = "authors" if format_of(tensors) == "authors" else "diffusers"
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.endswith(torch_layout.COUNTER)
    }
    return next((arch for arch in dcae.VARIANTS.values() if shapes_in(arch, form) == found), None)


def shapes_in(arch: Variant, form: str) -> torch_layout.Shapes:
    """{name in `form`: shape} of the tensors of `arch`, without counters."""
    return torch_layout.shapes_there(_shapes(arch), _table(arch, form))


@functools.cache
def _shapes(arch: Variant) -> torch_layout.Shapes:
    return weights_lib.shapes(
        lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=jnp.float32, rngs=rngs)
    )


def _table(arch: Variant, form: str) -> dict[str, torch_layout.Layer]:
    """The name of each layer of `arch` in `form`."""
    table = _ends(arch, form)
    last = len(arch.widths) - 1
    sides = (
        ("encoder", arch.encoder_depths, arch.encoder_blocks),
        ("decoder", arch.decoder_depths, arch.decoder_blocks),
    )
    for side, depths, kinds in sides:
        for i, depth in enumerate(depths):
            resamples = depth > 0 and i < last
            first = int(resamples and side == "decoder")  # a decoder stage starts with upsampling
            block = _RES if kinds[i] == "res" else _EVIT
            for j in range(first, first + depth):
                there = _STAGES[form][side].format(i, j)
                for ours, theirs in block[form].items():
                    linear = form == "diffusers" and ours in _LINEAR
                    full = tuple(f"{there}.{name}" for name in theirs.split())
                    table[f"{side}.stages.{i}.{j}.{ours}"] = torch_layout.Layer(full, linear)
            if resamples:
                j = 0 if side == "decoder" else depth
                conv = "conv"
                if form == "authors":
                    strided = side == "encoder" and arch.downsample == "stride"
                    conv = "main.conv" if strided else "main.conv.conv"
                there = f"{_STAGES[form][side].format(i, j)}.{conv}"
                table[f"{side}.stages.{i}.{j}.conv"] = torch_layout.Layer((there,))
    return table


def _ends(arch: Variant, form: str) -> dict[str, torch_layout.Layer]:
    """The layers before and after the stages."""
    halves, doubles = not arch.encoder_depths[0], not arch.decoder_depths[0]
    ours = (
        "encoder.project_in" + ".conv" * halves,
        "encoder.project_out",
        "decoder.project_in",
        "decoder.project_out.norm",
        "decoder.project_out.conv" + ".conv" * doubles,
    )
    if form == "diffusers":
        theirs = (
            "encoder.conv_in" + ".conv" * halves,
            "encoder.conv_out",
            "decoder.conv_in",
            "decoder.norm_out",
            "decoder.conv_out" + ".conv" * doubles,
        )
    else:
        main = "main." * arch.latent_shortcuts
        theirs = (
            "encoder.project_in.conv" + ".conv" * (halves and arch.downsample == "s2c"),
            f"encoder.project_out.{main}op_list.0.conv",
            f"decoder.project_in.{main}conv",
            "decoder.project_out.op_list.0",
            "decoder.project_out.op_list.2.conv" + ".conv" * doubles,
        )
    return {a: torch_layout.Layer((b,)) for a, b in zip(ours, theirs, strict=True)}


def _refuse(arch: Variant, form: str) -> None:
    """Raises UserError for a model that `form` has no names for."""
    if form not in FORMATS:
        raise UserError(f"export.format={form!r} is not known; choose one of {', '.join(FORMATS)}")
    if not arch.residual:
        raise UserError(
            f"the {form} format cannot express residual=False: its models always add the "
            "shortcuts; use export.format=orbax or stablehlo"
        )
    for i, (kind, norm) in enumerate(zip(arch.decoder_blocks, arch.decoder_norms, strict=True)):
        if form == "diffusers" and arch.decoder_depths[i] and kind != "res" and norm == "bn2d":
            raise UserError(
                f"the diffusers format cannot express BatchNorm in the EfficientViT blocks of "
                f"decoder stage {i}: it has RMSNorm there; use export.format=orbax or stablehlo"
            )


def _cause(found: torch_layout.Shapes, arch: Variant, form: str) -> str:
    """The likely reason why the tensors `found` do not fit `arch` in `form`."""
    actual = format_of(found)
    if any(".resnets." in name for name in found):
        return "these are AutoencoderKL weights; load them as variant sd-vae-f8"
    if actual == "ours":
        return "these names are this package's own, not PyTorch's; load the folder they came with"
    if actual is None:
        return "these are not DC-AE weights"
    score, best = 0.0, ""
    known = {**dcae.VARIANTS, "": arch}
    for name, other in known.items():
        wanted = shapes_in(other, actual)
        share = len(wanted.items() & found.items()) / max(len(wanted), len(found))
        if share > score:
            score, best = share, name
    if actual != form:
        return f"these names are in the {actual} format, not the {form} format"
    if score == 1:
        return f"these are {best} weights; load them as that variant"
    if score < 0.5:
        return "these weights match no known variant"
    if not best:
        return "the file is incomplete or damaged, or the model was changed; fetch it again"
    return f"these weights are closest to {best}: {score:.0%} of the tensors match"


# --- configuration --------------------------------------------------------------------------------


def config_of(arch: Variant, form: str) -> dict[str, Any]:
    """The content of `config.json` beside weights in `form`.

    An unknown scaling factor becomes 1.0, AutoencoderDC's default. The authors' format has no
    scaling factor: the model's name implies it. Raises UserError for a model that the format cannot
    express.
    """
    _refuse(arch, form)
    if form == "diffusers":
        return dcae_diffusers.config_of(arch)
    name = published_name(arch)
    if not name:
        raise UserError(
            "the authors' format knows a model by its published name, and none has this "
            "architecture; use export.format=diffusers, orbax or stablehlo"
        )
    return {"model_name": name}


def variant_of(config: Mapping[str, Any], form: str) -> Variant:
    """The architecture that a `config.json` of `form` describes. Raises UserError."""
    if form == "diffusers":
        return dcae_diffusers.variant_of(config)
    name = str(config.get("model_name"))
    if name not in dcae.PUBLISHED and not dcae.CUT.fullmatch(name):
        known = ", ".join(dcae.PUBLISHED)
        raise UserError(f"config.json: model_name={name!r} is not known; give one of {known}")
    return dcae.variant(name)


def _network(arch: Variant) -> Variant:
    """`arch` without fields that do not affect the network: scaling factor, empty stages."""
    empty = {}
    for side, lists in (("encoder", ["blocks"]), ("decoder", ["blocks", "norms"])):
        if not getattr(arch, f"{side}_depths")[0]:
            for name in lists:
                empty[f"{side}_{name}"] = ("", *getattr(arch, f"{side}_{name}")[1:])
    return dataclasses.replace(arch, scaling_factor=None, **empty)


def published_name(arch: Variant) -> str:
    """The first published model with this architecture; '' if there is none.

    Prefers one with the same scaling factor.
    """
    same = [name for name in AUTHORS_NAMES if _network(dcae.variant(name)) == _network(arch)]
    scaled = [name for name in same if dcae.variant(name).scaling_factor == arch.scaling_factor]
    return next(iter(scaled or same), "")


def settings_of(arch: Variant) -> dict[str, Any]:
    """The keys of config.model that build `arch`, except a scaling factor that no name implies.

    Raises UserError if config.model cannot express the architecture.
    """
    rows = {**dcae.VARIANTS, **{name: dcae.variant(name) for name in dcae.PUBLISHED}}
    exact = [
        name
        for name, row in rows.items()
        if _network(row) == _network(arch) and row.scaling_factor == arch.scaling_factor
    ]
    sizes = ("latent_channels", "widths", "decoder_widths", "encoder_depths", "decoder_depths")
    free = {key: getattr(arch, key) for key in (*sizes, "residual")}
    for name in [*exact, *dcae.VARIANTS]:
        row = rows[name]
        if _network(dataclasses.replace(row, **free)) == _network(arch):
            changed = {key: free[key] for key in sizes if free[key] != getattr(row, key)}
            return {"name": "dcae", "variant": name, "residual": arch.residual, **changed}
    raise UserError(
        f"no variant has these blocks: {len(arch.widths)} stages, encoder {arch.encoder_blocks}, "
        f"decoder {arch.decoder_blocks}; use a model with the layout of a row in VARIANTS"
    )
