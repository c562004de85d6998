# SPDX-License-Identifier: Apache-2.0
"""Hooks of a training run: evaluation, profiler trace, progress bar.

An evaluation opens its files before anything is compiled, so a missing file ends the run at once.
"""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dcae_jax import files
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator
from dcae_jax.config import Config
from dcae_jax.config.schema import Sample
from dcae_jax.data import sources
from dcae_jax.diffusion import latent_spec
from dcae_jax.evaluation import networks, reconstruction
from dcae_jax.jobs import sample
from dcae_jax.jobs.metric_writer import MetricWriter
from dcae_jax.jobs.times import Times
from dcae_jax.jobs.trackers import Tracker
from dcae_jax.setup.run import Run
from dcae_jax.training import state as state_lib
from dcae_jax.training.state import TrainState

LOWER_IS_BETTER = ("lpips", "rfid")
JUMPS = (1, 2, 4)  # of the grids of a model of average velocities


@dataclasses.dataclass(frozen=True)
class Step:
    """One finished step, as the hooks see it."""

    number: int
    state: TrainState
    metrics: dict[str, jax.Array]
    batch: dict[str, np.ndarray]  # on the host
    next_example: int  # its global index
    last: bool  # of the run
    stopping: bool  # a signal asked the run to stop


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function called after some steps, in the order of the loop's list."""

    every: tuple[int, ...]  # due at multiples of any of these; 0: never
    call: Callable[[Step], object]
    on_stop: bool = False  # also due when a signal ends the run
    section: str = "step"  # of goodput.SECTIONS, that its time counts as
    recheck_stop: bool = False  # hooks after it see a signal that arrived meanwhile

    def due(self, step: Step) -> bool:
        regular = any(interval and step.number % interval == 0 for interval in self.every)
        return regular or step.last or (self.on_stop and step.stopping)

    def __call__(self, step: Step, times: Times, stopped: Callable[[], bool]) -> Step:
        """Calls the function if it is due; returns the step for the hooks that follow."""
        if not self.due(step):
            return step
        with times.section(self.section):
            self.call(step)
        if self.recheck_stop and not step.stopping:
            return dataclasses.replace(step, stopping=stopped())
        return step


# --- evaluation -----------------------------------------------------------------------------------

# (step, its state, writer, whether a signal arrived) -> True if it ran to the end.
Evaluate = Callable[[int, TrainState, MetricWriter, Callable[[], bool]], bool]


def evaluation(run: Run) -> Evaluate:
    """The evaluation of a run's EMA weights. Raises UserError."""
    return _samples(run) if run.latents else _reconstructions(run)


def _reconstructions(run: Run) -> Evaluate:
    """Scores the held-out images, into the row of the step."""
    config, mesh = run.config, run.mesh
    held_out = sources.held_out_source(config.data)
    assert held_out is not None  # None is for latents
    metric_networks = networks.load_networks(config.evaluate, mesh)

    def evaluate(
        step: int, state: TrainState, writer: MetricWriter, stopped: Callable[[], bool]
    ) -> bool:
        weights = state_lib.averaged(state)
        try:
            results = reconstruction.evaluate(
                config.evaluate,
                config.data,
                run.spec.graphdef,
                weights,
                mesh,
                held_out,
                metric_networks,
                stopped,
            )
        except reconstruction.Stopped:
            return False
        writer.scores(step, reconstruction.row_values(results))
        if jax.process_index() == 0:
            logging.info("step %d\n%s", step, reconstruction.score_table(results))
            reconstruction.write_grids(results, run.workdir, f"step{step:07d}")
            for where, result in results.items():
                writer.image(step, f"reconstruction_{where}", result.grid())
            if step and step == config.steps:
                _compare_with_start(run.workdir, reconstruction.flat_scores(results))
        return True

    return evaluate


def _samples(run: Run) -> Evaluate:
    """Samples grids, from the same noise and labels at every step."""
    assert run.latents is not None
    config, mesh = run.config, run.mesh
    autoencoder = autoencoder_lib.load_autoencoder(
        config.autoencoder, config.dtype, mesh, run.latents.manifest["weights"]
    )
    latent_spec.check_autoencoder(
        run.latents.manifest, config.autoencoder, autoencoder.encoder_checksum
    )
    arch = state_lib.architecture(config.model, config)

    def evaluate(
        step: int, state: TrainState, writer: MetricWriter, stopped: Callable[[], bool]
    ) -> bool:
        if stopped():
            return False
        model = generator.Generator(
            run.spec.graphdef,
            state_lib.averaged(state),
            arch,
            config.model,
            config.objective,
            autoencoder,
        )
        count = config.sample.count
        for name, settings in _grids(config).items():
            images = sample.draw(settings, config.seed, model, range(count))
            if jax.process_index() == 0:
                grid = sample.grid(images)
                files.write_png(_samples_file(run.workdir, step, name), grid)
                writer.image(step, name, grid)
        writer.scores(step, {})
        if jax.process_index() == 0:
            logging.info("step %d: %d samples in images/", step, count)
        return True

    return evaluate


def _grids(config: Config) -> dict[str, Sample]:
    """{name: settings} of the grids of an evaluation; average velocities: by number of jumps."""
    if config.objective != "meanflow":
        return {"samples": config.sample}
    return {f"samples_{n}": dataclasses.replace(config.sample, steps=n) for n in JUMPS}


def evaluation_owed(config: Config, workdir: str, step: int) -> bool:
    """Whether a signal interrupted the evaluation due at checkpoint `step`."""
    due = step == config.steps or (config.evaluate_every and step % config.evaluate_every == 0)
    if due and config.objective:
        names = _grids(config)
        return not all(files.exists(_samples_file(workdir, step, name)) for name in names)
    row = next((row for row in files.read_rows(workdir) if row["step"] == step), {})
    names = reconstruction.result_names(config.evaluate)
    return bool(due) and not all(f"psnr_{name}" in row for name in names)


def _samples_file(workdir: str, step: int, name: str) -> str:
    return os.path.join(workdir, "images", f"step{step:07d}_{name}.png")


def _compare_with_start(workdir: str, scores: dict[str, float]) -> None:
    """Logs which scores got worse or better since the evaluation before the first step."""
    rows = files.read_rows(workdir)
    before = rows[0] if rows and rows[0]["step"] == 0 else {}
    pairs = {name: (before[name], score) for name, score in scores.items() if name in before}
    if pairs:
        logging.info("%s", changes(pairs))


def changes(pairs: dict[str, tuple[float, float]]) -> str:
    """'worse: psnr_64 24.1 -> 23.8 (-0.3); better: ...', by whether a score is better low or high.

    Unchanged scores are not listed.
    """
    sides: dict[str, list[str]] = {"worse": [], "better": []}
    for name, (before, after) in pairs.items():
        text = f"{name} {before:.4g} -> {after:.4g} ({after - before:+.2g})"
        loss = (before - after) * (-1 if name.startswith(LOWER_IS_BETTER) else 1)
        if loss:
            sides["worse" if loss > 0 else "better"].append(text)
    return "; ".join(f"{side}: {', '.join(texts) or 'nothing'}" for side, texts in sides.items())


# --- around the steps -----------------------------------------------------------------------------


@contextlib.contextmanager
def profile(steps: tuple[int, ...], workdir: str) -> Iterator[Callable[[int], None]]:
    """A function to call before each step: traces the steps (first, last) to WORKDIR/profile."""

    folder = os.path.join(workdir, "profile")

    def before(step: int) -> None:
        if steps and step == steps[0]:
            jax.profiler.start_trace(files.spool(folder))
        elif steps and step == steps[1] + 1:
            jax.profiler.stop_trace()

    try:
        yield before
    finally:
        if steps:  # even if the run ends before the last step of the window
            with contextlib.suppress(RuntimeError):  # no trace is running
                jax.profiler.stop_trace()
            files.publish(folder)


def progress_bar(total: int, start: int) -> Any:
    """A progress bar on process 0 if stderr is a terminal; otherwise log lines are enough."""
    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() and jax.process_index() == 0
    return tqdm(total=total, initial=start, disable=not watched, unit="step", dynamic_ncols=True)


def bar_tracker(bar: Any) -> Tracker:
    """A tracker that shows the loss and the speed on the bar, or logs them if there is none."""

    def track(step: int, row: Mapping[str, float]) -> None:
        shown = {name: f"{row[name]:.4g}" for name in ("loss", "images_per_s") if name in row}
        if not bar.disable:
            bar.set_postfix(shown, refresh=False)
        elif shown:
            logging.info("step %d  %s", step, "  ".join(f"{k} {v}" for k, v in shown.items()))

    return track
