# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose steps are no longer finite, and keeps the batch where that began."""

import logging
import os
from typing import Any

import jax
import numpy as np

from dcae_jax import report
from dcae_jax.config import MachineError

FOLDER = "diverged"


class Diverged(MachineError):
    """Too many steps in a row were not finite."""


class Watch:
    """Counts steps that were skipped one after the other; remembers the batch of the first."""

    def __init__(self, workdir: str, limit: int):
        self.workdir, self.limit = workdir, limit
        self.first: tuple[int, dict[str, Any]] | None = None

    def look(self, step: int, skipped_in_row: jax.Array, batch: dict[str, Any]) -> None:
        """Takes step `step` with its host batch. Raises Diverged after `limit` in a row."""
        count = int(skipped_in_row)
        if not count:
            self.first = None
            return
        self.first = self.first or (step, batch)
        if count == 1:
            logging.warning("step %d was skipped: loss or gradients are not finite", step)
        if count >= self.limit:
            where = write_batch(self.workdir, *self.first)
            raise Diverged(
                f"stopped at step {step}: loss or gradients were not finite {count} times in a "
                f"row; the last checkpoint is good: look at the first such batch, {where}, or "
                "lower optimizer.learning_rate"
            )


def write_batch(workdir: str, step: int, batch: dict[str, Any]) -> str:
    """WORKDIR/diverged/step<step>.npz, as PNG too where it has images; returns the path.

    Of a distributed run each process writes its own rows.
    """
    name = f"step{step:07d}"
    if jax.process_count() > 1:
        name += f"_process{jax.process_index()}"
    path = os.path.join(workdir, FOLDER, f"{name}.npz")
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in batch.items()}
    with report.atomic(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)
    images = batch.get("image")
    if images is not None and images.dtype == np.uint8:
        report.write_png(path.replace(".npz", ".png"), report.image_grid((images,)))
    return path
