# SPDX-License-Identifier: Apache-2.0
"""The training loop: restore or initialise -> for each step: batch, train step, hooks -> finish.

A run is a deterministic function of its config: batches come from (seed, index), and a checkpoint
holds the state, the data position and the running means of the metrics together. Killed anywhere,
the same command continues to the same numbers. What happens beside the steps stands in hooks.py.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import pipeline
from dcae_jax.errors import UserError
from dcae_jax.jobs import hooks
from dcae_jax.jobs.hooks import Hook, Step
from dcae_jax.jobs.metric_writer import Means, MetricWriter, empty_means
from dcae_jax.jobs.nan_guard import NanGuard
from dcae_jax.runtime import lease, preemption
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve, tables
from dcae_jax.setup import run as setup
from dcae_jax.setup.run import Run
from dcae_jax.training.state import TrainState

if TYPE_CHECKING:  # a tenth of a second
    import orbax.checkpoint as ocp

DONE = 0


def run(config: Config, workdir: str) -> int:
    """The job `train`. Returns 0 when done, 75 when stopped by a signal after saving."""
    mesh = mesh_lib.make_mesh(config.mesh)
    config, latents = resolve.training(config, mesh)
    with (
        lease.hold(workdir, jax.process_index()),
        preemption.flag(together=True) as stop,
    ):
        found = setup.find(config, workdir)
        if found and found.step >= config.steps:
            if not hooks.evaluation_owed(config, workdir, found.step):
                logging.info("%s is done: step %d of %d", workdir, found.step, config.steps)
                return DONE
        return train(setup.build(config, workdir, mesh, latents), found, stop.is_set)


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
    before = phases[PHASES[0]].init_from
    for phase in PHASES:
        folder = os.path.join(workdir, phase)
        logging.info("== %s: %s", phase, folder)
        status = run(config_lib.replace(phases[phase], init_from=before), folder)
        if status != DONE:
            return status
        before = folder
    return DONE


def train(run: Run, found: setup.Found | None, stopped: Callable[[], bool]) -> int:
    """Trains from the checkpoint that was found, or from step 0, to config.steps."""
    config, start = run.config, found.step if found else 0
    # What can be wrong with the user's files is opened before anything is compiled.
    evaluate = hooks.evaluation(run)
    traced = setup.trace_steps(run)
    metric_shapes = next(iter(traced.values())).out_info[1]
    empty = jax.jit(lambda: empty_means(metric_shapes), out_shardings=mesh_lib.replicated(run.mesh))
    manager, state, means, index = restore_or_initialise(run, found, empty)
    train_step = compile_steps(run, traced, stopped)
    if train_step is None:
        logging.info("stopped by a signal before step %d; the same command goes on", start)
        return preemption.STATUS

    guard = NanGuard(run.workdir, config.max_skipped)
    evaluated = -1  # the last step that was

    def score(number: int, state: TrainState) -> None:
        nonlocal evaluated
        # Processes that compute together hear of a signal at a step's end, all at the same one.
        alone = jax.process_count() == 1
        if evaluate(number, state, writer, stopped if alone else lambda: False):
            evaluated = number

    def save(step: Step) -> None:
        # While steps are skipped nothing is learned, and saves would push out good checkpoints.
        if step.last or step.stopping or not guard.skipping:
            # On disk before the checkpoint, after which it would not be written again.
            writer.flush()
            checkpoints.save(manager, step.state, writer.means, step.number, step.index)

    evaluate_every, save_every = config.evaluate_every, config.save_every
    after_step = (
        Hook((1,), lambda _: writer.flush()),  # the row of the step before
        Hook((1,), lambda s: guard.add(s.number, s.metrics["skipped_in_row"], s.batch)),
        Hook((evaluate_every, save_every), lambda _: guard.drain(), on_stop=True),
        Hook((evaluate_every, config.log_every), lambda s: writer.row(s.number)),
        Hook((evaluate_every,), lambda s: score(s.number, s.state), slow=True, polls=True),
        Hook((save_every,), save, on_stop=True, slow=True),
        Hook((1,), lambda _: manager.check_for_errors()),
    )
    with (
        contextlib.closing(manager),
        hooks.profile(config.profile_steps, run.workdir) as profile,
        hooks.progress_bar(config.steps, start) as bar,
        MetricWriter(
            run.workdir, start, config.batch_size, means, empty, trackers=(hooks.show(bar),)
        ) as writer,
    ):
        if hooks.evaluation_owed(config, run.workdir, start) if found else config.evaluate_first:
            with writer.clock.paused():
                score(start, state)
                writer.flush()
            if evaluated != start:  # a signal came
                logging.info("stopped before step %d; the same command resumes", start + 1)
                return preemption.STATUS

        process, processes = mesh_lib.process_batch_slice(run.mesh)
        batches = pipeline.training_batches(
            run.source,
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            sizes=config_lib.training_resolutions(config),
            start=index,
            process=process,
            processes=processes,
        )
        for number in range(start + 1, config.steps + 1):
            profile(number)
            batch = next(batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = train_step[setup.size_of(batch)](
                    state, mesh_lib.put_batch(batch, run.mesh), run.lpips
                )
                writer.add(metrics)
            index += config.batch_size
            step = Step(number, state, metrics, batch, index, number == config.steps, stopped())
            for hook in after_step:
                step = hook(step, writer.clock, stopped)
            bar.update(1)
            if step.stopping and not (step.last and evaluated == number):
                manager.wait_until_finished()
                logging.info("saved at step %d after a signal; the same command resumes", number)
                return preemption.STATUS
    return DONE


def restore_or_initialise(
    run: Run, found: setup.Found | None, empty: Callable[[], Means]
) -> tuple["ocp.CheckpointManager", TrainState, Means, int]:
    """(checkpoints, state, running means, index of the next example) to start with.

    Also writes config.json. Raises UserError, before it makes the workdir.
    """
    if found:
        manager = checkpoints.open_manager(run.workdir, run.config.keep)
        state, means, index = checkpoints.restore(
            manager, found.step, run.abstract, jax.eval_shape(empty)
        )
        means = jax.device_put(means, mesh_lib.replicated(run.mesh))
        origin = found.origin
        logging.info("resuming %s at step %d%s", run.workdir, found.step, found.changed)
    else:
        (state, origin), means, index = setup.initialise(run), empty(), 0
        manager = checkpoints.open_manager(run.workdir, run.config.keep)  # which makes the folder
    setup.write_record(run, found, origin)
    logging.info("%s\n%s", tables.parameters(run.spec), tables.memory(run.abstract, run.mesh))
    return manager, state, means, index


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
        what = "latents a side" if run.latents else "pixels"
        logging.info("compiled the step at %d %s: %.1f s", size, what, time.perf_counter() - began)
    if run.lpips:
        percent = tables.lpips_percent(run.config.batch_size, run.lpips, compiled)
        if percent is not None:
            logging.info("LPIPS is %.0f %% of the step's FLOPs", percent)
    return compiled
