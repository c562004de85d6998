# SPDX-License-Identifier: Apache-2.0
"""Batches: Grain pipelines over a source, whose only state is one integer.

Example i of a run is a function of (seed, i) alone: its epoch, its record and its crop. The state
is the global index i of the next example, so a run resumes with the same batches on any number of
hosts, workers and threads.
"""

import dataclasses
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import grain
import numpy as np
from absl import flags

from dcae_jax.config.schema import Data
from dcae_jax.data.latents import Latents
from dcae_jax.data.sources import ImageSource, Mixture, Source
from dcae_jax.data.transforms import augment, center_crop, least_side, random_crop
from dcae_jax.errors import MachineError, UserError

Example = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]  # Examples, stacked

TRIES = 8  # records tried per example
ENDLESS = 2**62  # examples; Grain divides lengths as floats, which round the longest up
GOLDEN = (5**0.5 - 1) / 2
BAD_FRACTION, BAD_AFTER = 0.01, 200  # an error above this fraction, after this many records
# What errors of a disk, its network or this process say, whichever library raises them.
OUTAGES = {
    os.strerror(getattr(errno, name))
    for name in "EIO ESTALE ENOTCONN ETIMEDOUT ECONNRESET ECONNREFUSED ECONNABORTED EHOSTDOWN "
    "EHOSTUNREACH ENETDOWN ENETUNREACH EREMOTEIO ENODEV ENXIO EMFILE ENFILE ENOMEM".split()
    if hasattr(errno, name)
}


def _raise_outage(error: Exception, name: str) -> None:
    """Raises MachineError unless `error` says that the record `name` itself is unusable.

    Another record in its place would be another example than a rerun has.
    """
    if isinstance(error, MachineError):  # of a store, after it was retried
        raise error
    reason = " ".join(str(error).split())[:200]
    if any(words in reason for words in OUTAGES):
        raise MachineError(
            f"{name} cannot be read ({reason}); check the disk or the network that it is on, then "
            "rerun the command"
        ) from error


# --- training: an endless stream of batches -------------------------------------------------------


def resolution_at(seed: int, sizes: tuple[int, ...], step: int) -> int:
    """The resolution of the batch of `step`, drawn from (seed, step)."""
    return int(np.random.default_rng((seed, 1, step)).choice(sizes))


@dataclasses.dataclass(frozen=True)
class _Load:
    """(global index, record) -> example. An unreadable record is replaced.

    Failures travel with the example ('unreadable': record numbers, padded with -1), since worker
    processes read but the main process counts.
    """

    source: ImageSource | Latents
    data: Data
    seed: int
    batch_size: int
    first: int  # index of the first example of a batch, modulo batch_size
    sizes: tuple[int, ...]

    def example(self, index: int, record: int) -> Example:
        unreadable = np.full(TRIES, -1, np.int64)
        for attempt in range(TRIES):
            try:
                return {**self._read(index, record), "unreadable": unreadable}
            except Exception as error:  # whatever a decoder raises, the record is unusable
                _raise_outage(error, self.source.name(record))
                unreadable[attempt] = record
                # The index keeps counting across epochs, so each epoch draws another record.
                rng = np.random.default_rng((self.seed, 3, index, attempt))
                record = int(rng.integers(len(self.source)))
        # No record could be read. This example only reports the failures; `take` then raises.
        blank: Example = {"label": np.int32(0), "unreadable": unreadable}
        if isinstance(self.source, Latents):
            return {**blank, "latent": self.source.blank()}
        return {**blank, "image": np.zeros((self._size(index),) * 2 + (3,), np.uint8)}

    def _size(self, index: int) -> int:
        return resolution_at(self.seed, self.sizes, (index - self.first) // self.batch_size)

    def _read(self, index: int, record: int) -> Example:
        rng = np.random.default_rng((self.seed, 2, index))
        if isinstance(self.source, Latents):
            values, label = self.source[record]
            # The crop, or its mirror image if both are stored.
            variant = rng.integers(len(values)) if self.data.flip else 0
            return {"latent": values[variant], "label": np.int32(label)}
        size = self._size(index)
        image, label = self.source.read(record, least_side(self.data, size))
        return {"image": augment(image, size, self.data, rng), "label": np.int32(label)}


@dataclasses.dataclass
class Unreadable:
    """Counts unreadable records and logs each once; too many are an error."""

    name: Callable[[int], str]  # of a record
    seen: set[int] = dataclasses.field(default_factory=set)
    read: int = 0
    failed: int = 0

    def take(self, batch: Batch) -> Batch:
        """Counts and removes the 'unreadable' of a training batch. Raises UserError."""
        report = batch.pop("unreadable")
        bad = report[report >= 0].tolist()
        none_left = bool((report >= 0).all(-1).any())
        self.count(len(report) + len(bad), bad, "replaced", none_left)
        return batch

    def count(self, read: int, bad: list[int], fate: str, none_left: bool = False) -> None:
        """Adds `read` attempts, including the failed ones on records `bad`. Raises UserError.

        fate: what happens to the failed records, for the log. none_left: an example has no
        readable record.
        """
        self.read += read
        self.failed += len(bad)
        for record in sorted(set(bad) - self.seen):
            self.seen.add(record)
            logging.warning("unreadable, %s: %s", fate, self.name(record))
        too_many = self.read >= BAD_AFTER and self.failed > BAD_FRACTION * self.read
        if none_left or too_many:
            known = bad or sorted(self.seen)
            example = self.name(known[0]) if known else "see the log"
            raise UserError(
                f"{self.failed} of {self.read} records read are unreadable ({example}); "
                "repair or remove them"
            )


def _record_order(source: ImageSource | Latents, seed: int) -> grain.MapDataset[int]:
    """Global index -> record, reshuffled each epoch; parts of a mixture shuffle independently."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    parts, first = [], 0
    for number, part in enumerate(source.parts):
        records = grain.MapDataset.range(first, first + len(part))
        # With a shared seed, parts of equal length would be drawn in the same order.
        own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) if number else seed
        parts.append(records.seed(own).shuffle().repeat())
        first += len(part)
    return grain.MapDataset.mix(parts, weights=source.weights)


def training_batches(
    source: ImageSource | Latents,
    data: Data,
    *,
    seed: int,
    batch_size: int,
    sizes: tuple[int, ...],
    start: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """This process's slices of the global batches, from the example with global index `start`.

    batch_size: B, global. sizes: pixels per side, one drawn per batch. A batch: image
    [B / processes, size, size, 3] uint8, label [B / processes] int32. For latents, latent
    [B / processes, h, w, c] in the stored dtype, unscaled, replaces image. Process p gets rows
    p * B / processes onwards of each global batch. Raises UserError if too many records are
    unreadable.
    """
    # `start` need not be a multiple of batch_size: a resumed run may have changed the latter.
    load = _Load(source, data, seed, batch_size, start % batch_size, sizes)
    examples = _record_order(source, seed).map_with_index(load.example)[start:ENDLESS]
    batches = examples.batch(batch_size // processes)[process::processes]
    counter = Unreadable(source.name)
    for batch in _read_ahead(batches, data.threads, data.prefetch, data.workers):
        yield counter.take(batch)


def _read_ahead(
    batches: grain.MapDataset[Batch], threads: int, ahead: int, workers: int
) -> Iterable[Batch]:
    """Iterates over `batches`, reading `ahead` of them in advance (per worker process)."""
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = batches.to_iter_dataset(options)
    if not workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, even in a notebook
    return stream.mp_prefetch(grain.MultiprocessingOptions(workers), _ignore_interrupts)


def _ignore_interrupts(worker: int, workers: int) -> None:
    """In a worker: ignores Ctrl-C, which a terminal sends to all processes; the job handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- evaluation and encoding: each image once -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Crops:
    """i -> crop numbers[i]. Negative numbers and unreadable images have mask 0."""

    source: Source
    numbers: np.ndarray
    size: int
    crops: int

    def example(self, i: int) -> Example:
        number = self.numbers[i]
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
            except Exception as error:  # as in training; the image is left out and logged
                _raise_outage(error, self.source.name(record))
                unreadable = record
        return {
            "image": pixels,
            "label": np.int32(label),
            "mask": np.float32(mask),
            "unreadable": np.int64(unreadable),
        }


def fixed_crops(
    source: Source,
    numbers: np.ndarray,
    *,
    size: int,
    batch_size: int,
    crops: int = 1,
    threads: int = 4,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of the crops `numbers`, in order; a negative number is padding, with mask 0.

    numbers: [N], N a multiple of batch_size. Crop n is of image n % len(source): ADM's centre crop
    if crops = 1, else a random crop whose position is determined by n. A batch: image
    [B, size, size, 3] uint8, label [B] int32, mask [B] float32, unreadable [B] (the number of the
    image, or -1).
    """
    examples = grain.MapDataset.range(len(numbers)).map(
        _Crops(source, numbers, size, crops).example
    )
    yield from _read_ahead(examples.batch(batch_size), threads, threads, workers)


def evaluation_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    count: int = 0,
    crops: int = 1,
    threads: int = 4,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """This process's slices of batches of all images of `source`, each once, in order.

    A batch: image [B / processes, size, size, 3] uint8, label, mask [B / processes] float32. The
    last batch is padded with images of mask 0. With crops > 1 each image is cropped that many times
    at fixed random positions, not once in the centre. `count` > 0 takes that many crops, spread
    over the source.
    """
    numbers = spread(len(source), evaluated(source, count, crops))
    local = batch_size // processes
    mine = padded(numbers, batch_size).reshape(-1, processes, local)[:, process].ravel()
    logged = set()
    for batch in fixed_crops(
        source, mine, size=size, batch_size=local, crops=crops, threads=threads
    ):
        for record in batch.pop("unreadable").tolist():
            if record >= 0 and record not in logged:
                logged.add(record)
                logging.warning("unreadable, left out: %s", source.name(record))
        yield batch


def evaluated(source: Source, count: int, crops: int = 1) -> int:
    """Number of crops to read from `source`: at most `count`; 0 means all."""
    total = len(source) * crops
    return min(total, count) if count else total


def spread(images: int, count: int) -> np.ndarray:
    """`count` ascending crop numbers, spread evenly over the images; see `fixed_crops`.

    Sources are sorted by class, and mixtures by part, so the first images cover few classes. With
    count > images, every image is cropped once before any is cropped twice. The remaining numbers
    split the images into equal intervals; multiples of the golden ratio place each number in its
    interval. With equal spacing, a source whose classes alternate would yield few classes.
    """
    whole, rest = divmod(count, images)
    i = np.arange(rest)
    low, high = (-(-k * images // max(rest, 1)) for k in (i, i + 1))
    places = low + (i * GOLDEN % 1 * (high - low)).astype(np.int64)
    return np.concatenate([np.arange(whole * images), whole * images + places])


def padded(numbers: np.ndarray, multiple: int) -> np.ndarray:
    """`numbers` [N], padded with -1 to a multiple of `multiple`."""
    return np.pad(numbers, (0, -len(numbers) % multiple), constant_values=-1)
