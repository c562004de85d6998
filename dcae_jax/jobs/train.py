# SPDX-License-Identifier: Apache-2.0
"""The training loop: restore or initialise -> for each step: batch, train step, hooks -> finish.

A run is a deterministic function of its config: batches come from (seed, index), and a checkpoint
holds the state, the data position and the running means of the metrics together. Killed anywhere,
the same command continues to the same numbers. The step itself (losses, gradients, updates) is in
training/step.py; what the hooks call is in hooks.py.
"""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import pipeline
from dcae_jax.errors import UserError
from dcae_jax.jobs import hooks, trackers
from dcae_jax.jobs import times as times_lib
from dcae_jax.jobs.hooks import Hook, Step
from dcae_jax.jobs.metric_writer import Means, MetricWriter, empty_means
from dcae_jax.jobs.nan_guard import NanGuard
from dcae_jax.runtime import lease, preemption
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve, tables
from dcae_jax.setup import run as run_lib
from dcae_jax.setup.run import Checkpoint, Run
from dcae_jax.training.state import TrainState

if TYPE_CHECKING:  # importing it takes a tenth of a second
    import orbax.checkpoint as ocp

DONE = 0


def run(config: Config, workdir: str) -> int:
    """The job `train`. Returns 0 when done, 75 when stopped by a signal after saving."""
    mesh = mesh_lib.make_mesh(config.mesh)
    config, latents = resolve.training(config, mesh)  # latents: None for an autoencoder
    with lease.hold(workdir, jax.process_index()), preemption.flag(all_processes=True) as stop:
        checkpoint = run_lib.find_checkpoint(config, workdir)
        if checkpoint and checkpoint.step >= config.steps:
            if not hooks.evaluation_owed(config, workdir, checkpoint.step):
                logging.info("%s is done: step %d of %d", workdir, checkpoint.step, config.steps)
                return DONE
        first = checkpoint.step if checkpoint else 0
        with times_lib.record(workdir, first, config.batch_size) as times:
            built = run_lib.build(config, workdir, mesh, latents)
            if checkpoint:
                checkpoint = run_lib.check_inputs(built, checkpoint)
            return train(built, checkpoint, stop.is_set, times)


def run_phases(phases: dict[str, Config], workdir: str) -> int:
    """The job `phases`: phases 1, 2 and 3 into WORKDIR/phase1, phase2, phase3, each from the last.

    A phase that is done is not run again, so that the same command resumes the chain.
    """
    for phase in PHASES[1:]:
        if phases[phase].init_from:
            raise UserError(
                f"{phase}.init_from={phases[phase].init_from!r}: in the chain a phase starts from "
                "the one before; leave it out, or run the phase by itself"
            )
    init_from = phases[PHASES[0]].init_from
    for phase in PHASES:
        folder = os.path.join(workdir, phase)
        logging.info("== %s: %s", phase, folder)
        status = run(config_lib.replace(phases[phase], init_from=init_from), folder)
        if status != DONE:
            return status
        init_from = folder
    return DONE


def train(
    run: Run, checkpoint: Checkpoint | None, stopped: Callable[[], bool], times: times_lib.Times
) -> int:
    """Trains from the checkpoint of an earlier process, or from step 0, to config.steps."""
    config = run.config
    start = checkpoint.step if checkpoint else 0
    # Opens the evaluation's files now: a missing one must fail before minutes of compiling.
    evaluate = hooks.evaluation(run)
    tracked = trackers.configured(config, run.workdir)
    traced = run_lib.trace_steps(run)
    _, metric_shapes = next(iter(traced.values())).out_info
    replicated = mesh_lib.replicated(run.mesh)
    new_means = jax.jit(lambda: empty_means(metric_shapes), out_shardings=replicated)
    manager, state, means, next_example = restore_or_initialise(run, checkpoint, new_means)
    guard = NanGuard(run.workdir, config.max_skipped)
    evaluated = -1  # step of the last complete evaluation

    def run_evaluation(number: int, state: TrainState) -> bool:
        nonlocal evaluated
        # Several processes learn of a signal only at the end of a step, all at the same one.
        alone = jax.process_count() == 1
        complete = evaluate(number, state, writer, stopped if alone else lambda: False)
        evaluated = number if complete else evaluated
        return complete

    def save(step: Step) -> None:
        # Skipped steps change no weights; saving them would rotate good checkpoints out.
        if step.last or step.stopping or not guard.skipping:
            # The row first: a run resumed from this checkpoint would not write it again.
            writer.flush()
            checkpoints.save(manager, step.state, writer.means, step.number, step.next_example)
            times.saved(step.number)

    evaluate_every, save_every = config.evaluate_every, config.save_every
    # In this order. Due at multiples of any interval (0: none) and after the run's last step.
    after_step = (
        Hook((1,), lambda _: writer.flush()),  # the previous row, now that this step is queued
        Hook((1,), lambda s: guard.add(s.number, s.metrics["skipped_in_row"], s.batch)),
        Hook((evaluate_every, save_every), lambda _: guard.drain(), on_stop=True),
        Hook((evaluate_every, config.log_every), lambda s: writer.row(s.number)),
        Hook(
            (evaluate_every,),
            lambda s: run_evaluation(s.number, s.state),
            section="evaluation",
            recheck_stop=True,
        ),
        Hook((save_every,), save, on_stop=True, section="checkpoint"),
        Hook((1,), lambda _: manager.check_for_errors()),  # of saves in the background
    )
    with (
        times.closing(manager),
        hooks.profile(config.profile_steps, run.workdir) as profile,
        hooks.progress_bar(config.steps, start) as bar,
        MetricWriter(
            run.workdir, start, times, means, new_means, (hooks.bar_tracker(bar), *tracked)
        ) as writer,
    ):
        with times.section("compile"):
            train_steps = run_lib.compile_steps(run, traced, stopped)
        times.facts(**times_lib.program(config, train_steps or {}))
        owed = config.evaluate_first
        if checkpoint:  # a signal may have cut its evaluation short
            owed = hooks.evaluation_owed(config, run.workdir, start)
        if train_steps and owed:
            with times.section("evaluation"):
                owed = not run_evaluation(start, state)
                writer.flush()
        if train_steps is None or owed:
            logging.info(
                "stopped by a signal before step %d; rerun the same command to resume", start + 1
            )
            return preemption.STATUS

        process, processes = mesh_lib.process_batch_slice(run.mesh)
        batches = pipeline.training_batches(
            run.source,
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            sizes=config_lib.training_resolutions(config),
            start=next_example,
            process=process,
            processes=processes,
        )
        batches = times.batches(batches)
        for number in range(start + 1, config.steps + 1):
            profile(number)
            batch = next(batches)
            train_step = train_steps[run_lib.size_of(batch)]
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = train_step(state, mesh_lib.put_batch(batch, run.mesh), *run.frozen)
                writer.add(metrics)
            times.dispatched(number, metrics["finite"])
            next_example += config.batch_size
            last, stopping = number == config.steps, stopped()
            step = Step(number, state, metrics, batch, next_example, last=last, stopping=stopping)
            for hook in after_step:
                step = hook(step, times, stopped)  # a signal may come during a slow one
            bar.update(1)
            # After the last step's evaluation a signal changes nothing: the run is done.
            if step.stopping and not (step.last and evaluated == number):
                with times.section("checkpoint"):
                    manager.wait_until_finished()
                logging.info(
                    "saved at step %d after a signal; rerun the same command to resume", number
                )
                return preemption.STATUS
    return DONE


def restore_or_initialise(
    run: Run, checkpoint: Checkpoint | None, new_means: Callable[[], Means]
) -> tuple["ocp.CheckpointManager", TrainState, Means, int]:
    """(checkpoint manager, state, running means, index of the next example) to start with.

    Also writes config.json. A UserError comes before any of it.
    """
    if checkpoint:
        manager = checkpoints.open_manager(run.workdir, run.config.keep)
        try:
            state, means, next_example = checkpoints.restore(
                manager, checkpoint.step, run.abstract, jax.eval_shape(new_means)
            )
        except ValueError as error:
            if not checkpoint.changes:
                raise
            raise UserError(
                f"{run.workdir} was saved with a different train state{checkpoint.changed}; start "
                f"from its weights: another --workdir with --config.init_from={run.workdir}"
            ) from error
        means = jax.device_put(means, mesh_lib.replicated(run.mesh))
        origin = checkpoint.origin
        logging.info("resuming %s at step %d%s", run.workdir, checkpoint.step, checkpoint.changed)
    else:
        state, origin = run_lib.initialise(run)
        means, next_example = new_means(), 0
        manager = checkpoints.open_manager(run.workdir, run.config.keep)  # makes its folder
    run_lib.write_record(run, checkpoint, origin)
    logging.info("%s\n%s", tables.parameters(run.spec), tables.memory(run.abstract, run.mesh))
    return manager, state, means, next_example
