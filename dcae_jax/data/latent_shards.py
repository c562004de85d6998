# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module

from dcae_jax import files
from dcae_jax.data import latents, pipeline
from dcae_jax.errors import UserError

FLOAT16_MAX = 65504


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write, and which crops go into it."""

    file: str
    first: int
    last: int  # one past


def write_shard(
    workdir: str,
    shard: Shard,
    numbers: np.ndarray,
    encoded: Iterator[tuple[pipeline.Batch, np.ndarray]],
    source: Any,
    tally: pipeline.Unreadable,
) -> dict[str, Any] | None:
    """Writes the next batches, of crops `numbers` [batches, B], as `shard`, and its sums beside it.

    None, and nothing is left, if `encoded` ends before. Raises UserError.
    """
    path = os.path.join(workdir, shard.file)
    records, total, squares, unreadable, largest = 0, 0.0, 0.0, [], -1
    with contextlib.suppress(_Ended), files.atomic(path) as beside:
        with contextlib.closing(
            array_record_module.ArrayRecordWriter(beside, latents.WRITER_OPTIONS)
        ) as writer:
            for wanted in numbers:
                batch, values = next(encoded, (None, None))
                if batch is None or values is None:
                    raise _Ended
                failed = batch["unreadable"][batch["unreadable"] >= 0].tolist()
                tally.count(int((wanted >= 0).sum()), failed, "left out")
                unreadable += failed
                for row in np.flatnonzero(batch["mask"] > 0):
                    number, label = int(wanted[row]), int(batch["label"][row])
                    _check(values[row], label, source.name(number % len(source)))
                    writer.write(latents.pack(values[row], label, number))
                    # One record at a time, so that no sum depends on the size of the batches.
                    exact = values[row].astype(np.float64).reshape(-1, values.shape[-1])
                    total, squares = total + exact.sum(0), squares + (exact**2).sum(0)
                    records, largest = records + 1, max(largest, label)
        with open(beside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums = {
            "file": shard.file,
            "records": records,
            "bytes": os.path.getsize(beside),
            "sha256": digest,
            "sum": np.broadcast_to(total, values.shape[-1:]).tolist(),
            "sum_of_squares": np.broadcast_to(squares, values.shape[-1:]).tolist(),
            "unreadable": unreadable,
            "largest_label": largest,
        }
        # Before the shard gets its name, from where on it counts.
        files.write_json(latents.sidecar(path), sums)
        return sums
    return None


class _Ended(Exception):
    """There are no more batches: the job was asked to stop."""


def _check(values: np.ndarray, label: int, name: str) -> None:
    """Raises UserError for latents or labels that a diffusion model could not be trained on."""
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        if values.dtype == np.float16 and not np.isnan(wide).any():
            raise UserError(
                f"encode.dtype='float16' ends at {FLOAT16_MAX}, and the latents of {name} go "
                "beyond; use --config.encode.dtype=bfloat16"
            )
        raise UserError(f"the latents of {name} are not finite; the autoencoder's weights are bad")
    if label < 0:
        raise UserError(f"{name} has the label {label}: encode a split whose images have labels")


def read_sums(workdir: str, shard: Shard) -> dict[str, Any] | None:
    """What stands beside a shard; None unless the shard is there, whole."""
    path = os.path.join(workdir, shard.file)
    sums = files.read_json(latents.sidecar(path))
    if sums is None or not os.path.exists(path) or os.path.getsize(path) != sums["bytes"]:
        return None
    return sums


def statistics(every: list[dict[str, Any]], positions: int) -> dict[str, Any]:
    """rms, channel_mean and channel_std of the stored latents, from the sums of the shards.

    positions: latent positions of a record, all variants together.
    """
    n = positions * sum(sums["records"] for sums in every)
    total = [math.fsum(values) for values in zip(*(s["sum"] for s in every), strict=True)]
    squares = [
        math.fsum(values) for values in zip(*(s["sum_of_squares"] for s in every), strict=True)
    ]
    mean = [value / n for value in total]
    return {
        "rms": math.sqrt(math.fsum(squares) / (n * len(squares))),
        "channel_mean": mean,
        "channel_std": [
            math.sqrt(max(0.0, square / n - m**2)) for square, m in zip(squares, mean, strict=True)
        ],
    }
