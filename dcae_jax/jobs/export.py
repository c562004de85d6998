# SPDX-License-Identifier: Apache-2.0
"""The job `export`: weights in our format or another program's, or as a StableHLO program.

Every export is written to a temporary folder, read back and compared, and only then renamed.
"""

import dataclasses
import functools
import logging
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files, models
from dcae_jax.api import autoencoder, generator
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config import Config
from dcae_jax.config.schema import Job, MeshSizes, Model
from dcae_jax.errors import UserError
from dcae_jax.models import quantized
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import Arrays, AutoencoderArchitecture
from dcae_jax.pretrained import export_formats
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib

# The exported numbers do not depend on the number of devices.
ONE_DEVICE = MeshSizes(data=1, fsdp=1, tensor=1, spatial=1)


def run(config: Config, workdir: str) -> int:
    """Runs the job. Raises UserError for a model that the format cannot express."""
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to the weights to export")
    out = files.absolute(config.export.out or os.path.join(workdir, "export"))
    if os.path.islink(out):
        raise UserError(f"export.out={out!r} is a link; name a folder that is new or empty")
    if not files.is_free(out):
        raise UserError(f"export.out={out!r} exists and is not empty; name another folder")
    files.check_folder(out)
    if checkpoint_weights.kind_of(config.init_from) == "generator":
        writer = functools.partial(write_generator, config, _load_generator(config))
    else:
        weights, saved = checkpoint_weights.load_weights(
            config.init_from, config.weights, config.model.variant
        )
        if factor := config.model.scaling_factor:  # the user's comes before that of the weights
            model = dataclasses.replace(saved.model, scaling_factor=factor)
            saved = dataclasses.replace(saved, model=model)
        if channels := config.export.channels:
            module = models.find(saved.model)
            models.check_channels(module.architecture(saved.model), [channels], "export.channels")
            weights = module.cut(weights, channels)
            saved = dataclasses.replace(
                saved, model=dataclasses.replace(saved.model, latent_channels=channels)
            )
        writer = functools.partial(write, config_lib.replace(config, model=saved.model), weights)
    with files.atomic_folder(out) as beside:
        worst = writer(beside)
    size = sum(files.sizes(out).values())
    logging.info(
        "wrote %s: %s, %.1f MB; largest difference after reading it back: %.3g",
        out,
        config.export.format,
        size / 1e6,
        worst,
    )
    return 0


def write(config: Config, weights: Arrays, folder: str) -> float:
    """Writes `weights` of config.model to `folder` in config.export.format, and reads them back.

    Returns the largest difference: of the weights, or of the exported program's outputs.
    """
    arch = models.find(config.model).architecture(config.model)
    mesh = mesh_lib.make_mesh(ONE_DEVICE, jax.devices()[:1])
    _, params, stats = weights_lib.split(
        state_lib.abstract_model(config.model, mesh, dtype=config.dtype)
    )
    state_lib.check_weights(weights, {**params, **stats})
    if config.export.dtype == "float16":
        weights = _half(config, weights, set(params))
    meta = _autoencoder_meta(config.model, arch, _provenance(config), config.export.dtype)
    if config.export.quantize:
        weights, more = _quantize(config, weights, mesh)
        meta |= more
    if config.export.format == "stablehlo":
        return _write_stablehlo(config, mesh, weights, meta, folder)
    if config.export.format == "orbax":
        checkpoint_weights.save_export(folder, weights, meta)
    else:
        export_formats.write_torch(config.export.format, weights, arch, folder)
    back, _ = checkpoint_weights.load_weights(folder, quantized=True)
    return _equal(export_formats.max_difference(weights, back))


def _quantize(config: Config, weights: Arrays, mesh: Mesh) -> tuple[Arrays, dict[str, Any]]:
    """(the weights as config.export says, what model.json says about it). Raises UserError."""
    form, calibrate = config.export.quantize, config.export.calibrate or None
    ae = autoencoder.build_autoencoder(config.model, weights.items(), mesh, "float32")
    try:
        ae = ae.quantized_as(form, calibrate)
    except UserError as error:
        text = str(error).replace("quantize=", "export.quantize=")
        raise UserError(text.replace("calibrate=", "export.calibrate=")) from error
    meta = {"quantize": form, "encoder_checksum": ae.encoder_checksum, "calibrate": calibrate}
    return {name: np.asarray(value) for name, value in ae.weights.items()}, meta


def _write_stablehlo(
    config: Config, mesh: Mesh, weights: Arrays, meta: dict[str, Any], folder: str
) -> float:
    """Writes a platform-independent program: grouped depthwise convolutions, and float32 unless
    config.dtype is set. Returns the largest difference of its outputs.
    """
    if config.dtype == "auto":
        config = config_lib.replace(config, dtype="float32")
    if config.model.depthwise == "auto":
        config = config_lib.replace(config, model={"depthwise": "grouped"})
    layers = state_lib.abstract_model(config.model, mesh, dtype=config.dtype)
    if config.export.quantize:
        quantized.replace(layers, quantized.form(config.export.quantize))
    graphdef, _, _ = weights_lib.split(layers)
    arch = models.find(config.model).architecture(config.model)
    return export_formats.write_stablehlo(graphdef, weights, arch, meta, folder, config.dtype)


def _equal(worst: float) -> float:
    if worst:
        raise RuntimeError(f"the export differs by {worst:.3g} when read back; nothing was kept")
    return worst


def _half(config: Config, weights: Arrays, params: set[str]) -> Arrays:
    """`weights`, the parameters in float16; statistics stay float32. Raises UserError."""
    if config.export.format == "stablehlo":
        raise UserError("export.dtype='float16': a StableHLO program takes float32; leave it out")
    with np.errstate(over="ignore"):
        half = {k: v.astype(np.float16) if k in params else v for k, v in weights.items()}
    if over := [name for name, value in half.items() if not np.isfinite(value).all()]:
        raise UserError(f"export.dtype='float16': {over[0]} exceeds its range; export in float32")
    return half


def _autoencoder_meta(
    model: Model,
    arch: AutoencoderArchitecture,
    provenance: dict[str, Any],
    dtype: str = "float32",
) -> dict[str, Any]:
    """The contents of an autoencoder's model.json."""
    return {
        "kind": "autoencoder",
        "variant": model.variant,
        "model": config_lib.to_json(model),
        "compression": arch.compression,
        "latent_channels": arch.latent_channels,
        "scaling_factor": arch.scaling_factor,
        "scaling": "latents times scaling_factor have an rms of about 1; encode does not scale",
        "dtype": dtype,
        "layout": "images [B, H, W, 3] in [-1, 1], latents [B, H/f, W/f, c]",
        "provenance": provenance,
    }


def _provenance(job: Job) -> dict[str, Any]:
    return {
        "source": job.init_from,
        "weights": job.weights,
        "versions": {"dcae_jax": dcae_jax.__version__, "jax": jax.__version__},
    }


# --- diffusion models -----------------------------------------------------------------------------

# Formats that cannot hold a diffusion model, with the reason.
NO_GENERATOR = {
    "diffusers": "diffusers has no UViT of this kind, and its DiT pipeline takes no DC-AE",
    "stablehlo": "the program would fix labels, guidance, sampler and steps",
}


def _load_generator(config: Config) -> generator.Generator:
    """The diffusion model of config.init_from with its autoencoder.

    Raises UserError if the format cannot hold it.
    """
    form = config.export.format
    if config.export.quantize:
        raise UserError(
            f"export.quantize={config.export.quantize!r} is for autoencoders, and init_from="
            f"{config.init_from!r} is a diffusion model; leave it out"
        )
    if config.export.channels:
        raise UserError(
            f"export.channels={config.export.channels} is for autoencoders, and init_from="
            f"{config.init_from!r} is a diffusion model; leave it out"
        )
    if config.export.dtype != "float32":
        raise UserError(
            f"export.dtype={config.export.dtype!r} is for autoencoders, and init_from="
            f"{config.init_from!r} is a diffusion model; leave it out"
        )
    if form in NO_GENERATOR:
        raise UserError(
            f"export.format={form!r} is for autoencoders, and init_from={config.init_from!r} is a "
            f"diffusion model: {NO_GENERATOR[form]}; use orbax or authors"
        )
    return generator.load_generator(
        config.init_from,
        autoencoder=config.autoencoder,
        dtype="float32",
        mesh=mesh_lib.make_mesh(ONE_DEVICE, jax.devices()[:1]),
        weights=config.weights,
        variant=config.model.variant,
        resolution=config.resolution,
    )


def write_generator(config: Config, model: generator.Generator, folder: str) -> float:
    """Writes a diffusion model with its autoencoder to `folder`, and reads both back.

    Returns the largest difference of the weights.
    """
    if model.autoencoder.quantize:
        raise UserError(
            f"the autoencoder of init_from={config.init_from!r} is {model.autoencoder.quantize}; "
            "give autoencoder= the weights that it was made from"
        )
    weights, inner = (
        {name: np.asarray(value) for name, value in part.items()}
        for part in (model.weights, model.autoencoder.weights)
    )
    if config.export.format == "orbax":
        _write_generator_orbax(_provenance(config), model, weights, inner, folder)
    else:
        export_formats.write_authors_generator(
            models.find(model.model_config),
            weights,
            model.architecture,
            folder,
            objective=model.objective,
            resolution=model.resolution,
            scaling_factor=model.scaling_factor,
            autoencoder=(inner, model.autoencoder.architecture),
        )
    back, saved = checkpoint_weights.load_weights(folder, kind="generator")
    again = state_lib.architecture(saved.model, saved.diffusion)
    if (saved.diffusion.objective, again) != (model.objective, model.architecture):
        raise RuntimeError(f"the export reads back as another model, {saved}; nothing was kept")
    worst = export_formats.max_difference(weights, back)
    if saved.diffusion.autoencoder:
        read, _ = checkpoint_weights.load_weights(saved.diffusion.autoencoder)
        worst = max(worst, export_formats.max_difference(inner, read))
    return _equal(worst)


def _write_generator_orbax(
    provenance: dict[str, Any],
    model: generator.Generator,
    weights: Arrays,
    inner: Arrays,
    folder: str,
) -> None:
    """Writes model.json, params/ and autoencoder/, which is an export of its own."""
    ae, arch = model.autoencoder, model.architecture
    meta = {
        "kind": "generator",
        "variant": model.model_config.variant,
        "model": config_lib.to_json(model.model_config),
        "objective": model.objective,
        "patch_size": arch.patch_size,
        "resolution": model.resolution,
        "num_classes": model.num_classes,
        "scaling_factor_multiplies_latent": model.scaling_factor,
        "scaling": "the model's latents are the encoder's times this; divide before decoding",
        "latents": {
            "autoencoder": os.path.join(os.curdir, checkpoint_weights.AUTOENCODER),
            "encoder_checksum": checkpoint_weights.encoder_checksum(inner),
        },
        "dtype": "float32",
        "provenance": provenance,
    }
    within = os.path.join(folder, checkpoint_weights.AUTOENCODER)
    os.makedirs(within)
    inner_meta = _autoencoder_meta(ae.model_config, ae.architecture, provenance)
    checkpoint_weights.save_export(within, inner, inner_meta)
    checkpoint_weights.save_export(folder, weights, meta)
