# SPDX-License-Identifier: Apache-2.0
"""What a training run holds. One definition serves the loop, the checkpoints and the planner."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import optim, sharding
from dcae_jax.config import UserError
from dcae_jax.models import layers
from dcae_jax.models.layers import Weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "stats", "ema", "opt_state", "skipped", "skipped_in_row"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # steps done, int32
    params: Weights  # float32
    stats: Weights  # running statistics of BatchNorm
    ema: Weights  # moving averages of the trained parameters and statistics only
    opt_state: optax.OptState
    skipped: jax.Array  # steps without effect since something was not finite, int32
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a run is made of, before any array exists."""

    graph: nnx.GraphDef
    params: dict[str, jax.ShapeDtypeStruct]
    stats: dict[str, jax.ShapeDtypeStruct]
    trained: frozenset[str]  # paths of parameters and of the statistics of trained norms
    optimizer: optax.GradientTransformation


def model_module(model_config: Any) -> Any:
    """The file of dcae_jax/models that config.model.name names."""
    try:
        return importlib.import_module(f"dcae_jax.models.{model_config.name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.name={model_config.name!r} is no file of dcae_jax/models"
        ) from error


def create_model(config: Any, mesh: Mesh, init: layers.Init) -> nnx.Module:
    """The model of `config` for the devices of `mesh`."""
    return model_module(config.model).create(
        config.model,
        platform=sharding.platform(mesh),
        dtype=sharding.compute_dtype(config, mesh),
        init=init,
    )


def blueprint(config: Any, mesh: Mesh) -> Blueprint:
    """Resolves config.trainable against the model. Raises UserError if a pattern hits nothing."""
    graph, params, stats = layers.split(create_model(config, mesh, layers.shapes))
    arch = model_module(config.model).architecture(config.model)
    patterns = [fill_pattern(pattern, arch) for pattern in config.trainable]
    trained = optim.match(patterns, params, "trainable")
    if not trained:
        raise UserError("trainable=() trains nothing; name at least one pattern")
    optimizer = optim.optimizer(config, params, trained)
    moving = frozenset(name for name in stats if _norm_of(name) & trained)
    return Blueprint(graph, params, stats, trained | moving, optimizer)


def fill_pattern(pattern: str, arch: Any) -> str:
    """{deepest}: the last stage's number; {outermost}: the decoder's first that is not empty."""
    outermost = next((i for i, depth in enumerate(arch.decoder_depths) if depth), 0)
    return pattern.replace("{deepest}", str(len(arch.widths) - 1)).replace(
        "{outermost}", str(outermost)
    )


def _norm_of(stat: str) -> set[str]:
    """The parameters of the norm that a running statistic belongs to."""
    prefix = stat.rsplit(".", 1)[0]
    return {f"{prefix}.scale", f"{prefix}.bias"}


def fresh(plan: Blueprint, params: Weights, stats: Weights) -> TrainState:
    """The state before the first step: zero moments, averages equal to the weights."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        stats=stats,
        # Copies, since a donated buffer must not stand twice in the state.
        ema={k: jnp.copy(v) for k, v in {**params, **stats}.items() if k in plan.trained},
        opt_state=plan.optimizer.init(params),
        skipped=zero,
        skipped_in_row=jnp.copy(zero),
    )


def abstract_state(config: Any, mesh: Mesh, plan: Blueprint) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: for restoring, planning, init."""
    shapes = jax.eval_shape(functools.partial(fresh, plan), plan.params, plan.stats)
    places = sharding.state_shardings(shapes, config.sharding, mesh)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


def init_state(
    config: Any, mesh: Mesh, plan: Blueprint, weights: Weights | None = None
) -> TrainState:
    """The state before the first step, each array made where it will lie.

    Starts from `weights` (parameters and statistics by path) or, without them, from random ones.
    Raises UserError when `weights` are not those of this model.
    """
    if weights is None:
        _, params, stats = layers.split(create_model(config, mesh, layers.random(config.seed)))
        weights = {**params, **stats}
    check_weights(weights, {**plan.params, **plan.stats})
    places = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, plan))
    params = {name: sharding.put(weights[name], places.params[name]) for name in plan.params}
    stats = {name: sharding.put(weights[name], places.stats[name]) for name in plan.stats}
    start = jax.jit(functools.partial(fresh, plan), out_shardings=places, donate_argnums=(0, 1))
    return start(params, stats)


def check_weights(weights: Weights, wanted: Weights) -> None:
    """Raises UserError, with the first few names, unless names and shapes are those wanted."""
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
    """All weights with the trained ones averaged: what evaluation and export use."""
    return {**state.params, **state.stats, **state.ema}
