# SPDX-License-Identifier: Apache-2.0
"""What a diffusion model shares with the latents it learns: size, channels, classes, scale."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.config import Config
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError

CLASSES = 1000  # ImageNet's, where there are no latents to count


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """What latents determine of a model: config.model's keys of the same names."""

    latent_size: int  # latent positions per side
    latent_channels: int
    num_classes: int
    scaling_factor: float  # latents are multiplied by it before the model sees them

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "LatentSpec":
        """Of stored latents (`latents.py`)."""
        return cls(
            latent_size=manifest["latent_size"],
            latent_channels=manifest["latent_channels"],
            num_classes=manifest["num_classes"],
            scaling_factor=manifest["scaling_factor_multiplies_latent"],
        )

    @classmethod
    def of_variant(cls, name: str, resolution: int, num_classes: int) -> "LatentSpec":
        """Of images of `resolution` pixels through the autoencoder VARIANT `name`.

        num_classes: 0 for ImageNet's. Raises UserError.
        """
        arch = models.autoencoder_of(name).variant(name)
        if resolution % arch.compression:
            raise UserError(
                f"resolution={resolution} is no multiple of {arch.compression}, the "
                f"compression of autoencoder={name!r}"
            )
        return cls(
            latent_size=resolution // arch.compression,
            latent_channels=arch.latent_channels,
            num_classes=num_classes or CLASSES,
            scaling_factor=arch.scaling_factor or 1.0,
        )


def resolve_latent_spec(config: Config, manifest: Mapping[str, Any] | None) -> Config:
    """A copy of the configuration of a diffusion run, completed with what its latents determine.

    manifest: of the latents to train on (`data.Latents`). None is for planning: then
    config.autoencoder is a VARIANT, and with config.resolution determines the shapes alone.
    Raises UserError where a key that is set contradicts the latents.
    """
    if manifest is None:
        _check_variant(config.autoencoder, config.data.source)
        spec = LatentSpec.of_variant(
            config.autoencoder, config.resolution, config.model.num_classes
        )
        where = "the autoencoder"
    else:
        spec, where = LatentSpec.of_manifest(manifest), f"data.path={config.data.path!r}"
    config = config_lib.replace(config, model=_merged(config.model, spec, where))
    if manifest is None:
        return config
    return config_lib.replace(
        config,
        autoencoder=config.autoencoder or manifest["autoencoder"],
        resolution=manifest["resolution"],
        encode={"dtype": manifest["dtype"]},
    )


def _merged(model: Model, spec: LatentSpec, where: str) -> dict[str, Any]:
    """The keys of a spec: what `model` has, or else the spec's. Raises UserError."""
    merged = {}
    for key, value in dataclasses.asdict(spec).items():
        given = getattr(model, key)
        # More classes than the data has is fine.
        enough = key == "num_classes" and given > value
        if given and given != value and not enough:
            raise UserError(f"model.{key}={given} does not fit {where}, which has {value}; leave 0")
        merged[key] = given or value
    return merged


def _check_variant(name: str, source: str) -> None:
    """Raises UserError unless `name` is an autoencoder's VARIANT."""
    try:
        models.autoencoder_of(name).variant(name)
    except UserError as error:
        raise UserError(
            f"autoencoder={name!r} is no VARIANT, and data.source={source!r} has no "
            "latents; run configs/encode.py first and set data.source=latents and data.path"
        ) from error


def check_autoencoder(manifest: Mapping[str, Any], path: str, checksum: str) -> None:
    """Raises UserError unless the autoencoder at `path` is the one that made the latents."""
    if checksum != manifest["encoder_checksum"]:
        raise UserError(
            f"autoencoder={path!r} did not make these latents ({manifest['autoencoder']} did): "
            "the encoder differs; name that one, or encode again"
        )
