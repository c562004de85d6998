# SPDX-License-Identifier: Apache-2.0
"""Checks a validated configuration against a run's model, data and devices, and completes it."""

from jax.sharding import Mesh

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.config import Config, check_resolution
from dcae_jax.data import latents as latents_lib
from dcae_jax.data.latents import Latents
from dcae_jax.diffusion.latent_spec import LatentSpec
from dcae_jax.errors import UserError, nearest_multiples
from dcae_jax.models import patchgan
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import latent_draws


def training(config: Config, mesh: Mesh) -> tuple[Config, Latents | None]:
    """(configuration completed from the latents, those latents or None) of a training run.

    An autoencoder has no latents. Raises UserError if the configuration contradicts itself or does
    not fit the model, the data or the devices.
    """
    latents = None
    if config.objective:
        config, latents = on_latents(config)
    check_training(config, mesh)
    return config, latents


def on_latents(config: Config) -> tuple[Config, Latents]:
    """(configuration completed from the latents, those latents) of a diffusion run.

    Raises UserError if there are no latents or they do not fit.
    """
    if config.data.source != "latents":
        raise UserError(
            f"data.source={config.data.source!r}: objective={config.objective!r} trains on "
            "latents; run configs/encode.py, then set data.source=latents and data.path to its "
            "workdir"
        )
    latents = latents_lib.latents(config.data.path)
    manifest = latents.manifest
    spec = LatentSpec.of_manifest(manifest)
    config = config_lib.replace(
        config,
        model=spec.completed(config.model, f"data.path={config.data.path!r}"),
        autoencoder=config.autoencoder or manifest["autoencoder"],
        resolution=manifest["resolution"],
        encode={"dtype": manifest["dtype"], "channels": manifest["latent_channels"]},
    )
    return config, latents


def on_variant(config: Config) -> Config:
    """For planning: a diffusion run's configuration completed from the VARIANT config.autoencoder.

    Raises UserError if it is not a VARIANT or its latents do not fit.
    """
    name = config.autoencoder
    try:
        models.autoencoder_of(name).variant(name)
    except UserError as error:
        raise UserError(
            f"autoencoder={name!r} is not a VARIANT, and data.source={config.data.source!r} has no "
            "latents; run configs/encode.py first and set data.source=latents and data.path"
        ) from error
    spec = LatentSpec.of_variant(
        name, config.resolution, config.model.num_classes, config.encode.channels
    )
    return config_lib.replace(config, model=spec.completed(config.model, "the autoencoder"))


def check_training(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the configuration contradicts itself, the model or the devices."""
    d = config.distill
    if (d.l1_weight or d.lpips_weight) and not d.teacher:
        raise UserError(
            f"distill.l1_weight={d.l1_weight}, lpips_weight={d.lpips_weight} need distill.teacher, "
            "which is empty; set it to the autoencoder to learn from: a workdir, an export or "
            "published weights"
        )
    sharding.check_rules(config.sharding)
    mesh_lib.check_batch(config.batch_size, mesh, key="batch_size", accumulate=config.accumulate)
    if config.objective:
        if config.mesh.spatial > 1:
            raise UserError(
                f"mesh.spatial={config.mesh.spatial} splits images, but a diffusion model trains "
                "on latents; use mesh.data, mesh.fsdp and mesh.tensor"
            )
        for count in config.augment.channels:
            if config.model.latent_channels and count > config.model.latent_channels:
                raise UserError(
                    f"augment.channels={config.augment.channels}: {count} is more than the "
                    f"{config.model.latent_channels} channels of the latents"
                )
        return
    arch = models.find(config.model).architecture(config.model)
    models.check_channels(arch, config.structured.channels, "structured.channels")
    models.check_channels(arch, config.evaluate.channels, "evaluate.channels")
    f = arch.compression
    sizes = config_lib.training_resolutions(config)
    key = "resolutions" if config.resolutions else "resolution"
    for size in sizes:
        check_resolution(size, f, key)
        mesh_lib.check_height(size, mesh, key=key, compression=f)
    if not config.evaluate.resolutions:
        raise UserError(
            "evaluate.resolutions=() is empty, but training needs a size to evaluate at; set "
            f"evaluate.resolutions=({config.resolution},)"
        )
    for size in config.evaluate.resolutions:
        check_resolution(size, f, "evaluate.resolutions")
        mesh_lib.check_height(size, mesh, key="evaluate.resolutions", compression=f)
    if config.loss.equivariance:
        sizes = [round(s * size) for size in sizes for s in _equivariance_scales(config, size, f)]
    if config.loss.gan_weight:
        groups = patchgan.GROUPS // 2  # the first norm has twice the channels
        if config.loss.gan_channels % groups:
            raise UserError(
                f"loss.gan_channels={config.loss.gan_channels} is not a multiple of {groups}; "
                f"try {nearest_multiples(config.loss.gan_channels, groups)}"
            )
        least = patchgan.smallest_input(config.loss.gan_layers)
        if min(sizes) < least:
            raise UserError(
                f"loss.gan_layers={config.loss.gan_layers} needs images of {least} pixels; "
                "use fewer layers or a higher resolution"
            )
    mesh_lib.check_batch(config.evaluate.batch_size, mesh, key="evaluate.batch_size")


def _equivariance_scales(config: Config, size: int, compression: int) -> tuple[float, ...]:
    """1, and the scales of a step on transformed latents. Raises UserError if none fits."""
    found = latent_draws.scales(config.loss, size, compression)
    if not found:
        raise UserError(
            f"loss.equivariance_scales={config.loss.equivariance_scales}: none of them leaves a "
            f"multiple of f={compression} of {size} pixels; name one that does, or () for turns"
        )
    return (1.0, *found)
