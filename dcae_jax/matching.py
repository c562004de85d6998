# SPDX-License-Identifier: Apache-2.0
"""What a diffusion model must share with the latents it learns: size, channels, classes, scale."""

from collections.abc import Mapping
from typing import Any

from dcae_jax import models
from dcae_jax.config import UserError

CLASSES = 1000  # of ImageNet, where there are no latents to count


def complete(config: Any, manifest: Mapping[str, Any] | None) -> Any:
    """A copy of the configuration of a diffusion run with what its latents fix.

    manifest: of the latents to train on (`data.Latents`). None is for planning: then
    config.autoencoder is a VARIANT, and with config.resolution gives the shapes alone.
    Raises UserError where a key that is set contradicts the latents.
    """
    config = config.copy_and_resolve_references()
    if manifest is None:
        fixed = _of_variant(config)
    else:
        fixed = {
            "latent_size": manifest["latent_size"],
            "latent_channels": manifest["latent_channels"],
            "num_classes": manifest["num_classes"],
            "scaling_factor": manifest["scaling_factor_multiplies_latent"],
        }
        config.autoencoder = config.autoencoder or manifest["autoencoder"]
        config.resolution = manifest["resolution"]
        config.encode.dtype = manifest["dtype"]
    for key, value in fixed.items():
        given = config.model[key]
        # A class without examples so far is none's harm.
        if given and given != value and not (key == "num_classes" and given > value):
            where = f"data.path={config.data.path!r}" if manifest else "the autoencoder"
            raise UserError(f"model.{key}={given} does not fit {where}, which has {value}; leave 0")
        config.model[key] = given or value
    return config


def _of_variant(config: Any) -> dict[str, Any]:
    name = config.autoencoder
    try:
        arch = models.autoencoder_of(name).variant(name)
    except UserError as error:
        raise UserError(
            f"autoencoder={name!r} is no VARIANT, and data.source={config.data.source!r} has no "
            "latents; run configs/encode.py first and set data.source=latents and data.path"
        ) from error
    if config.resolution % arch.compression:
        raise UserError(
            f"resolution={config.resolution} is no multiple of {arch.compression}, the "
            f"compression of autoencoder={name!r}"
        )
    return {
        "latent_size": config.resolution // arch.compression,
        "latent_channels": arch.latent_channels,
        "num_classes": config.model.num_classes or CLASSES,
        "scaling_factor": arch.scaling_factor or 1.0,
    }


def check_autoencoder(manifest: Mapping[str, Any], path: str, checksum: str) -> None:
    """Raises UserError unless the autoencoder at `path` is the one that made the latents."""
    if checksum != manifest["encoder_checksum"]:
        raise UserError(
            f"autoencoder={path!r} did not make these latents ({manifest['autoencoder']} did): "
            "the encoder differs; name that one, or encode again"
        )
