# SPDX-License-Identifier: Apache-2.0
"""Batches: Grain pipelines over a source of images, whose state is one number.

Example i of a run is a function of (seed, i) alone: which epoch it falls in, which record it
reads, how it is cropped. The position of the data is the global index i of the next example, so
that a run continues with the same batches on any number of hosts, workers and threads.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dcae_jax.config import training_resolutions
from dcae_jax.data.latents import Latents
from dcae_jax.data.sources import Mixture
from dcae_jax.data.transforms import augment, center_crop, least_side, random_crop
from dcae_jax.errors import UserError

Batch = dict[str, np.ndarray]

TRIES = 8  # records tried for one example before giving up
BAD_SHARE, BAD_AFTER = 0.01, 200  # above this share of at least so many records: an error


# --- training: an endless stream of batches -------------------------------------------------------


def resolution_at(seed: int, sizes: tuple[int, ...], step: int) -> int:
    """The resolution of the batch of `step`, drawn from (seed, step)."""
    return int(np.random.default_rng((seed, 1, step)).choice(sizes))


@dataclasses.dataclass(frozen=True)
class _Load(grain.transforms.MapWithIndex):
    """(global index, record) -> example. A record that cannot be read is replaced.

    Failures travel with the example ('unreadable', record numbers, -1 where none), since the
    process that reads is not the one that counts.
    """

    source: Any
    data: Any
    seed: int
    batch_size: int
    sizes: tuple[int, ...]

    def map_with_index(self, index: int, record: int) -> dict[str, np.ndarray]:
        read = self._latent if isinstance(self.source, Latents) else self._image
        unreadable = np.full(TRIES, -1, np.int64)
        for attempt in range(TRIES):
            try:
                return read(index, record) | {"unreadable": unreadable}
            except Exception:  # whatever a decoder raises, the record is of no use
                unreadable[attempt] = record
                # The index counts through the epochs, so this is hash(seed, epoch, index, try).
                rng = np.random.default_rng((self.seed, 3, index, attempt))
                record = int(rng.integers(len(self.source)))
        # Nothing could be read. This example only carries the news, and is then thrown away.
        return {"label": np.int32(0), "unreadable": unreadable} | (
            {"latent": self.source.blank()}
            if isinstance(self.source, Latents)
            else {"image": np.zeros((self._size(index),) * 2 + (3,), np.uint8)}
        )

    def _size(self, index: int) -> int:
        return resolution_at(self.seed, self.sizes, index // self.batch_size)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 2, index))

    def _image(self, index: int, record: int) -> dict[str, np.ndarray]:
        size = self._size(index)
        image, label = self.source.read(record, least_side(self.data, size))
        pixels = augment(image, size, self.data, self._rng(index))
        return {"image": pixels, "label": np.int32(label)}

    def _latent(self, index: int, record: int) -> dict[str, np.ndarray]:
        """One of the stored variants: the crop, or its mirror image where both are there."""
        values, label = self.source[record]
        variant = self._rng(index).integers(len(values)) if self.data.flip else 0
        return {"latent": values[variant], "label": np.int32(label)}


@dataclasses.dataclass
class Unreadable:
    """Counts records that could not be read, names each once, and stops when there are many."""

    source: Any
    seen: set[int] = dataclasses.field(default_factory=set)
    read: int = 0
    failed: int = 0

    def take(self, batch: Batch) -> Batch:
        """The batch without its report, which is counted. Raises UserError."""
        report = batch.pop("unreadable")
        bad = report[report >= 0].tolist()
        none_left = bool((report >= 0).all(-1).any())
        self.count(len(report) + len(bad), bad, "replaced", none_left)
        return batch

    def count(self, read: int, bad: list[int], fate: str, none_left: bool = False) -> None:
        """Counts so many attempts, and the records that failed, named once. Raises UserError.

        fate: what became of them, for the log. none_left: for an example no record was found.
        """
        self.read += read
        self.failed += len(bad)
        for record in sorted(set(bad) - self.seen):
            self.seen.add(record)
            logging.warning("unreadable, %s: %s", fate, self.source.name(record))
        too_many = self.read >= BAD_AFTER and self.failed > BAD_SHARE * self.read
        if none_left or too_many:
            known = bad or sorted(self.seen)
            example = self.source.name(known[0]) if known else "see the log"
            raise UserError(
                f"{self.failed} of {self.read} records read are unreadable ({example}); "
                "repair or remove them"
            )


def _record_order(source: Any, seed: int) -> grain.MapDataset:
    """Global index -> record: each epoch a new order; a mixture's parts each by their own."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    parts, first = [], 0
    for part in source.parts:
        records = grain.MapDataset.range(first, first + len(part))
        parts.append(records.seed(seed).shuffle().repeat())
        first += len(part)
    return grain.MapDataset.mix(parts, weights=source.weights)


def training_batches(
    config: Any, source: Any, start: int, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """This process's share of the global batches, from the example with global index `start`.

    source: what `training_source` opened.

    A batch: image [B / processes, size, size, 3] uint8, label [B / processes] int32. Of latents,
    instead of image: latent [B / processes, h, w, c] in the stored dtype, unscaled. Process p
    gets rows p * B / processes onwards of each global batch of B = config.batch_size.
    Raises UserError when too many records cannot be read.
    """
    local = config.batch_size // processes
    load = _Load(source, config.data, config.seed, config.batch_size, training_resolutions(config))
    dataset = (
        _record_order(source, config.seed)
        .map_with_index(load)[start:]
        .batch(local)[process::processes]
    )
    settings = config.data
    stream = _read_ahead(dataset, settings.threads, settings.prefetch, settings.workers)
    counter = Unreadable(source)
    for batch in stream:
        yield counter.take(batch)


def _read_ahead(batches: grain.MapDataset, threads: int, ahead: int, workers: int) -> Any:
    """Iterates over `batches`, `ahead` of them read in advance (by each of the processes)."""
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = batches.to_iter_dataset(options)
    if not workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also in a notebook
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


# --- evaluation and encoding: each image once -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LoadOnce(grain.transforms.Map):
    """Number of a crop -> the crop. Numbers below 0, and unreadable records, have mask 0."""

    source: Any
    size: int
    crops: int

    def map(self, number: int) -> dict[str, np.ndarray]:
        pixels, label, mask = np.zeros((self.size, self.size, 3), np.uint8), 0, 0.0
        unreadable = -1
        if number >= 0:
            record = int(number) % len(self.source)
            try:
                image, label = self.source[record]
                if self.crops == 1:
                    pixels = np.asarray(center_crop(image, self.size))
                else:
                    rng = np.random.default_rng((4, number))
                    pixels = np.asarray(random_crop(image, self.size, rng))
                mask = 1.0
            except Exception:  # as in training; the image is left out and named
                unreadable = record
        return {
            "image": pixels,
            "label": np.int32(label),
            "mask": np.float32(mask),
            "unreadable": np.int64(unreadable),
        }


def fixed_crops(
    source: Any,
    numbers: np.ndarray,
    *,
    size: int,
    batch_size: int,
    crops: int = 1,
    threads: int = 4,
    workers: int = 0,
) -> Iterator[Batch]:
    """The crops of these numbers, in order; a number below 0 fills up, with mask 0.

    numbers: a multiple of batch_size of them. Crop n is of image n % len(source): ADM's centre crop
    with crops = 1, else one at a place that is fixed by n. A batch: image [B, size, size, 3] uint8,
    label [B] int32, mask [B] float32, unreadable [B] (the image's number, or -1).
    """
    batches = grain.MapDataset.source(numbers).map(_LoadOnce(source, size, crops)).batch(batch_size)
    yield from _read_ahead(batches, threads, threads, workers)


def evaluation_batches(
    source: Any,
    *,
    size: int,
    batch_size: int,
    count: int = 0,
    crops: int = 1,
    threads: int = 4,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """This process's share of all images of `source`, each once, in order.

    A batch: image [B / processes, size, size, 3] uint8, label, mask [B / processes] float32. The
    last batch is filled with images of mask 0. With crops > 1 an image is cut that many times at
    fixed random places instead of once in the middle. `count` > 0 stops after so many crops.
    """
    total = len(source) * crops
    total = min(total, count) if count else total
    local = batch_size // processes
    mine = padded(np.arange(total), batch_size).reshape(-1, processes, local)[:, process].ravel()
    named = set()
    for batch in fixed_crops(
        source, mine, size=size, batch_size=local, crops=crops, threads=threads
    ):
        for record in batch.pop("unreadable").tolist():
            if record >= 0 and record not in named:
                named.add(record)
                logging.warning("unreadable, left out: %s", source.name(record))
        yield batch


def padded(numbers: np.ndarray, multiple: int) -> np.ndarray:
    """`numbers` with -1 behind them, to a multiple."""
    return np.pad(numbers, (0, -len(numbers) % multiple), constant_values=-1)
