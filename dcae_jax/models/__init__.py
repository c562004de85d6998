# SPDX-License-Identifier: Apache-2.0
"""Networks. Each file defines its variants and initial values; `<file>_torch.py` holds the names
of its weights in PyTorch.

A file that implements models/protocol.py is a model, found here by its name or its variants.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any, cast

from dcae_jax.errors import UserError
from dcae_jax.models.protocol import (
    AutoencoderModule,
    AutoencoderNames,
    BackboneModule,
    BackboneNames,
)

DEFAULT = "dcae"


def find(model_config: Any) -> Any:
    """The model file of config.model.name; 'auto': of the variant. Raises UserError."""
    name = model_config.name
    if name == "auto":
        return autoencoder_of(model_config.variant)
    # A plain name only: it may come from an untrusted file.
    module = _imported(name) if name.isidentifier() else None
    if not hasattr(module, "architecture"):
        raise UserError(f"model.name={name!r} is not a model file in dcae_jax/models")
    return module


def autoencoder_of(variant: str) -> AutoencoderModule:
    """The file that defines the autoencoder `variant`; the DC-AE's if none does."""
    known = (module for module in autoencoders() if variant in names_in(module))
    return next(known, cast(AutoencoderModule, _imported(DEFAULT)))


def names_in(module: AutoencoderModule) -> tuple[str, ...]:
    """The variants in an autoencoder's file and their published names."""
    return (*module.VARIANTS, *getattr(module, "PUBLISHED", ()))


def is_autoencoder(module: Any) -> bool:
    """Whether a model file defines autoencoders rather than backbones."""
    return hasattr(module, "last_layer")


def check_channels(architecture: Any, channels: Iterable[int], key: str) -> None:
    """Raises UserError unless the first `channels` of an autoencoder's latent can stand alone.

    key: what asks for them, for the message.
    """
    for count in channels:
        if not 1 <= count <= architecture.latent_channels:
            raise UserError(
                f"{key}={count} is not in [1, {architecture.latent_channels}], the channels of the "
                "model's latents"
            )
        if not architecture.cuttable:
            raise UserError(
                f"{key}={count} needs a model without a latent shortcut (1.5-f32c128, 1.5-f64c128, "
                "tiny-1.5): where the shortcut averages over channels, the first ones alone are "
                "no latent; leave it out"
            )


def autoencoders() -> list[AutoencoderModule]:
    """The files in this folder that define autoencoders."""
    return [module for module in _models() if is_autoencoder(module)]


def backbones() -> list[BackboneModule]:
    """The files in this folder that define backbones of diffusion models."""
    return [module for module in _models() if not is_autoencoder(module)]


def owner(architecture: Any) -> Any:
    """The model file that defines an architecture."""
    return importlib.import_module(type(architecture).__module__)


def name_of(module: Any) -> str:
    """The name of a model file, as in config.model.name."""
    return module.__name__.rpartition(".")[2]


def autoencoder_names(module: AutoencoderModule) -> AutoencoderNames:
    """PyTorch's names for an autoencoder's weights. Raises UserError if there is no such file."""
    return _torch(module)


def backbone_names(module: BackboneModule) -> BackboneNames:
    """PyTorch's names for a backbone's weights. Raises UserError if there is no such file."""
    return _torch(module)


def has_names(module: Any) -> bool:
    """Whether a `_torch` file beside the model file has PyTorch's names for its weights."""
    return _imported(f"{name_of(module)}_torch") is not None


def _torch(module: Any) -> Any:
    name = name_of(module)
    found = _imported(f"{name}_torch")
    if found is None:
        raise UserError(f"model.name={name!r} has no {name}_torch.py: use export.format=orbax")
    return found


@functools.cache
def _models() -> list[Any]:
    names = (info.name for info in pkgutil.iter_modules(__path__))
    modules = (_imported(name) for name in names if not name.endswith("_torch"))
    return [module for module in modules if hasattr(module, "architecture")]


def _imported(name: str) -> ModuleType | None:
    full = f"{__name__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None
