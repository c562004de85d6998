# SPDX-License-Identifier: Apache-2.0
"""Published PyTorch weights: identifies the model they belong to and converts them to ours.

`read` is for autoencoders, `read_generator` for diffusion models. Both use the `*_torch.py` beside
each model in dcae_jax/models; no model is hard-coded here.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from dcae_jax import models
from dcae_jax.config.schema import Diffusion, Model
from dcae_jax.errors import UserError
from dcae_jax.models.protocol import (
    Arrays,
    AutoencoderArchitecture,
    AutoencoderNames,
    BackboneArchitecture,
    BackboneModule,
    BackboneNames,
)
from dcae_jax.pretrained import hub


@dataclasses.dataclass(frozen=True)
class Saved:
    """The model that weights belong to, as the files beside them describe it."""

    model: Model
    diffusion: Diffusion = Diffusion()  # objective '' for an autoencoder
    # Provenance of the latents that a diffusion model was trained on: `autoencoder` (a path) and
    # `encoder_checksum`, of a run the rest of the manifest too. None where unknown.
    latents: Mapping[str, Any] | None = None
    quantize: str = ""  # a key of quantized.FORMS, of an export that was quantised
    float_encoder: str = ""  # its encoder's checksum before that

    @property
    def kind(self) -> str:
        return "generator" if self.diffusion.objective else "autoencoder"


def read(path: str, variant: str = "") -> tuple[Arrays, Saved]:
    """(weights by path, their model) of a published autoencoder: folder, file or hub name.

    variant: of the weights; needed for files whose tensors are ambiguous, otherwise checked. The
    scaling factor is that of config.json if it states one; a published name with another one is an
    error. The config.json beside a file counts if it describes the file's tensors. Arrays are
    NumPy, float32. Raises UserError.
    """
    config, tensors = hub.read_tensors(path)
    if any(name.startswith(AUTOENCODER_PREFIX) for name in tensors):
        config, tensors = _inside(config, tensors)
    try:
        if os.path.isfile(path):
            config = _of_file(path, config, tensors, variant)
        names, arch, form = _identify(tensors, config, variant)
        weights = names.from_torch(tensors, arch, form)
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error
    model = model_settings(arch)
    logging.info("read %s weights (format: %s) from %s", model.variant, form, path)
    return weights, Saved(model)


def named(saved: Saved, variant: str) -> Saved:
    """`saved`, of a run or an export, with the scaling factor of `variant` if it has none.

    Raises UserError if the variant, '' for none, contradicts it.
    """
    model = saved.model
    if not variant or (saved.kind == "generator" and variant == model.variant):
        return saved
    if saved.kind == "generator":
        raise UserError(_another_model(variant, f"these weights, of {model.variant}"))
    arch, own = (models.find(m).architecture(m) for m in (Model(variant=variant), model))
    if variant != model.variant and _network(arch) != _network(own):
        raise UserError(_another_model(variant, f"these weights, of {model.variant}"))
    factor = _agreed_factor(variant, arch.scaling_factor, own.scaling_factor, "these weights have")
    if factor == own.scaling_factor:
        return saved
    return dataclasses.replace(saved, model=dataclasses.replace(model, scaling_factor=factor))


def _identify(
    tensors: Mapping[str, Any], config: dict[str, Any] | None, variant: str
) -> tuple[AutoencoderNames, AutoencoderArchitecture, str]:
    """(names, architecture, format) of tensors and the config.json beside them."""
    if variant:
        module = models.autoencoder_of(variant)
        names, arch = models.autoencoder_names(module), module.variant(variant)
        described = _described(config)
        if described and described != _network(arch):
            where = f"config.json beside the weights, of {described.variant}"
            raise UserError(_another_model(variant, where))
        stated = _stated_factor(config or {}, names)
        words = "config.json beside the weights states"
        factor = _agreed_factor(variant, arch.scaling_factor, stated, words)
        arch = dataclasses.replace(arch, scaling_factor=factor)
    elif config is None:
        return _guess(tensors)
    else:
        names = _names_of(config)
        form = "authors" if "model_name" in config else "diffusers"
        return names, names.variant_of(config, form), form
    return names, arch, _form(names, tensors)


def _another_model(variant: str, where: str) -> str:
    return f"variant={variant!r} is another model than that of {where}; leave the variant out"


def _agreed_factor(
    variant: str, ours: float | None, theirs: float | None, words: str
) -> float | None:
    """The scaling factor of weights, `theirs`, or else of the variant, `ours`.

    Raises UserError if the variant is a published name and they differ.
    """
    row = variant in models.autoencoder_of(variant).VARIANTS
    if theirs and ours and theirs != ours and not row:
        raise UserError(
            f"variant={variant!r} has the scaling factor {ours}, but {words} {theirs}; leave the "
            "variant out"
        )
    return theirs or ours


def _network(arch: Any) -> Model:
    """Equal for architectures that differ in the scaling factor alone."""
    return model_settings(dataclasses.replace(arch, scaling_factor=None))


def _described(config: Mapping[str, Any] | None) -> Model | None:
    """The network of the autoencoder that a config.json describes; None if it describes none."""
    config = config or {}
    form = "authors" if "model_name" in config else "diffusers"
    for names in _all_names():
        if form == "authors" or config.get("_class_name") == names.CLASS_NAME:
            with contextlib.suppress(UserError):  # a name or a field that is not known here
                return _network(names.variant_of(config, form))
    return None


def _of_file(
    path: str, config: dict[str, Any] | None, tensors: Mapping[str, Any], variant: str
) -> dict[str, Any] | None:
    """The config.json beside a file if it is of these tensors, as far as they tell; else None."""
    described = _described(config)
    if described:
        try:
            found = _network(_identify(tensors, None, variant)[1])
        except UserError:  # no variant has these tensors: config.json is all that there is
            return config
        if found == described:
            logging.info("%s: read with the config.json beside it", path)
            return config
    if config is not None:
        logging.warning("%s: read without the config.json beside it, of another model", path)
    return None


def _stated_factor(config: Mapping[str, Any], names: AutoencoderNames) -> float | None:
    """The scaling factor of a config.json or of its model_name; None if neither states one."""
    if "model_name" in config:
        with contextlib.suppress(UserError):  # a name that is not listed here
            return names.variant_of(config, "authors").scaling_factor
        return None
    factor = config.get("scaling_factor")
    if isinstance(factor, int | float) and factor > 0 and factor != 1:  # 1: unknown to diffusers
        return float(factor)
    return None


def _form(names: AutoencoderNames, tensors: Mapping[str, Any]) -> str:
    found = names.format_of(tensors)
    return found if found in names.FORMATS else names.FORMATS[0]


def _all_names() -> list[AutoencoderNames]:
    modules = [module for module in models.autoencoders() if models.has_names(module)]
    return [models.autoencoder_names(module) for module in modules]


def _names_of(config: Mapping[str, Any]) -> AutoencoderNames:
    """The names of config.json's class; DC-AE's if it states none."""
    found = (names for names in _all_names() if names.CLASS_NAME == config.get("_class_name"))
    default = models.autoencoder_names(models.autoencoder_of(""))
    return next(found, default)


def _guess(
    tensors: Mapping[str, Any],
) -> tuple[AutoencoderNames, AutoencoderArchitecture, str]:
    """The variant that has exactly these tensors; its scaling factor stays unknown."""
    for names in _all_names():
        arch = names.recognise(tensors)
        if arch is not None:
            return names, arch, _form(names, tensors)
    found = [name for name in tensors if not name.endswith("num_batches_tracked")]
    known = ", ".join(name for module in models.autoencoders() for name in module.VARIANTS)
    raise UserError(
        f"a bare file with {len(found)} tensors ({', '.join(found[:2])}, ...) that match "
        f"no variant; set variant= to one of {known} or a published name"
    )


def model_settings(arch: AutoencoderArchitecture) -> Model:
    """The full config.model of the architecture `arch`, including its scaling factor."""
    module = models.owner(arch)
    settings = Model(**models.autoencoder_names(module).settings_of(arch))
    if module.architecture(settings).scaling_factor != arch.scaling_factor:
        return dataclasses.replace(settings, scaling_factor=arch.scaling_factor or 1.0)
    return settings


# --- diffusion models -----------------------------------------------------------------------------

AUTOENCODER_PREFIX = "autoencoder."
HUB_OWNER = "mit-han-lab"  # where the authors publish the autoencoders that their names refer to


def read_generator(path: str, variant: str = "") -> tuple[Arrays, Saved]:
    """(weights by path, their model) of a published UViT, USiT or DiT: folder, file or hub name.

    Objective, autoencoder and its scaling factor come from the config.json beside the weights, as
    far as its model_name tells; without it a UViT is assumed to predict epsilon, since a USiT has
    the same tensors. model.latent_size is 0 if the weights do not determine it (a DiT without its
    fixed position table).
    variant: gives the number of heads; needed if no variant has the model's width, otherwise
    checked. From a trainer's file the averaged weights are read. Raises UserError.
    """
    config, tensors = hub.read_tensors(path)
    try:
        module, arch, prefix = _recognise(tensors, variant)
        names = models.backbone_names(module)
        weights = names.from_torch(tensors, arch, prefix)
        model = _generator_settings(module, arch, variant)
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error
    name = str((config or {}).get("model_name", ""))
    if os.path.isfile(path) and not re.search(rf"(^|-)({'|'.join(names.KINDS.values())})-", name):
        name = ""  # the config.json beside the file is of another model
    autoencoder = _autoencoder_of(name)
    if autoencoder:
        inside = any(key.startswith(AUTOENCODER_PREFIX) for key in tensors)
        factor = _stated_factor({"model_name": autoencoder}, _names_of({}))
        model = dataclasses.replace(model, scaling_factor=factor or 0.0)
        autoencoder = path if inside else f"{HUB_OWNER}/{autoencoder}"
    logging.info("read %s %s weights from %s", model.name, model.variant, path)
    diffusion = Diffusion(
        objective=_objective(names, arch, name), patch_size=arch.patch_size, autoencoder=autoencoder
    )
    return weights, Saved(model, diffusion)


def kind_of(path: str) -> str:
    """'generator' if the tensors of a folder, file or hub name contain a backbone.

    Otherwise 'autoencoder', without looking further. Raises UserError if there are no tensors.
    """
    _, tensors = hub.read_tensors(path)
    first = [names.FIRST for _, names in _backbones()]
    found = any(prefix + name in tensors for prefix in _prefixes() for name in first)
    return "generator" if found else "autoencoder"


def _backbones() -> list[tuple[BackboneModule, BackboneNames]]:
    modules = [module for module in models.backbones() if models.has_names(module)]
    return [(module, models.backbone_names(module)) for module in modules]


def _prefixes() -> list[str]:
    """Name prefixes in the hub's folders and in files of the authors' trainers; U-ViT's and DiT's
    own files have none.
    """
    own = [f"{models.name_of(module)}." for module, _ in _backbones()]
    return ["diffusion_model.", *own, "0.", ""]


def _recognise(
    tensors: Mapping[str, Any], variant: str
) -> tuple[BackboneModule, BackboneArchitecture, str]:
    """(the backbone's module, architecture, prefix of the names) of tensors."""
    for prefix in _prefixes():
        for module, names in _backbones():
            row = module.VARIANTS.get(variant)
            arch = names.recognise(tensors, row.heads if row else 0, prefix)
            if arch is None:
                continue
            if variant and row is None:
                raise UserError(
                    f"variant={variant!r} is not a size of {models.name_of(module)}; "
                    f"choose one of {', '.join(module.VARIANTS)}"
                )
            known = [v for v in module.VARIANTS.values() if v.width == arch.width]
            if row and known and row.width != arch.width:
                raise UserError(
                    f"variant={variant!r} has {row.width} channels, but these weights have "
                    f"{arch.width}; leave it out"
                )
            if arch.width % arch.heads:
                raise UserError(
                    f"variant={variant!r} has {arch.heads} heads, which do not divide the width "
                    f"of {arch.width}; choose another"
                )
            return module, arch, prefix
    known = " nor a ".join(sorted((names.TITLE for _, names in _backbones()), reverse=True))
    raise UserError(
        f"{len(tensors)} tensors ({', '.join(list(tensors)[:2])}, ...) that match neither a {known}"
    )


def _objective(
    names: BackboneNames, arch: BackboneArchitecture, model_name: str
) -> Literal["epsilon", "learned_sigma", "flow"]:
    """What a published model predicts, by its name or, without one, by its output channels."""
    flows = "|".join(n.KINDS["flow"] for _, n in _backbones() if "flow" in n.KINDS)
    if re.search(rf"(^|-)({flows})-", model_name):
        return "flow"
    if arch.out_channels == 2 * arch.latent_channels:
        return "learned_sigma"
    return "epsilon" if "epsilon" in names.KINDS else "flow"


def _generator_settings(module: BackboneModule, arch: BackboneArchitecture, variant: str) -> Model:
    """The full config.model of a backbone of the architecture `arch`."""
    rows = module.VARIANTS
    variant = variant or next(name for name, row in rows.items() if row.width == arch.width)
    sizes = {key: getattr(arch, key) for key in ("depth", "width", "heads")}
    return Model(
        name=models.name_of(module),
        variant=variant,
        latent_size=arch.latent_size,
        latent_channels=arch.latent_channels,
        num_classes=arch.num_classes,
        **{key: size for key, size in sizes.items() if size != getattr(rows[variant], key)},
    )


def _autoencoder_of(model_name: str) -> str:
    """The published autoencoder in the name of a published diffusion model; '' if there is none."""
    kinds = "|".join(kind for _, names in _backbones() for kind in names.KINDS.values())
    found = re.match(rf"(.+?)-({kinds})-", model_name)
    return found.group(1) if found else ""


def _inside(
    config: dict[str, Any] | None, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(config.json, tensors) of the autoencoder stored in the same file as a diffusion model."""
    name = _autoencoder_of(str((config or {}).get("model_name", "")))
    own = {
        key.removeprefix(AUTOENCODER_PREFIX): tensor
        for key, tensor in tensors.items()
        if key.startswith(AUTOENCODER_PREFIX)
    }
    return {"model_name": name} if name else None, own
