# SPDX-License-Identifier: Apache-2.0
"""Stops a run after consecutive non-finite steps, and saves the batch of the first."""

import collections
import logging
import os
from typing import Any

import jax
import numpy as np

from dcae_jax import files
from dcae_jax.errors import MachineError

FOLDER = "diverged"
# A step is read this many steps late, so that the devices always have work queued.
LAG = 2

Batch = dict[str, np.ndarray]


class Diverged(MachineError):
    """Too many consecutive non-finite steps."""


class NanGuard:
    """Counts consecutive skipped steps; remembers the batch of the first."""

    def __init__(self, workdir: str, limit: int):
        self._workdir, self._limit = workdir, limit
        self._in_flight: collections.deque[tuple[int, jax.Array, Batch]] = collections.deque()
        self._first: tuple[int, Batch] | None = None

    @property
    def skipping(self) -> bool:
        """Whether the last step checked was skipped."""
        return self._first is not None

    def add(self, step: int, skipped_in_row: jax.Array, batch: Batch) -> None:
        """Queues a step with its host batch; checks the one LAG steps ago. Raises Diverged."""
        self._in_flight.append((step, skipped_in_row, batch))
        while len(self._in_flight) > LAG:
            self._look(*self._in_flight.popleft())

    def drain(self) -> None:
        """Checks all queued steps; blocks on the devices. Raises Diverged."""
        while self._in_flight:
            self._look(*self._in_flight.popleft())

    def _look(self, step: int, skipped_in_row: jax.Array, batch: Batch) -> None:
        count = int(skipped_in_row)
        if not count:
            self._first = None
            return
        self._first = self._first or (step, batch)
        if count == 1:
            logging.warning("step %d was skipped: loss or gradients are not finite", step)
        if count >= self._limit:
            where = write_batch(self._workdir, *self._first)
            raise Diverged(
                f"stopped at step {step}: loss or gradients were not finite for {count} "
                f"consecutive steps; the last checkpoint is good: inspect the first bad batch, "
                f"{where}, or lower optimizer.learning_rate"
            )


def write_batch(workdir: str, step: int, batch: Batch) -> str:
    """Writes WORKDIR/diverged/step<step>.npz, and a PNG if it has images; returns the path.

    In a distributed run, each process writes its own rows.
    """
    name = f"step{step:07d}"
    if jax.process_count() > 1:
        name += f"_process{jax.process_index()}"
    path = os.path.join(workdir, FOLDER, f"{name}.npz")
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in batch.items()}
    with files.atomic(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)
    images = batch.get("image")
    if images is not None and images.dtype == np.uint8:
        files.write_png(path.replace(".npz", ".png"), files.image_grid((images,)))
    return path
