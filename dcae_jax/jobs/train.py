# SPDX-License-Identifier: Apache-2.0
"""The loop, the same for every training job: batch -> step -> log -> evaluate -> checkpoint.

What a run did is a function of its configuration alone: batches come from (seed, index), and a
checkpoint holds state, data position and the running means of the metrics together. Killed
anywhere, the same command continues to the same numbers.
"""

import collections
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.data import pipeline, sources
from dcae_jax.diffusion import latent_spec
from dcae_jax.errors import UserError
from dcae_jax.evaluation import reconstruction
from dcae_jax.jobs import metric_writer, sample
from dcae_jax.jobs.metric_writer import Totals, _Writer
from dcae_jax.jobs.nan_guard import Watch
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import distributed, lease, preemption, sharding
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import preflight
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib
from dcae_jax.training.state import TrainSpec, TrainState

DONE = 0
PHASES = ("phase1", "phase2", "phase3")  # folders of the job `phases`, in order

# Read this many steps late, so that the devices always have work queued.
LAG = 2


def run(config: Any, workdir: str) -> int:
    """The job `train`. Returns 0 when done, 75 when stopped by SIGTERM after saving."""
    mesh = mesh_lib.make_mesh(config.mesh)
    source, manifest = None, None
    if config.objective:
        config, source, manifest = preflight.on_latents(config)
    preflight.check(config, mesh)
    with (
        lease.hold(workdir, jax.process_index()),
        preemption.flag(together=True) as preempted,
    ):
        return _run(config, workdir, mesh, source, manifest, preempted)


def _run(
    config: Any,
    workdir: str,
    mesh: Mesh,
    source: Any,
    manifest: dict[str, Any] | None,
    preempted: threading.Event,
) -> int:
    start = checkpoints.resume_step(workdir)
    changes, saved_config = [], {}
    if start is not None:
        saved_config = files.read_object(os.path.join(workdir, checkpoints.CONFIG))
        changes = preflight.check_identity(saved_config, config, workdir, start)
        if start >= config.steps and not evaluation_owed(config, workdir, start):
            logging.info("%s is done: step %d of %d", workdir, start, config.steps)
            return DONE
    # What the user can have got wrong is opened before anything is compiled.
    spec = state_lib.train_spec(config, mesh)
    sharding.check_tensor(spec.params, config.sharding, mesh)
    source = source or sources.training_source(config.data)
    distributed.assert_same_config({"step": start or 0})
    lpips = preflight.load_lpips(config, mesh)
    look = (
        _opened_previews(config, mesh, spec, manifest)
        if manifest
        else _opened_judges(config, mesh, spec)
    )
    abstract = state_lib.abstract_state(config, mesh, spec)
    step_fn = step_lib.jit_step(config, spec, abstract)
    traced = {
        size: step_fn.trace(abstract, preflight.abstract_batch(config, size, mesh), lpips)
        for size in preflight.batch_sizes(config)
    }
    metric_shapes = next(iter(traced.values())).out_info[1]
    empty = jax.jit(
        lambda: metric_writer.empty_totals(metric_shapes), out_shardings=mesh_lib.replicated(mesh)
    )
    if start is None:
        state, provenance = preflight.fresh_state(config, mesh, spec)
        totals, index = empty(), 0
    manager = checkpoints.open_manager(workdir, config.keep)
    if start is not None:
        state, totals, index = checkpoints.restore(manager, start, abstract, jax.eval_shape(empty))
        totals = jax.device_put(totals, mesh_lib.replicated(mesh))
        provenance = saved_config["weights"]
        changed = ", ".join(change["key"] for change in changes)
        logging.info(
            "resuming %s at step %d%s", workdir, start, changed and f", changed: {changed}"
        )
    if jax.process_index() == 0:
        # Row 0 is the evaluation before the first step.
        files.drop_rows_after(workdir, -1 if start is None else start)
        files.write_json(
            os.path.join(workdir, checkpoints.CONFIG),
            {
                "config": config_lib.to_json(config),
                "weights": provenance,
                # Identity keys that allow_change let differ, with the step where they did.
                "changes": [*saved_config.get("changes", []), *changes],
                "latents": manifest and {k: v for k, v in manifest.items() if k != "shards"},
                "versions": preflight.versions(mesh),
                "mesh": dict(mesh.shape),
            },
        )
        logging.info(
            "%s\n%s", preflight.parameter_table(spec), preflight.memory_table(abstract, mesh)
        )

    compiled = {}
    for size, trace in traced.items():
        if preempted.is_set():
            logging.info("stopped by a signal before step %d; the same command goes on", start or 0)
            return preemption.STATUS
        began = time.perf_counter()
        compiled[size] = trace.lower().compile()
        what = "latents a side" if manifest else "pixels"
        logging.info("compiled the step at %d %s: %.1f s", size, what, time.perf_counter() - began)
    if lpips:
        logging.info(
            "LPIPS is %.0f %% of the step's FLOPs", preflight.lpips_share(config, lpips, compiled)
        )

    with metric_writer._Writer(workdir, start or 0, preempted.is_set) as writer:
        evaluate_now = functools.partial(look, writer)
        try:
            if start is None and config.evaluate_first:
                evaluate_now(0, state)
                writer.flush()
                owed = writer.evaluated != 0
            elif owed := start is not None and evaluation_owed(config, workdir, start):
                evaluate_now(start, state)
                writer.complete()
                owed = writer.evaluated != start
            if owed:  # a signal came
                logging.info("stopped before step %d; the same command resumes", (start or 0) + 1)
                return preemption.STATUS
            return _loop(
                config,
                mesh,
                source,
                lpips,
                compiled,
                empty,
                manager,
                writer,
                preempted,
                evaluate_now,
                (state, totals, start or 0, index),
            )
        finally:
            _end_profile(config)
            manager.wait_until_finished()
            manager.close()


def run_phases(config: Any, workdir: str) -> int:
    """The job `phases`: phases 1, 2 and 3 into WORKDIR/phase1, phase2, phase3, each from the last.

    A phase that is done is not run again, so that the same command resumes the chain.
    """
    for phase in PHASES[1:]:
        if config[phase].init_from:
            raise UserError(
                f"{phase}.init_from={config[phase].init_from!r}: in the chain a phase starts from "
                "the one before; leave it out, or run the phase by itself"
            )
    before = config[PHASES[0]].init_from
    for phase in PHASES:
        folder = os.path.join(workdir, phase)
        one = config[phase].copy_and_resolve_references()
        one.init_from = before
        logging.info("== %s: %s", phase, folder)
        status = run(one, folder)
        if status != DONE:
            return status
        before = folder
    return DONE


def _loop(
    config: Any,
    mesh: Mesh,
    source: Any,
    lpips: Weights,
    compiled: dict[int, Callable],
    empty: Callable[[], Totals],
    manager: Any,
    writer: "_Writer",
    preempted: threading.Event,
    evaluate_now: Callable[[int, TrainState], None],
    position: tuple[TrainState, Totals, int, int],
) -> int:
    state, totals, start, index = position
    batches = pipeline.training_batches(config, source, index, *mesh_lib.process_batch_slice(mesh))
    accumulate = jax.jit(metric_writer.add_metrics, donate_argnums=0)
    # Of (step, a number still on the device, the batch on the host).
    in_flight: collections.deque = collections.deque()
    watch = Watch(writer.workdir, config.max_skipped)
    clock = metric_writer._Clock(config.batch_size, start)
    with metric_writer._progress(config.steps, start) as bar:
        writer.bar = bar
        for step in range(start + 1, config.steps + 1):
            _profile(config, step, writer.workdir)
            batch = next(batches)
            placed = mesh_lib.put_batch(batch, mesh)
            size = next(x.shape[1] for x in batch.values() if x.ndim == 4)
            state, metrics = compiled[size](state, placed, lpips)
            totals = accumulate(totals, metrics)
            index += config.batch_size
            in_flight.append((step, metrics["skipped_in_row"], batch))
            # A row is read one step late, when the device has the next step to work on.
            writer.flush()

            last = step == config.steps
            stops = preempted.is_set()
            saves = last or stops or step % config.save_every == 0
            evaluates = last or bool(config.evaluate_every and step % config.evaluate_every == 0)
            while len(in_flight) > (0 if saves or evaluates else LAG):
                watch.look(*in_flight.popleft())
            if evaluates or step % config.log_every == 0:
                writer.pending = (step, totals, clock.lap(step))
                totals = empty()
            began = time.perf_counter()
            if evaluates:
                evaluate_now(step, state)
                # Stopped by a signal meanwhile, it is owed: the run that resumes makes it first.
                stops = stops or preempted.is_set()
            # While steps are skipped nothing is learned, and saves would push out good checkpoints.
            if stops or (saves and (last or watch.first is None)):
                # On disk before the checkpoint, after which it would not be written again.
                writer.flush()
                checkpoints.save(manager, state, totals, step, index)
            clock.leave_out(time.perf_counter() - began)
            manager.check_for_errors()
            bar.update(1)
            if stops and not (last and writer.evaluated == step):
                manager.wait_until_finished()
                logging.info("saved at step %d after a signal; the same command resumes", step)
                return preemption.STATUS
    return DONE


# --- evaluation -----------------------------------------------------------------------------------
# What is needed is opened before anything is compiled; what comes back looks at a state, or gives
# up where the writer says that a signal came: then it is owed.

Look = Callable[["_Writer", int, TrainState], None]


def _opened_judges(config: Any, mesh: Mesh, spec: TrainSpec) -> Look:
    """Scores the averaged weights on the held-out images, into the row of the step."""
    held_out = sources.held_out_source(config.data)
    scorers = reconstruction.load_judges(config, mesh)

    def look(writer: "_Writer", step: int, state: TrainState) -> None:
        weights = state_lib.averaged(state)
        try:
            results = reconstruction.evaluate(
                config, spec.graphdef, weights, mesh, held_out, scorers, writer.stopped
            )
        except reconstruction.Stopped:
            return
        writer.evaluation(step, results)
        if step and step == config.steps:
            writer.compare_with_start(reconstruction.flat_scores(results))

    return look


def _opened_previews(config: Any, mesh: Mesh, spec: TrainSpec, manifest: dict[str, Any]) -> Look:
    """Samples from the averaged weights: the same noise and labels at every step."""
    autoencoder = autoencoder_lib.load_autoencoder(config.autoencoder, config.dtype, mesh)
    found = checkpoint_weights.encoder_checksum(autoencoder.weights)
    latent_spec.check_autoencoder(manifest, config.autoencoder, found)
    arch = state_lib.architecture(config)

    def look(writer: "_Writer", step: int, state: TrainState) -> None:
        if writer.stopped():
            return
        model = generator.Generator(
            spec.graphdef,
            state_lib.averaged(state),
            arch,
            config.model.to_dict(),
            config.objective,
            autoencoder,
            mesh,
        )
        writer.samples(step, sample.pictures(config, model, range(config.sample.count)))

    return look


def evaluation_owed(config: Any, workdir: str, step: int) -> bool:
    """Whether checkpoint `step` was saved by a signal that cut its evaluation short."""
    due = step == config.steps or (config.evaluate_every and step % config.evaluate_every == 0)
    if due and config.objective:
        return not os.path.exists(metric_writer._samples_file(workdir, step))
    row = next((row for row in files.read_rows(workdir) if row["step"] == step), {})
    return bool(due) and not all(f"psnr_{size}" in row for size in config.evaluate.resolutions)


def _profile(config: Any, step: int, workdir: str) -> None:
    if not config.profile_steps:
        return
    first, last = config.profile_steps
    if step == first:
        jax.profiler.start_trace(os.path.join(workdir, "profile"))
    elif step == last + 1:
        _end_profile(config)


def _end_profile(config: Any) -> None:
    """Writes the trace, also where the run ends before the last step of its window."""
    if config.profile_steps:
        with contextlib.suppress(RuntimeError):  # there is none
            jax.profiler.stop_trace()
