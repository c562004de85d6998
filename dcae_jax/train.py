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
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from dcae_jax import (
    api,
    checkpoint,
    data,
    evaluate,
    hosts,
    lock,
    matching,
    preemption,
    preflight,
    published,
    report,
    sample,
    sharding,
    sources,
    steps,
)
from dcae_jax import config as config_lib
from dcae_jax import state as state_lib
from dcae_jax.config import UserError
from dcae_jax.divergence import Watch
from dcae_jax.state import Blueprint, TrainState

Totals = dict[str, clu_metrics.Metric]

DONE = 0
PHASES = ("phase1", "phase2", "phase3")  # folders of the job `phases`, in order

# Read this many steps late, so that the devices always have work queued.
LAG = 2
LOWER_IS_BETTER = ("lpips", "rfid")
# Not averaged between two rows: the last value counts.
LAST_VALUES = ("learning_rate", "skipped", "skipped_in_row")


def run(config: Any, workdir: str) -> int:
    """The job `train`. Returns 0 when done, 75 when stopped by SIGTERM after saving."""
    mesh = sharding.make_mesh(config.mesh)
    source, manifest = None, None
    if config.objective:
        config, source, manifest = preflight.on_latents(config)
    preflight.check(config, mesh)
    with (
        lock.hold(workdir, jax.process_index()),
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
    start = checkpoint.resume_step(workdir)
    changes, saved_config = [], {}
    if start is not None:
        saved_config = published.read_object(os.path.join(workdir, checkpoint.CONFIG))
        changes = preflight.check_identity(saved_config, config, workdir, start)
        if start >= config.steps and not evaluation_owed(config, workdir, start):
            logging.info("%s is done: step %d of %d", workdir, start, config.steps)
            return DONE
    # What the user can have got wrong is opened before anything is compiled.
    plan = state_lib.blueprint(config, mesh)
    sharding.check_tensor(plan.params, config.sharding, mesh)
    source = source or sources.training_source(config.data)
    hosts.agree({"step": start or 0})
    judges = preflight.load_judges(config, mesh)
    look = (
        _opened_previews(config, mesh, plan, manifest)
        if manifest
        else _opened_judges(config, mesh, plan)
    )
    abstract = state_lib.abstract_state(config, mesh, plan)
    step_fn = steps.jit_step(config, plan, abstract)
    traced = {
        size: step_fn.trace(abstract, preflight.abstract_batch(config, size, mesh), judges)
        for size in preflight.batch_sizes(config)
    }
    metric_shapes = next(iter(traced.values())).out_info[1]
    empty = jax.jit(lambda: empty_totals(metric_shapes), out_shardings=sharding.replicated(mesh))
    if start is None:
        state, provenance = preflight.fresh_state(config, mesh, plan)
        totals, index = empty(), 0
    manager = checkpoint.open_manager(workdir, config.keep)
    if start is not None:
        state, totals, index = checkpoint.restore(manager, start, abstract, jax.eval_shape(empty))
        totals = jax.device_put(totals, sharding.replicated(mesh))
        provenance = saved_config["weights"]
        changed = ", ".join(change["key"] for change in changes)
        logging.info(
            "resuming %s at step %d%s", workdir, start, changed and f", changed: {changed}"
        )
    if jax.process_index() == 0:
        # Row 0 is the evaluation before the first step.
        report.drop_rows_after(workdir, -1 if start is None else start)
        report.write_json(
            os.path.join(workdir, checkpoint.CONFIG),
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
            "%s\n%s", preflight.parameter_table(plan), preflight.memory_table(abstract, mesh)
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
    if judges:
        logging.info(
            "LPIPS is %.0f %% of the step's FLOPs", preflight.lpips_share(config, judges, compiled)
        )

    with _Writer(workdir, start or 0, preempted.is_set) as writer:
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
                judges,
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
    judges: Any,
    compiled: dict[int, Callable],
    empty: Callable[[], Totals],
    manager: Any,
    writer: "_Writer",
    preempted: threading.Event,
    evaluate_now: Callable[[int, TrainState], None],
    position: tuple[TrainState, Totals, int, int],
) -> int:
    state, totals, start, index = position
    batches = data.training_batches(config, source, index, *sharding.process_batch_slice(mesh))
    accumulate = jax.jit(add_metrics, donate_argnums=0)
    # Of (step, a number still on the device, the batch on the host).
    in_flight: collections.deque = collections.deque()
    watch = Watch(writer.workdir, config.max_skipped)
    clock = _Clock(config.batch_size, start)
    with _progress(config.steps, start) as bar:
        writer.bar = bar
        for step in range(start + 1, config.steps + 1):
            _profile(config, step, writer.workdir)
            batch = next(batches)
            placed = sharding.put_batch(batch, mesh)
            size = next(x.shape[1] for x in batch.values() if x.ndim == 4)
            state, metrics = compiled[size](state, placed, judges)
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
                checkpoint.save(manager, state, totals, step, index)
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


def _opened_judges(config: Any, mesh: Mesh, plan: Blueprint) -> Look:
    """Scores the averaged weights on the held-out images, into the row of the step."""
    held_out = sources.held_out_source(config.data)
    scorers = evaluate.load_judges(config, mesh)

    def look(writer: "_Writer", step: int, state: TrainState) -> None:
        weights = state_lib.averaged(state)
        try:
            results = evaluate.evaluate(
                config, plan.graph, weights, mesh, held_out, scorers, writer.stopped
            )
        except evaluate.Stopped:
            return
        writer.evaluation(step, results)
        if step and step == config.steps:
            writer.compare_with_start(evaluate.flat_scores(results))

    return look


def _opened_previews(config: Any, mesh: Mesh, plan: Blueprint, manifest: dict[str, Any]) -> Look:
    """Samples from the averaged weights: the same noise and labels at every step."""
    autoencoder = api.load_autoencoder(config.autoencoder, config.dtype, mesh)
    found = checkpoint.encoder_checksum(autoencoder.weights)
    matching.check_autoencoder(manifest, config.autoencoder, found)
    arch = state_lib.architecture(config)

    def look(writer: "_Writer", step: int, state: TrainState) -> None:
        if writer.stopped():
            return
        model = api.Generator(
            plan.graph,
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
        return not os.path.exists(_samples_file(workdir, step))
    row = next((row for row in report.read_rows(workdir) if row["step"] == step), {})
    return bool(due) and not all(f"psnr_{size}" in row for size in config.evaluate.resolutions)


def _samples_file(workdir: str, step: int) -> str:
    return os.path.join(workdir, "images", f"step{step:07d}_samples.png")


# --- metrics --------------------------------------------------------------------------------------


def empty_totals(metrics: dict[str, Any]) -> Totals:
    """Running means of no step."""
    return {name: _metric(name).empty() for name in metrics if name != "finite"}


def add_metrics(totals: Totals, metrics: dict[str, jax.Array]) -> Totals:
    """Running means with one step more; a skipped step's values do not count."""
    finite = metrics["finite"][None] > 0
    return {
        name: total.merge(
            clu_metrics.LastValue.from_model_output(metrics[name])
            if name in LAST_VALUES
            else clu_metrics.Average.from_model_output(metrics[name][None], finite)
        )
        for name, total in totals.items()
    }


def _metric(name: str) -> type[clu_metrics.Metric]:
    return clu_metrics.LastValue if name in LAST_VALUES else clu_metrics.Average


# --- around the loop ------------------------------------------------------------------------------


class _Writer:
    """Rows, scalars and pictures of a run; holds the one row that is still on the device."""

    def __init__(self, workdir: str, start: int, stopped: Callable[[], bool]):
        self.workdir, self.start = workdir, start
        self.pending: tuple[int, Totals, dict[str, float]] | None = None
        # Processes that compute together hear of a signal at a step's end, all at the same.
        self.stopped = stopped if jax.process_count() == 1 else lambda: False
        self.scores: dict[str, float] = {}
        self.evaluated = -1  # the last step that was
        self.events = None
        self.bar = None

    def __enter__(self) -> "_Writer":
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            self.events = SummaryWriter(self.workdir, purge_step=self.start + 1)
        return self

    def __exit__(self, *error) -> None:
        if self.events:
            self.events.close()

    def flush(self) -> None:
        """Writes the pending row, waiting for its numbers."""
        if self.pending is None:
            return
        (step, totals, times), scores = self.pending, self.scores
        self.pending, self.scores = None, {}
        if self.events is None:
            return
        values = compute(totals) | times | scores
        report.append_row(self.workdir, step, values)
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "images_per_s") if k in values}
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix(shown, refresh=False)
        elif shown:
            logging.info("step %d  %s", step, "  ".join(f"{k} {v}" for k, v in shown.items()))

    def evaluation(self, step: int, results: dict[int, evaluate.Result]) -> None:
        """Takes an evaluation into the row of `step`, and writes its pictures."""
        self.scores, self.evaluated = evaluate.row_values(results), step
        self.pending = self.pending or (step, {}, {})
        if self.events is None:
            return
        logging.info("step %d\n%s", step, evaluate.score_table(results))
        evaluate.write_grids(results, self.workdir, f"step{step:07d}")
        for size, result in results.items():
            self.events.add_image(f"reconstruction_{size}", result.grid(), step, dataformats="HWC")

    def complete(self) -> None:
        """Writes an evaluation that was owed into the row of its step, which is there already."""
        if self.pending is None:
            return
        step, values = self.pending[0], self.scores
        self.pending, self.scores = None, {}
        if self.events is None:
            return
        report.merge_row(self.workdir, step, values)
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def samples(self, step: int, images: np.ndarray) -> None:
        """Writes a grid of samples [N, H, W, 3] uint8."""
        self.pending, self.evaluated = self.pending or (step, {}, {}), step
        if self.events is None:
            return
        grid = sample.grid(images)
        report.write_png(_samples_file(self.workdir, step), grid)
        self.events.add_image("samples", grid, step, dataformats="HWC")
        logging.info("step %d: %d samples in images/", step, len(images))

    def compare_with_start(self, scores: dict[str, float]) -> None:
        """Says which figures rose and which fell since the evaluation before the first step."""
        rows = report.read_rows(self.workdir)
        before = rows[0] if rows and rows[0]["step"] == 0 else {}
        pairs = {name: (before[name], score) for name, score in scores.items() if name in before}
        if pairs and self.events is not None:
            logging.info("%s", changes(pairs))


def changes(pairs: dict[str, tuple[float, float]]) -> str:
    """'worse: psnr_64 24.1 -> 23.8 (-0.3); better: ...', whichever way a score counts.

    A score that did not move stands on neither side.
    """
    sides = {"worse": [], "better": []}
    for name, (before, after) in pairs.items():
        text = f"{name} {before:.4g} -> {after:.4g} ({after - before:+.2g})"
        loss = (before - after) * (-1 if name.startswith(LOWER_IS_BETTER) else 1)
        if loss:
            sides["worse" if loss > 0 else "better"].append(text)
    return "; ".join(f"{side}: {', '.join(texts) or 'nothing'}" for side, texts in sides.items())


def compute(totals: Totals) -> dict[str, float]:
    """The running means as host numbers, NaN where no step counted."""
    return {
        name: float(np.asarray(total.compute())) for name, total in jax.device_get(totals).items()
    }


class _Clock:
    """Seconds a step and images a second between two rows, evaluations and saves left out."""

    def __init__(self, batch_size: int, start: int):
        self.batch_size, self.step = batch_size, start
        self.last = time.perf_counter()

    def lap(self, step: int) -> dict[str, float]:
        """The figures of the steps since the last lap, up to `step`."""
        now = time.perf_counter()
        seconds, count = now - self.last, step - self.step
        self.last, self.step = now, step
        return {"step_s": seconds / count, "images_per_s": self.batch_size * count / seconds}

    def leave_out(self, seconds: float) -> None:
        self.last += seconds


def _progress(total: int, start: int) -> Any:
    """A bar when a person watches; otherwise the log lines are enough."""
    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() and jax.process_index() == 0
    return tqdm(total=total, initial=start, disable=not watched, unit="step", dynamic_ncols=True)


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
