# SPDX-License-Identifier: Apache-2.0
"""A training run before its first step: its parts, where it starts, its config.json."""

import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcae_jax import config as config_lib
from dcae_jax import files, models
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as weights_lib
from dcae_jax.config import Config
from dcae_jax.config.schema import Model
from dcae_jax.data import sources
from dcae_jax.data.latents import Latents
from dcae_jax.data.sources import ImageSource
from dcae_jax.errors import UserError
from dcae_jax.models.weights import Weights
from dcae_jax.pretrained.published import Saved
from dcae_jax.runtime import distributed, sharding
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import frozen, inputs, partial_init, tables
from dcae_jax.setup.frozen import Teacher
from dcae_jax.training import optim
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib
from dcae_jax.training.state import TrainSpec, TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What the training loop needs and never changes."""

    config: Config  # resolved
    workdir: str
    mesh: Mesh
    spec: TrainSpec  # model, what is trained, optimizer
    abstract: TrainState  # the state's shapes and shardings
    source: ImageSource | Latents
    latents: Latents | None  # the source of a diffusion model
    lpips: Weights  # of the perceptual loss, {} for a loss without it
    teacher: Teacher | None  # of config.distill

    @property
    def frozen(self) -> tuple[Weights, ...]:
        """The weights that a step takes beside the state."""
        return (self.lpips, self.teacher.decoder) if self.teacher else (self.lpips,)

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the run's inputs, by key."""
        taught_by = self.teacher.checksum if self.teacher else ""
        return inputs.digests(self.config, self.source, taught_by)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's first weights came from."""

    weights: str
    # Of their latents; None if the configuration or its variant sets it.
    scaling_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from."""

    step: int
    changes: list[dict[str, Any]]  # identity keys changed under allow_change
    record: dict[str, Any]  # config.json of the run so far

    @property
    def origin(self) -> Origin:
        """Where the run's first weights came from."""
        return Origin(self.record["weights"], self.record.get("scaling_factor"))

    @property
    def changed(self) -> str:
        """The changed keys, for the log."""
        keys = ", ".join(change["key"] for change in self.changes)
        return f", changed: {keys}" if keys else ""


def find_checkpoint(config: Config, workdir: str) -> Checkpoint | None:
    """The newest undamaged checkpoint in `workdir`; None if nothing was saved yet.

    Raises UserError if it belongs to another run, unless allow_change covers every difference, and
    if `workdir` holds an export or published weights.
    """
    step = checkpoints.resume_step(workdir)
    distributed.assert_same_config({"step": step or 0})
    record = files.read_object(os.path.join(workdir, checkpoints.CONFIG))
    of_run = record is not None and isinstance(record.get("config"), dict)
    others = record is not None and not of_run
    if step is None and (others or files.exists(os.path.join(workdir, weights_lib.EXPORT))):
        name = checkpoints.CONFIG if others else weights_lib.EXPORT
        raise UserError(
            f"{workdir} holds weights that are not a run's ({name}); use another --workdir"
        )
    if step is None:
        return None
    if record is None or not of_run:
        raise UserError(
            f"{workdir} has checkpoints but no config.json of a run; use another --workdir"
        )
    changes = config_lib.identity_changes(record["config"], config_lib.to_json(config))
    return Checkpoint(step, _allowed(changes, config, workdir, step), record)


def check_inputs(run: Run, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, its changes extended by the inputs whose content has changed.

    Raises UserError if one has, unless allow_change covers it or the path of an input of the same
    section.
    """
    keys = [change["key"].split(".") for change in checkpoint.changes]
    others = {section for section, *name in keys if name and name[0] in inputs.NAMES}
    before = checkpoint.record.get("inputs", {})
    changes = {
        key: (before[key], now)
        for key, now in run.inputs.items()
        if before.get(key, now) != now and key.split(".")[0] not in others
    }
    changed = _allowed(changes, run.config, run.workdir, checkpoint.step)
    return dataclasses.replace(checkpoint, changes=[*checkpoint.changes, *changed])


def _allowed(
    changes: Mapping[str, tuple[Any, Any]], config: Config, workdir: str, step: int
) -> list[dict[str, Any]]:
    """The changes for config.json. Raises UserError unless allow_change covers each key."""
    allowed = {key for key in changes if _allows(config.allow_change, key)}
    refused = [f"{k} was {a!r}, is {b!r}" for k, (a, b) in changes.items() if k not in allowed]
    if refused:
        raise UserError(
            f"{workdir} holds another run: {'; '.join(refused)}; use another --workdir, or list "
            "the keys in --config.allow_change"
        )
    if "steps" in allowed:
        before, now = (optim.schedule(config.optimizer, steps)(step) for steps in changes["steps"])
        logging.warning(
            "the cosine schedule now ends at step %d, not %d: at step %d the learning rate changes "
            "from %.3g to %.3g",
            *reversed(changes["steps"]),
            step,
            before,
            now,
        )
    return [
        {"step": step, "key": key, "before": changes[key][0], "now": changes[key][1]}
        for key in sorted(allowed)
    ]


def _allows(allow_change: tuple[str, ...], key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow_change)


def build(config: Config, workdir: str, mesh: Mesh, latents: Latents | None) -> Run:
    """The run of a resolved configuration. Raises UserError."""
    spec, teacher = frozen.load_teacher(config, state_lib.train_spec(config, mesh), mesh)
    sharding.check_tensor(spec.params, config.sharding, mesh)
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        spec=spec,
        abstract=state_lib.abstract_state(config.sharding, mesh, spec),
        source=latents or sources.training_source(config.data),
        latents=latents,
        lpips=frozen.lpips_weights(config, mesh),
        teacher=teacher,
    )


# --- programs -------------------------------------------------------------------------------------


def trace_steps(run: Run) -> dict[int, Any]:
    """{size per side, in pixels or latents: the traced train step}."""
    step = step_lib.jit_step(run.config, run.spec, run.abstract)
    return {
        size: step.trace(run.abstract, abstract_batch(run.config, size, run.mesh), *run.frozen)
        for size in batch_sizes(run.config)
    }


def compile_steps(
    run: Run, traced: Mapping[int, jax.stages.Traced], stopped: Callable[[], bool]
) -> dict[int, jax.stages.Compiled] | None:
    """{size per side: the compiled train step}; None if a signal came meanwhile."""
    compiled = {}
    for size, trace in traced.items():
        if stopped():
            return None
        began = time.perf_counter()
        compiled[size] = trace.lower().compile()
        what = "latents per side" if run.latents else "pixels"
        logging.info("compiled the step at %d %s: %.1f s", size, what, time.perf_counter() - began)
    if run.lpips:
        percent = tables.lpips_percent(run.config.batch_size, run.lpips, compiled)
        if percent is not None:
            logging.info("LPIPS is %.0f %% of the step's FLOPs", percent)
    return compiled


def batch_sizes(config: Config) -> list[int]:
    """Sizes per side, in pixels or latents, that a step is compiled for."""
    if config.objective:
        return [config.model.latent_size]
    return sorted(set(config_lib.training_resolutions(config)))


def size_of(batch: Mapping[str, Any]) -> int:
    """The size per side of a batch's images or latents [B, H, W, C]."""
    return next(x.shape[1] for x in batch.values() if x.ndim == 4)


def abstract_batch(config: Config, size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of images or latents of `size` per side, as `data` yields it."""
    count = config.batch_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((count,), jnp.int32)}
    if config.objective:
        channels = config.model.latent_channels
        shapes["latent"] = (count, size, size, channels), jnp.dtype(config.encode.dtype)
    else:
        shapes["image"] = (count, size, size, 3), jnp.uint8
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.batch_sharding(mesh, len(shape)))
        for name, (shape, dtype) in shapes.items()
    }


# --- the first state ------------------------------------------------------------------------------


def initialise(run: Run) -> tuple[TrainState, Origin]:
    """(the state before step 1, the origin of its weights). Raises UserError."""
    config = run.config
    if run.teacher:  # what fits of it, unless init_from is set; all of the encoder
        path, parts = config.distill.teacher, (*config.init_parts, frozen.ENCODER)
        if not config.init_from:
            config = config_lib.replace(config, init_from=path, init_parts=parts)
    if not config.init_from:
        if config.needs_weights:
            before = "phase2" if config.loss.gan_weight else "phase1"
            before = "usit" if config.objective else before
            raise UserError(
                "init_from is empty, but this configuration starts from weights; run "
                f"configs/{before}.py first and set --config.init_from to its workdir"
            )
        state = state_lib.init_state(config, run.mesh, run.spec)
        return state, Origin(f"random, seed {config.seed}")
    kind = "generator" if config.objective else "autoencoder"
    weights, saved = weights_lib.load_weights(config.init_from, config.weights, kind=kind)
    theirs = saved.diffusion.objective
    if config.objective == "meanflow" and theirs not in ("flow", "meanflow"):
        raise UserError(
            f"init_from={config.init_from!r} has objective={theirs!r}, but average velocities "
            "start from a flow model's; train one with configs/usit.py"
        )
    origin = f"{config.weights} weights of {files.whole_path(config.init_from)}"
    if config.init_parts:
        fresh = state_lib.random_weights(config.model, run.mesh, config.seed, config)
        found = partial_init.fill(fresh, weights, config.init_parts)
        logging.info("init_from=%s\n%s", config.init_from, tables.initial(found))
        weights = found.weights
        origin += f" in {len(found.filled)} paths of {len(weights)}, random, seed {config.seed}"
    if run.teacher and weights_lib.encoder_checksum(weights) != run.teacher.encoder_checksum:
        raise UserError(
            f"init_from={config.init_from!r} has another encoder than the weights of "
            f"distill.teacher={config.distill.teacher!r}; leave init_from empty"
        )
    theirs, ours = saved.model.variant, config.model.variant
    try:
        state = state_lib.init_state(config, run.mesh, run.spec, weights)
    except UserError as error:
        if theirs == ours:
            raise
        raise UserError(
            f"init_from={config.init_from!r} has weights of the variant {theirs}, but this run's "
            f"is {ours}; use --config=...:{theirs}"
        ) from error
    if not config.init_parts:
        _check_network(config, saved)
    # An autoencoder that takes only parts of another has latents of a different scale.
    other = config.objective or (config.init_parts and not run.teacher)
    factor = None if other else _inherited_factor(config, run.spec, saved.model)
    theirs, ours = saved.model.scaling_factor, config.model.scaling_factor
    if config.objective and theirs and theirs != ours:
        raise UserError(
            f"init_from={config.init_from!r} was trained on latents scaled by {theirs}, but these "
            f"are scaled by {ours}; encode with the autoencoder that it was trained on"
        )
    return state, Origin(origin, factor)


def _check_network(config: Config, saved: Saved) -> None:
    """Raises UserError if weights fit in shape, but another network (of other heads) has them."""
    ours = state_lib.architecture(config.model, config)
    theirs = state_lib.architecture(saved.model, saved.diffusion)
    for field in dataclasses.fields(ours):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if field.compare and field.name not in ("scaling_factor", "latent_size") and a != b:
            raise UserError(
                f"init_from={config.init_from!r} has weights of a model with {field.name}={a!r}, "
                f"but this run's has {b!r}; use the same, or init_parts=('.*',) to start from them"
            )


def _inherited_factor(config: Config, spec: TrainSpec, source: Model) -> float | None:
    """The scaling factor inherited with the weights of `source`; None if the run has its own.

    model.scaling_factor takes precedence; a published name that contradicts it is an error. If the
    encoder is trained, the factor is kept, with a warning.
    """
    model, module = config.model, models.find(config.model)
    ours = module.architecture(model).scaling_factor
    theirs = models.find(source).architecture(source).scaling_factor
    own = model.scaling_factor or not theirs or theirs == ours
    if not own and ours and model.variant not in module.VARIANTS:
        raise UserError(
            f"model.variant={model.variant!r} has the scaling factor {ours}, but the weights of "
            f"init_from={config.init_from!r} have {theirs}; use the variant of the weights, or "
            "set model.scaling_factor"
        )
    factor = ours if own else theirs
    if factor and any(name.startswith(weights_lib.ENCODER) for name in spec.trained):
        logging.warning(
            "this run trains the encoder, which may change the rms of its latents: the scaling "
            "factor %s is kept; after training, measure the rms with configs/encode.py and set "
            "model.scaling_factor to 1/rms",
            factor,
        )
    return None if own else theirs


# --- config.json ----------------------------------------------------------------------------------


def write_record(run: Run, checkpoint: Checkpoint | None, origin: Origin) -> None:
    """Writes WORKDIR/config.json and drops the metric rows that the run will write again."""
    if jax.process_index():
        return
    # Row 0 is the evaluation before the first step.
    files.drop_rows_after(run.workdir, checkpoint.step if checkpoint else -1)
    manifest = run.latents.manifest if run.latents else None
    record = {
        "config": config_lib.to_json(run.config),
        "weights": origin.weights,
        "scaling_factor": run.config.model.scaling_factor or origin.scaling_factor,
        # Identity keys changed under allow_change, with the step of the change.
        "changes": [*checkpoint.record.get("changes", []), *checkpoint.changes]
        if checkpoint
        else [],
        "inputs": run.inputs,
        "latents": manifest and {k: v for k, v in manifest.items() if k != "shards"},
        "versions": versions(run.mesh),
        "mesh": dict(run.mesh.shape),
    }
    files.write_json(os.path.join(run.workdir, checkpoints.CONFIG), record)


def versions(mesh: Mesh) -> dict[str, str]:
    """The platform and package versions of the run, for config.json."""
    packages = ("dcae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version(), "platform": mesh_lib.platform(mesh)}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
