# SPDX-License-Identifier: Apache-2.0
"""DC-AE's weights and configuration in the two formats of PyTorch that others publish and read.

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

from dcae_jax.config import UserError
from dcae_jax.models import dcae, names
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.blocks import HEAD_DIM
from dcae_jax.models.dcae import Variant

FORMATS = ("diffusers", "authors")

# Fields of AutoencoderDC and the values that absent ones have.
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

# Values of `model_name` that the authors' code accepts. dc-ae-lite-f32c32 is a name on the hub
# that their code does not know.
AUTHORS_NAMES = tuple(name for name in dcae.PUBLISHED if name != "dc-ae-lite-f32c32")

# Our layer inside a block -> theirs.
_RES = {
    "diffusers": {"conv1": "conv1", "conv2": "conv2", "norm": "norm"},
    "authors": {"conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm"},
}
_EVIT = {
    "diffusers": {
        "context_module.qkv": "attn.to_q attn.to_k attn.to_v",  # thirds, not queries and so on
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

    Kernels become [out, in, height, width]. The counters of BatchNorm, which we do not keep, are
    0. Raises UserError for a model that the format cannot express.
    """
    _refuse(arch, form)
    return names.to_torch(weights, _table(arch, form), _shapes(arch))


def from_torch(tensors: Mapping, arch: Variant, form: str) -> dict[str, np.ndarray]:
    """{name in `form`: array} -> {our path: float32 array}; views of the tensors where possible.

    Raises UserError, in one line with the likely cause, when a tensor is missing, unknown or
    misshapen; nothing is converted then.
    """
    _refuse(arch, form)
    return names.from_torch(
        tensors, _table(arch, form), _shapes(arch), lambda found: _cause(found, arch, form)
    )


def format_of(found: Iterable[str]) -> str | None:
    """The format whose names these are: 'diffusers', 'authors', 'ours' or None."""
    found = set(found)
    if any(name.endswith(".kernel") for name in found):
        return "ours"
    if any(".op_list." in name for name in found):
        return "authors"
    if any(".resnets." in name for name in found):
        return None  # AutoencoderKL, whose stages are called the same
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in found):
        return "diffusers"
    return None


def shapes_in(arch: Variant, form: str) -> names.Shapes:
    """{name in `form`: shape} of the tensors of `arch`, counters left out."""
    return names.shapes_there(_shapes(arch), _table(arch, form))


@functools.cache
def _shapes(arch: Variant) -> names.Shapes:
    model = weights_lib.abstract(
        lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=jnp.float32, rngs=rngs)
    )
    _, params, stats = weights_lib.split(model)
    return {path: tuple(leaf.shape) for path, leaf in {**params, **stats}.items()}


def _table(arch: Variant, form: str) -> dict[str, names.Layer]:
    """What each layer of `arch` is called in `form`."""
    table = _ends(arch, form)
    last = len(arch.widths) - 1
    sides = (
        ("encoder", arch.encoder_depths, arch.encoder_blocks),
        ("decoder", arch.decoder_depths, arch.decoder_blocks),
    )
    for side, depths, kinds in sides:
        for i, depth in enumerate(depths):
            resamples = depth > 0 and i < last
            first = int(resamples and side == "decoder")  # a decoder's stage begins by upsampling
            block = _RES if kinds[i] == "res" else _EVIT
            for j in range(first, first + depth):
                there = _STAGES[form][side].format(i, j)
                for ours, theirs in block[form].items():
                    linear = form == "diffusers" and ours in _LINEAR
                    full = tuple(f"{there}.{name}" for name in theirs.split())
                    table[f"{side}.stages.{i}.{j}.{ours}"] = names.Layer(full, linear)
            if resamples:
                j = 0 if side == "decoder" else depth
                conv = "conv"
                if form == "authors":
                    strided = side == "encoder" and arch.downsample == "stride"
                    conv = "main.conv" if strided else "main.conv.conv"
                there = f"{_STAGES[form][side].format(i, j)}.{conv}"
                table[f"{side}.stages.{i}.{j}.conv"] = names.Layer((there,))
    return table


def _ends(arch: Variant, form: str) -> dict[str, names.Layer]:
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
    return {a: names.Layer((b,)) for a, b in zip(ours, theirs, strict=True)}


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


def _cause(found: names.Shapes, arch: Variant, form: str) -> str:
    """The likely reason why the tensors found are not those of `arch` in `form`."""
    actual = format_of(found)
    if any(".resnets." in name for name in found):
        return "these are AutoencoderKL weights; load them as variant sd-vae-f8"
    if actual == "ours":
        return "these names are this package's own, not PyTorch's; load the folder they came with"
    if actual is None:
        return "these are no DC-AE weights"
    score, best = 0.0, ""
    known = {**dcae.VARIANTS, "": arch}
    for name, other in known.items():
        wanted = shapes_in(other, actual)
        share = len(wanted.items() & found.items()) / max(len(wanted), len(found))
        if share > score:
            score, best = share, name
    if actual != form:
        return f"these names are of the {actual} format, not of the {form} format"
    if score == 1:
        return f"these are {best} weights; load them as that variant"
    if score < 0.5:
        return "these are the weights of no variant known here"
    if not best:
        return "the file is incomplete or damaged, or of a changed model; fetch it again"
    return f"these weights are nearest to {best}, of which they have {score:.0%} of the tensors"


# --- configuration --------------------------------------------------------------------------------


def config_of(arch: Variant, form: str) -> dict[str, Any]:
    """The content of `config.json` beside weights in `form`.

    A scaling factor that is not known is 1.0, as AutoencoderDC has it. The authors' format holds
    none: the name of the model stands for it. Raises UserError for a model that the format cannot
    express.
    """
    _refuse(arch, form)
    if form == "authors":
        return {"model_name": _authors_name(arch)}
    blocks = {"res": "ResBlock", "evit": "EfficientViTBlock", "evit5": "EfficientViTBlock"}
    scaling = arch.scaling_factor
    return {
        "_class_name": "AutoencoderDC",
        "in_channels": 3,
        "latent_channels": arch.latent_channels,
        "attention_head_dim": HEAD_DIM,
        "encoder_block_types": [blocks[kind] for kind in arch.encoder_blocks],
        "decoder_block_types": [blocks[kind] for kind in arch.decoder_blocks],
        "encoder_block_out_channels": list(arch.widths),
        "decoder_block_out_channels": list(arch.widths),
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


def variant_of(config: Mapping[str, Any], form: str) -> Variant:
    """The architecture that a `config.json` of `form` describes.

    Absent fields of AutoencoderDC have its defaults; every field is checked. Raises UserError,
    naming the field, for what is not a DC-AE of this package.
    """
    if form == "authors":
        name = config.get("model_name")
        if name not in dcae.PUBLISHED:
            known = ", ".join(dcae.PUBLISHED)
            raise UserError(f"config.json: model_name={name!r} is not known; give one of {known}")
        return dcae.variant(name)
    return _variant_of_diffusers(config)


def _variant_of_diffusers(config: Mapping[str, Any]) -> Variant:
    kind = config.get("_class_name", "AutoencoderDC")
    if kind != "AutoencoderDC":
        raise _bad("_class_name", kind, "DC-AE is an AutoencoderDC")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in given.items():
        if key not in DIFFUSERS_DEFAULTS:
            raise _bad(key, value, "AutoencoderDC has no such field")
    c = {**DIFFUSERS_DEFAULTS, **given}
    for key, only in (("in_channels", 3), ("attention_head_dim", HEAD_DIM)):
        if c[key] != only:
            raise _bad(key, c[key], f"only {only} is supported")
    widths = _counts(c, "encoder_block_out_channels", at_least=1)
    if _counts(c, "decoder_block_out_channels", at_least=1) != widths:
        value = c["decoder_block_out_channels"]
        why = f"must be as encoder_block_out_channels={list(widths)}"
        raise _bad("decoder_block_out_channels", value, why)
    if len(widths) < 2:
        raise _bad("encoder_block_out_channels", list(widths), "give two stages or more")
    for key in ("encoder_out_shortcut", "decoder_in_shortcut"):
        if not isinstance(c[key], bool) or c[key] != c["encoder_out_shortcut"]:
            raise _bad(key, c[key], "must be true or false, the same in encoder and decoder")
    downsample = "conv" if c["downsample_block_type"] == "Conv" else c["downsample_block_type"]
    arch = Variant(
        latent_channels=_count(c, "latent_channels", c["latent_channels"], 1),
        widths=widths,
        encoder_depths=_depths(c, "encoder_layers_per_block", len(widths)),
        decoder_depths=_depths(c, "decoder_layers_per_block", len(widths)),
        encoder_blocks=_blocks(c, "encoder", len(widths)),
        decoder_blocks=_blocks(c, "decoder", len(widths)),
        decoder_norms=tuple(
            _choice("decoder_norm_types", norm, {"rms_norm": "trms2d", "batch_norm": "bn2d"})
            for norm in _stages(c, "decoder_norm_types", len(widths))
        ),
        downsample=_choice(
            "downsample_block_type", downsample, {"pixel_unshuffle": "s2c", "conv": "stride"}
        ),
        upsample=_choice(
            "upsample_block_type",
            c["upsample_block_type"],
            {"pixel_shuffle": "c2s", "interpolate": "nearest"},
        ),
        output_act=_act("decoder_conv_act_fn", c["decoder_conv_act_fn"]),
        latent_shortcuts=c["encoder_out_shortcut"],
        scaling_factor=_factor(c),
    )
    _check_decoder(c, arch)
    _check_widths(arch)
    return arch


def _check_decoder(c: dict[str, Any], arch: Variant) -> None:
    """Here the norm decides the activation; and diffusers has half a norm in some blocks."""
    acts = _stages(c, "decoder_act_fns", len(arch.widths))
    for i, norm in enumerate(arch.decoder_norms):
        if not arch.decoder_depths[i]:
            continue
        wanted = "relu" if norm == "bn2d" else "silu"
        if arch.decoder_blocks[i] == "res" and _act("decoder_act_fns", acts[i]) != wanted:
            why = f"stage {i} has the norm {norm}, which goes with {wanted} here"
            raise _bad("decoder_act_fns", c["decoder_act_fns"], why)
        if arch.decoder_blocks[i] != "res" and norm == "bn2d":
            why = f"EfficientViTBlocks, as in stage {i}, are supported with rms_norm only"
            raise _bad("decoder_norm_types", c["decoder_norm_types"], why)


def _check_widths(arch: Variant) -> None:
    key, value = "encoder_block_out_channels", list(arch.widths)
    for i, width in enumerate(arch.widths):
        blocks = [arch.encoder_blocks[i], arch.decoder_blocks[i]]
        multiple = 4 if blocks == ["res", "res"] else HEAD_DIM
        if width % multiple:
            raise _bad(key, value, f"{width} in stage {i} is no multiple of {multiple}")
    pairs = [(4 * a, b) for a, b in zip(arch.widths, arch.widths[1:], strict=False)]
    if arch.latent_shortcuts:
        pairs.append((arch.widths[-1], arch.latent_channels))
    first = 0 if arch.encoder_depths[0] or arch.decoder_depths[0] else 1
    for wide, narrow in pairs[first:]:
        if wide % narrow:
            raise _bad(key, value, f"a shortcut cannot average {wide} channels into {narrow}")


def _bad(key: str, value: Any, why: str) -> UserError:
    return UserError(f"config.json: {key}={value!r}: {why}")


def _count(c: dict[str, Any], key: str, value: Any, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise _bad(key, c[key], f"give whole numbers of at least {at_least}")
    return value


def _counts(c: dict[str, Any], key: str, *, at_least: int) -> tuple[int, ...]:
    if not isinstance(c[key], list | tuple):
        raise _bad(key, c[key], "give a list with one number a stage")
    return tuple(_count(c, key, value, at_least) for value in c[key])


def _depths(c: dict[str, Any], key: str, stages: int) -> tuple[int, ...]:
    depths = _counts(c, key, at_least=0)
    if len(depths) != stages:
        raise _bad(key, c[key], f"give one number for each of the {stages} stages")
    if 0 in depths[1:]:
        raise _bad(key, c[key], "only the first stage may be empty")
    return depths


def _stages(c: dict[str, Any], key: str, stages: int) -> tuple[Any, ...]:
    """One value a stage: a single one is for all; surplus ones are ignored, as in diffusers."""
    if isinstance(c[key], str):
        return (c[key],) * stages
    if not isinstance(c[key], list | tuple) or len(c[key]) < stages:
        raise _bad(key, c[key], f"give one value for each of the {stages} stages")
    return tuple(c[key][:stages])


def _choice(key: str, value: Any, choices: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _bad(key, value, f"only {' and '.join(choices)} are supported")
    return choices[value]


def _act(key: str, value: Any) -> str:
    return _choice(key, value, {"relu": "relu", "silu": "silu", "swish": "silu"})


def _blocks(c: dict[str, Any], side: str, stages: int) -> tuple[str, ...]:
    kinds = []
    key = f"{side}_qkv_multiscales"
    scales = _stages(c, key, stages)
    for i, block in enumerate(_stages(c, f"{side}_block_types", stages)):
        block = _choice(
            f"{side}_block_types", block, {"ResBlock": "res", "EfficientViTBlock": "evit"}
        )
        if block == "evit" and list(scales[i]) not in ([], [5]):
            raise _bad(key, c[key], "only [] and [5] are supported")
        kinds.append("evit5" if block == "evit" and list(scales[i]) == [5] else block)
    return tuple(kinds)


def _factor(c: dict[str, Any]) -> float:
    value = c["scaling_factor"]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise _bad("scaling_factor", value, "must be a number above 0")
    return float(value)


def _network(arch: Variant) -> Variant:
    """`arch` without what does not change its function: the scaling factor, an empty stage."""
    empty = {}
    for side, lists in (("encoder", ["blocks"]), ("decoder", ["blocks", "norms"])):
        if not getattr(arch, f"{side}_depths")[0]:
            for name in lists:
                empty[f"{side}_{name}"] = ("", *getattr(arch, f"{side}_{name}")[1:])
    return dataclasses.replace(arch, scaling_factor=None, **empty)


def _authors_name(arch: Variant) -> str:
    """The first published model of this architecture, one of the same scaling factor if any."""
    same = [name for name in AUTHORS_NAMES if _network(dcae.variant(name)) == _network(arch)]
    if not same:
        raise UserError(
            "the authors' format knows a model by its published name, and none has this "
            "architecture; use export.format=diffusers, orbax or stablehlo"
        )
    scaled = [name for name in same if dcae.variant(name).scaling_factor == arch.scaling_factor]
    return (scaled or same)[0]


def settings_of(arch: Variant) -> dict[str, Any]:
    """The keys of config.model that make `arch`, its scaling factor apart where no name has it.

    Raises UserError where config.model cannot express the architecture.
    """
    rows = {**dcae.VARIANTS, **{name: dcae.variant(name) for name in dcae.PUBLISHED}}
    exact = [
        name
        for name, row in rows.items()
        if _network(row) == _network(arch) and row.scaling_factor == arch.scaling_factor
    ]
    sizes = ("latent_channels", "widths", "encoder_depths", "decoder_depths")
    free = {key: getattr(arch, key) for key in (*sizes, "residual")}
    for name in [*exact, *dcae.VARIANTS]:
        row = rows[name]
        if _network(dataclasses.replace(row, **free)) == _network(arch):
            changed = {key: free[key] for key in sizes if free[key] != getattr(row, key)}
            return {"name": "dcae", "variant": name, "residual": arch.residual, **changed}
    raise UserError(
        f"no variant has these blocks: {len(arch.widths)} stages, encoder {arch.encoder_blocks}, "
        f"decoder {arch.decoder_blocks}; use a model with the layout of a row of VARIANTS"
    )
