# SPDX-License-Identifier: Apache-2.0
"""Networks that the loss uses and no step changes: LPIPS, and the teacher of config.distill.

The teacher is an autoencoder with the run's encoder; the run, its student, trains another decoder.
"""

import dataclasses
import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import files, models
from dcae_jax.checkpoints import weights as weights_lib
from dcae_jax.config import Config
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models import lpips_torch
from dcae_jax.models import weights as model_weights
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import losses
from dcae_jax.training import state as state_lib
from dcae_jax.training.state import TeacherSpec, TrainSpec

ENCODER = rf"({'|'.join(map(re.escape, weights_lib.ENCODER))}).*"  # as in init_parts


def lpips_weights(config: Config, mesh: Mesh) -> Weights:
    """The weights of the perceptual loss, on the mesh; {} for a loss without it.

    Raises UserError if the loss needs a file that does not exist.
    """
    if not losses.uses_lpips(config):
        return {}
    if not config.loss.lpips_weights:
        section = "loss" if config.loss.lpips_weight else "distill"
        weight = config.loss.lpips_weight or config.distill.lpips_weight
        raise UserError(
            f"{section}.lpips_weight={weight} needs loss.lpips_weights: download "
            "vgg16-397923af.pth (torchvision), run `dcae-jax convert "
            "vgg16-397923af.pth --out=lpips-vgg.safetensors` and name that file; or set "
            f"{section}.lpips_weight=0"
        )
    try:
        weights = lpips_torch.load(files.local(config.loss.lpips_weights), "vgg")
    except (OSError, ValueError) as error:
        raise UserError(f"loss.lpips_weights={config.loss.lpips_weights!r}: {error}") from error
    everywhere = mesh_lib.replicated(mesh)
    return {name: mesh_lib.host_to_global(value, everywhere) for name, value in weights.items()}


# --- a teacher ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A loaded teacher."""

    decoder: Weights  # on the mesh; the encoder's are the student's
    checksum: str  # of all its weights
    encoder_checksum: str


def load_teacher(config: Config, spec: TrainSpec, mesh: Mesh) -> tuple[TrainSpec, Teacher | None]:
    """(`spec` with the teacher of config.distill, its weights); None without one.

    Raises UserError if it cannot be loaded or cannot teach this run's model.
    """
    if not config.distill.teacher:
        return spec, None
    try:
        weights, saved = weights_lib.load_weights(config.distill.teacher, config.weights)
    except UserError as error:
        raise UserError(str(error).replace("init_from", "distill.teacher", 1)) from error
    spec = with_teacher(spec, config, saved.model, mesh)
    assert spec.teacher is not None
    ours = {**spec.params, **spec.stats}
    encoder = {path: ours[path] for path in spec.teacher.encoder}
    state_lib.check_weights(weights, {**encoder, **spec.teacher.decoder})
    decoder = {
        name: mesh_lib.host_to_global(weights[name], leaf.sharding)
        for name, leaf in spec.teacher.decoder.items()
    }
    checksums = weights_lib.checksum(weights), weights_lib.encoder_checksum(weights)
    return spec, Teacher(decoder, *checksums)


def of_variant(config: Config, spec: TrainSpec, mesh: Mesh) -> TrainSpec:
    """For planning: `spec` with a teacher of the VARIANT config.distill.teacher, if it is set."""
    name = config.distill.teacher
    if not name:
        return spec
    if name not in models.names_in(models.autoencoder_of(name)):
        raise UserError(
            f"distill.teacher={name!r} is not a VARIANT, which planning needs; add "
            "'distill.teacher=f32c32-sana' or another to plan.overrides"
        )
    return with_teacher(spec, config, Model(variant=name), mesh)


def with_teacher(spec: TrainSpec, config: Config, teacher: Model, mesh: Mesh) -> TrainSpec:
    """`spec` of a student of `teacher`.

    Raises UserError unless the encoder is the same network and stays frozen.
    """
    name = f"distill.teacher={config.distill.teacher!r}"
    latent = "f{0.compression}c{0.latent_channels}".format
    ours, theirs = (latent(models.find(m).architecture(m)) for m in (config.model, teacher))
    if ours != theirs:
        raise UserError(
            f"{name} has latents of {theirs}, but the student {config.model.variant} decodes "
            f"{ours}; choose a variant with the same latents"
        )
    teacher = dataclasses.replace(teacher, depthwise=config.model.depthwise)
    if _encoder(teacher, config, mesh) != _encoder(config.model, config, mesh):
        raise UserError(
            f"{name} ({teacher.variant}) has another encoder than the student "
            f"{config.model.variant}; choose a variant that differs in its decoder alone"
        )
    trained = sorted(path for path in spec.trained if path.startswith(weights_lib.ENCODER))
    if trained:
        raise UserError(
            f"trainable={config.trainable} trains {trained[0]!r}, but {name} needs its encoder "
            r"frozen; use ('decoder\..*',)"
        )
    model = state_lib.abstract_model(teacher, mesh, dtype=config.dtype, rules=config.sharding)
    graphdef, params, stats = model_weights.split(model)
    shapes = {**params, **stats}
    encoder = frozenset(path for path in shapes if path.startswith(weights_lib.ENCODER))
    decoder = {path: leaf for path, leaf in shapes.items() if path not in encoder}
    decoder = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        decoder,
        sharding.state_shardings(decoder, config.sharding, mesh),
    )
    return dataclasses.replace(spec, teacher=TeacherSpec(graphdef, encoder, decoder))


def _encoder(model: Model, config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, dict]:
    """(the graphdef of the model's encoder, the shapes of what latents depend on)."""
    module: Any = state_lib.abstract_model(model, mesh, dtype=config.dtype)
    _, params, stats = model_weights.split(module)
    shapes = {
        path: leaf.shape
        for path, leaf in {**params, **stats}.items()
        if path.startswith(weights_lib.ENCODER)
    }
    return nnx.graphdef(module.encoder), shapes
