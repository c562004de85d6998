# SPDX-License-Identifier: Apache-2.0
"""Metric rows of a training run: means on the devices, written one step late to every tracker."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics

from dcae_jax import files
from dcae_jax.jobs.times import Times
from dcae_jax.jobs.trackers import Tracker

Means = dict[str, clu_metrics.Metric]

PUBLISH_S = 60.0  # between two uploads of the TensorBoard file to a bucket, if it is small
PUBLISH_RATE = 1e6  # bytes per second, on average, of a large one
# Not averaged between rows: a row holds the last value.
LAST_VALUES = ("learning_rate", "skipped", "skipped_in_row")


def empty_means(metrics: Mapping[str, Any]) -> Means:
    """Empty running means of a train step's metrics."""
    return {name: _metric(name).empty() for name in metrics if name != "finite"}


def add_metrics(means: Means, metrics: Mapping[str, jax.Array]) -> Means:
    """The running means with one more step; a skipped step's values do not count."""
    finite = metrics["finite"][None] > 0
    return {
        name: mean.merge(
            clu_metrics.LastValue.from_model_output(metrics[name])
            if name in LAST_VALUES
            else clu_metrics.Average.from_model_output(metrics[name][None], finite)
        )
        for name, mean in means.items()
    }


def compute(means: Means) -> dict[str, float]:
    """The running means as host floats; NaN if no step counted."""
    return {name: float(np.asarray(mean.compute())) for name, mean in jax.device_get(means).items()}


def _metric(name: str) -> type[clu_metrics.Metric]:
    return clu_metrics.LastValue if name in LAST_VALUES else clu_metrics.Average


class MetricWriter:
    """Keeps the running means and hands each row to the trackers.

    `flush` writes a row one step late: its values are read once the devices have the next step
    queued. Owns the pending row, the means and the TensorBoard file.
    """

    def __init__(
        self,
        workdir: str,
        start: int,
        times: Times,
        means: Means,
        empty: Callable[[], Means],
        trackers: Sequence[Tracker] = (),
    ):
        """start: the last finished step. means: the running means at that step.

        trackers: called with each row, on process 0, after metrics.jsonl and TensorBoard.
        """
        self.workdir, self.means = workdir, means
        self._start, self._times, self._empty, self._trackers = start, times, empty, trackers
        self._accumulate = jax.jit(add_metrics, donate_argnums=0)
        self._pending: tuple[int, Means, dict[str, float]] | None = None
        self._scores: dict[str, float] = {}
        self._events, self._publish_at = None, time.monotonic() + PUBLISH_S

    def __enter__(self) -> "MetricWriter":
        if jax.process_index() == 0:
            # clu's writers would import TensorFlow.
            from tensorboardX import SummaryWriter

            folder = files.spool(self.workdir)
            self._events = SummaryWriter(folder, purge_step=self._start + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._events:
            self._events.close()
            files.publish(self.workdir)

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Adds a step's metrics to the running means, on the devices."""
        self.means = self._accumulate(self.means, metrics)

    def row(self, step: int) -> None:
        """Makes the running means the row of `step` and resets them."""
        self._pending = (step, self.means, self._times.lap(step))
        self.means = self._empty()

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Adds an evaluation's scores to the row of `step`, which may already be written."""
        self._scores = dict(values)
        self._pending = self._pending or (step, {}, {})

    def flush(self) -> None:
        """Writes the pending row; blocks until its values are ready."""
        if self._pending is None:
            return
        (step, means, times), scores = self._pending, self._scores
        self._pending, self._scores = None, {}
        if self._events is None:
            return
        if means or step == 0:
            values = compute(means) | times | scores
            files.append_row(self.workdir, step, values)
        else:  # an earlier process wrote the row of this step
            values = scores
            files.merge_row(self.workdir, step, values)
        shown = values | self._times.gauges()
        for name, value in shown.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() > self._publish_at:
            self._events.flush()
            size = files.publish(self.workdir)
            self._publish_at = time.monotonic() + max(PUBLISH_S, size / PUBLISH_RATE)
        for track in self._trackers:
            track(step, shown)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image [H, W, 3] uint8 to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, pixels, step, dataformats="HWC")
