# SPDX-License-Identifier: Apache-2.0
"""Sizes of a diffusion model that its latents determine: size, channels, classes, scale."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dcae_jax import models
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError

CLASSES = 1000  # ImageNet's, if no latents give their number


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """The keys of config.model that latents determine, under the same names."""

    latent_size: int  # latent positions per side
    latent_channels: int
    num_classes: int
    scaling_factor: float  # latents are multiplied by it before the model sees them

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "LatentSpec":
        """From the manifest of stored latents (data/latents.py)."""
        return cls(
            latent_size=manifest["latent_size"],
            latent_channels=manifest["latent_channels"],
            num_classes=manifest["num_classes"],
            scaling_factor=manifest["scaling_factor_multiplies_latent"],
        )

    @classmethod
    def of_variant(
        cls, name: str, resolution: int, num_classes: int, channels: int = 0
    ) -> "LatentSpec":
        """For images of `resolution` pixels per side, encoded by the autoencoder VARIANT `name`.

        num_classes: 0 for ImageNet's. channels: as encode.channels. Raises UserError.
        """
        arch = models.autoencoder_of(name).variant(name)
        if channels:
            models.check_channels(arch, [channels], "encode.channels")
        if resolution % arch.compression:
            raise UserError(
                f"resolution={resolution} is not a multiple of {arch.compression}, the "
                f"compression of autoencoder={name!r}"
            )
        return cls(
            latent_size=resolution // arch.compression,
            latent_channels=channels or arch.latent_channels,
            num_classes=num_classes or CLASSES,
            scaling_factor=arch.scaling_factor or 1.0,
        )

    def completed(self, model: Model, where: str) -> Model:
        """`model` with its unset keys filled in. Raises UserError if a set key does not fit.

        where: the latents' origin, for the message.
        """
        spec = dataclasses.asdict(self)
        for key, value in spec.items():
            given = getattr(model, key)
            # More classes than the data has is fine.
            enough = key == "num_classes" and given > value
            if given and given != value and not enough:
                raise UserError(
                    f"model.{key}={given} does not fit {where}, which has {value}; leave it at 0"
                )
        missing = {key: value for key, value in spec.items() if not getattr(model, key)}
        return dataclasses.replace(model, **missing)


def check_autoencoder(manifest: Mapping[str, Any], path: str, checksum: str) -> None:
    """Raises UserError unless the autoencoder at `path` is the one that made the latents."""
    if checksum != manifest["encoder_checksum"]:
        raise UserError(
            f"autoencoder={path!r} did not make these latents ({manifest['autoencoder']} did): "
            "the encoder differs; use that one, or encode again"
        )
