# SPDX-License-Identifier: Apache-2.0
"""The state of a training run: one definition for the loop, the checkpoints and the planner."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import models
from dcae_jax.config import Config
from dcae_jax.config.schema import SHARDING, Diffusion, Loss, Model, Optimizer
from dcae_jax.errors import UserError
from dcae_jax.models import patchgan
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import AnyWeights, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Discriminator:
    """The PatchGAN that phase 3 trains beside the autoencoder."""

    params: Weights  # float32
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # steps done, int32
    params: Weights  # float32
    stats: Weights  # running statistics of BatchNorm
    ema: Weights  # moving averages of the trained parameters and statistics; {} without EMA
    opt_state: optax.OptState
    discriminator: Discriminator | None  # if loss.gan_weight > 0
    skipped: jax.Array  # steps skipped because something was not finite, int32
    skipped_in_row: jax.Array  # consecutive skipped steps up to this one, int32


@dataclasses.dataclass(frozen=True)
class DiscriminatorSpec:
    """The static parts of the discriminator: graphdef, shapes, optimizer."""

    graphdef: nnx.GraphDef
    params: Weights  # shapes
    optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The static parts of a student's teacher: an autoencoder with the student's encoder."""

    graphdef: nnx.GraphDef
    encoder: frozenset[str]  # paths of the weights that it shares with the student
    decoder: Weights  # shapes of its other weights, with their shardings


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The static parts of a training run: graphdef, shapes, what is trained, optimizer."""

    graphdef: nnx.GraphDef
    params: Weights  # shapes
    stats: Weights  # shapes
    trained: frozenset[str]  # paths of trained parameters and of trained norms' statistics
    averaged: frozenset[str]  # paths that have a moving average
    optimizer: optax.GradientTransformation
    discriminator: DiscriminatorSpec | None
    last_layer: str  # the kernel whose gradients weigh the GAN loss; '' for diffusion models
    teacher: TeacherSpec | None = None  # if config.distill has one


NO_DIFFUSION = Diffusion()  # for autoencoders


def create_model(
    model: Model,
    mesh: Mesh,
    rngs: nnx.Rngs,
    diffusion: Diffusion = NO_DIFFUSION,
    *,
    dtype: str = "auto",
    remat: bool = False,
    unroll: bool = False,
) -> nnx.Module:
    """The model of config.model for the devices of `mesh`. dtype: as config.dtype."""
    module, compute = models.find(model), mesh_lib.compute_dtype(dtype, mesh)
    if not diffusion.objective:
        return module.create(
            model, platform=mesh_lib.platform(mesh), remat=remat, dtype=compute, rngs=rngs
        )
    arch = architecture(model, diffusion)
    mesh_lib.check_heads(arch.heads, mesh)
    return module.create(arch, dtype=compute, remat=remat, unroll=unroll, rngs=rngs)


def abstract_model(
    model: Model,
    mesh: Mesh,
    diffusion: Diffusion = NO_DIFFUSION,
    *,
    dtype: str = "auto",
    remat: bool = False,
    unroll: bool = False,
    rules: sharding.Rules = SHARDING,
) -> nnx.Module:
    """`create_model` with shapes for arrays, each annotated with its rule in config.sharding."""
    create = functools.partial(
        create_model,
        model,
        mesh,
        diffusion=diffusion,
        dtype=dtype,
        remat=remat,
        unroll=unroll,
    )
    return sharding.set_rules(weights_lib.abstract(create), rules)


def random_weights(
    model: Model, mesh: Mesh, seed: int, diffusion: Diffusion = NO_DIFFUSION
) -> Weights:
    """Initial parameters and statistics of the model of config.model, drawn on the host.

    See `layers.on_host` for why they are not drawn in a compiled program.
    """
    return _joined(create_model(model, mesh, weights_lib.host_rngs(seed), diffusion))


def architecture(model: Model, diffusion: Diffusion = NO_DIFFUSION) -> Any:
    """The architecture of config.model, which determines its parameters. Raises UserError."""
    module, objective = models.find(model), diffusion.objective
    if not objective:
        return module.architecture(model)
    if models.is_autoencoder(module):
        raise UserError(
            f"objective={objective!r} needs a diffusion model, and model.name={model.name!r} "
            "is an autoencoder; choose uvit or dit"
        )
    return module.architecture(
        model,
        patch_size=diffusion.patch_size,
        learn_sigma=objective == "learned_sigma",
        average=objective == "meanflow",
    )


def train_spec(config: Config, mesh: Mesh) -> TrainSpec:
    """Resolves config.trainable against the model. Raises UserError if a pattern has no match."""
    model = abstract_model(
        config.model,
        mesh,
        config,
        dtype=config.dtype,
        remat=config.remat == "blocks",
        unroll=config.unroll,
        rules=config.sharding,
    )
    graphdef, params, stats = weights_lib.split(model)
    arch = architecture(config.model, config)
    patterns = config.trainable
    if not config.objective:
        patterns = [fill_pattern(pattern, arch) for pattern in patterns]
    trained = optim.match(patterns, params, "trainable")
    if not trained:
        raise UserError("trainable=() trains nothing; name at least one pattern")
    optimizer = optim.optimizer(config.optimizer, config.steps, params, trained)
    moving = frozenset(name for name in stats if _norm_of(name) & trained)
    moved = trained | moving
    averaged = moved if config.ema_decay else frozenset()
    if config.objective:
        return TrainSpec(graphdef, params, stats, moved, averaged, optimizer, None, "")
    last_layer = models.find(config.model).last_layer(arch)
    if config.loss.gan_weight and last_layer not in trained:
        raise UserError(
            f"loss.gan_weight={config.loss.gan_weight} needs {last_layer!r} in trainable: its "
            "gradients weigh the GAN loss"
        )
    other = None
    if config.loss.gan_weight:
        other = discriminator_spec(
            config.loss, config.optimizer, config.sharding, config.dtype, mesh
        )
    return TrainSpec(graphdef, params, stats, moved, averaged, optimizer, other, last_layer)


def discriminator_spec(
    loss: Loss, optimizer: Optimizer, rules: sharding.Rules, dtype: str, mesh: Mesh
) -> DiscriminatorSpec:
    """The PatchGAN of config.loss for the devices of `mesh`, and its optimizer."""
    compute = mesh_lib.compute_dtype(dtype, mesh)
    model = weights_lib.abstract(lambda rngs: patchgan.create(loss, dtype=compute, rngs=rngs))
    graphdef, params, _ = weights_lib.split(sharding.set_rules(model, rules))
    adam = optim.discriminator_optimizer(optimizer, loss.gan_learning_rate)
    return DiscriminatorSpec(graphdef, params, adam)


def fill_pattern(pattern: str, arch: Any) -> str:
    """Fills in {deepest}, the last stage, and {outermost}, the decoder's first non-empty stage."""
    outermost = next((i for i, depth in enumerate(arch.decoder_depths) if depth), 0)
    return pattern.replace("{deepest}", str(len(arch.widths) - 1)).replace(
        "{outermost}", str(outermost)
    )


def _norm_of(stat: str) -> set[str]:
    """The parameters of the norm that a running statistic belongs to."""
    prefix = stat.rsplit(".", 1)[0]
    return {f"{prefix}.scale", f"{prefix}.bias"}


def fresh(spec: TrainSpec, weights: Weights, other: Weights) -> TrainState:
    """The state before the first step: zero moments, averages equal to the weights.

    weights: the model's parameters and statistics; other: the discriminator's parameters, or {}.
    """
    zero = jnp.zeros((), jnp.int32)
    params = {name: weights[name] for name in spec.params}
    discriminator = None
    if spec.discriminator:
        other_params = {name: other[name] for name in spec.discriminator.params}
        discriminator = Discriminator(
            params=other_params,
            opt_state=spec.discriminator.optimizer.init(other_params),
        )
    return TrainState(
        step=zero,
        params=params,
        stats={name: weights[name] for name in spec.stats},
        # Copies, since a donated buffer must not appear twice in the state.
        ema={name: jnp.copy(weights[name]) for name in weights if name in spec.averaged},
        opt_state=spec.optimizer.init(params),
        discriminator=discriminator,
        skipped=zero,
        skipped_in_row=jnp.copy(zero),
    )


def abstract_state(rules: sharding.Rules, mesh: Mesh, spec: TrainSpec) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: for restoring, planning, init."""
    other = spec.discriminator
    shapes = jax.eval_shape(
        functools.partial(fresh, spec),
        {**spec.params, **spec.stats},
        other.params if other else {},
    )
    shardings = sharding.state_shardings(shapes, rules, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def init_state(
    config: Config, mesh: Mesh, spec: TrainSpec, weights: AnyWeights | None = None
) -> TrainState:
    """The state before the first step, each array created with its sharding.

    Starts from `weights` (parameters and statistics by path) or, if None, from random ones.
    Raises UserError if `weights` do not fit this model.
    """
    abstract = abstract_state(config.sharding, mesh, spec)
    if weights is None:
        weights = random_weights(config.model, mesh, config.seed, config)
    check_weights(weights, {**spec.params, **spec.stats})
    weights = _place(weights, {**abstract.params, **abstract.stats})
    other: Weights = {}
    if abstract.discriminator:
        # A different seed from the model's, or both would start from the same draws.
        rngs = weights_lib.host_rngs(config.seed + 2**32)
        discriminator = patchgan.create(config.loss, dtype="float32", rngs=rngs)
        other = _place(_joined(discriminator), abstract.discriminator.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = jax.jit(functools.partial(fresh, spec), out_shardings=shardings, donate_argnums=(0, 1))
    return start(weights, other)


def _joined(model: nnx.Module) -> Weights:
    _, params, stats = weights_lib.split(model)
    return {**params, **stats}


def _place(weights: AnyWeights, abstract: Weights) -> Weights:
    return {
        name: mesh_lib.host_to_global(weights[name], leaf.sharding)
        for name, leaf in abstract.items()
    }


def check_weights(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError, with the first few names, unless names and shapes equal `wanted`."""
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    wrong = [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in weights and tuple(weights[name].shape) != tuple(leaf.shape)
    ]
    if missing or extra or wrong:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", extra), ("misshapen", wrong))
            if names
        ]
        raise UserError(
            f"these weights are of another model: {'; '.join(parts)}; "
            "set model.variant to that of the weights"
        )


def averaged(state: TrainState) -> Weights:
    """All weights, moving averages where they exist, for evaluation and export."""
    return {**state.params, **state.stats, **state.ema}
