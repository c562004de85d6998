# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics

from dcae_jax import files
from dcae_jax.evaluation import reconstruction
from dcae_jax.jobs import sample

Totals = dict[str, clu_metrics.Metric]
LOWER_IS_BETTER = ("lpips", "rfid")
# Not averaged between two rows: the last value counts.
LAST_VALUES = ("learning_rate", "skipped", "skipped_in_row")


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
        files.append_row(self.workdir, step, values)
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "images_per_s") if k in values}
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix(shown, refresh=False)
        elif shown:
            logging.info("step %d  %s", step, "  ".join(f"{k} {v}" for k, v in shown.items()))

    def evaluation(self, step: int, results: dict[int, reconstruction.Result]) -> None:
        """Takes an evaluation into the row of `step`, and writes its pictures."""
        self.scores, self.evaluated = reconstruction.row_values(results), step
        self.pending = self.pending or (step, {}, {})
        if self.events is None:
            return
        logging.info("step %d\n%s", step, reconstruction.score_table(results))
        reconstruction.write_grids(results, self.workdir, f"step{step:07d}")
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
        files.merge_row(self.workdir, step, values)
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def samples(self, step: int, images: np.ndarray) -> None:
        """Writes a grid of samples [N, H, W, 3] uint8."""
        self.pending, self.evaluated = self.pending or (step, {}, {}), step
        if self.events is None:
            return
        grid = sample.grid(images)
        files.write_png(_samples_file(self.workdir, step), grid)
        self.events.add_image("samples", grid, step, dataformats="HWC")
        logging.info("step %d: %d samples in images/", step, len(images))

    def compare_with_start(self, scores: dict[str, float]) -> None:
        """Says which figures rose and which fell since the evaluation before the first step."""
        rows = files.read_rows(self.workdir)
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
