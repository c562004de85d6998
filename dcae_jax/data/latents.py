# SPDX-License-Identifier: Apache-2.0
"""Latents on disk: a folder of ArrayRecord shards, and a manifest that describes them.

One record is one crop of an image: a header (HEADER) and the values [flips, h, w, c] in C order,
both little-endian. `flips` is 2 if the mirrored crop's latents follow the crop's, else 1. Values
are stored as the encoder returns them, unscaled. A JSON file beside each shard holds its sums; the
manifest's statistics are computed from these. docs/latents.md lists the keys of the manifest.
"""

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import grain
import ml_dtypes
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from dcae_jax import files
from dcae_jax.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "encode.json"  # identity of the job that writes the shards, written at its start
FORMAT = 1
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access; latents hardly compress
EXTENSION = ".array_record"

MAGIC = b"DCL1"
HEADER = struct.Struct("<4sBBHHHiq")  # MAGIC, dtype, flips, h, w, c, label, crop number
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CODES = tuple(DTYPES)  # the header's dtype is an index into these
FLOAT16_MAX = 65504


# --- records --------------------------------------------------------------------------------------


def pack(values: np.ndarray, label: int, number: int) -> bytes:
    """Packs a record. values: [flips, h, w, c], one of DTYPES; number: global crop number."""
    code = CODES.index(values.dtype.name)
    return HEADER.pack(MAGIC, code, *values.shape, label, number) + values.tobytes()


def unpack(record: bytes) -> tuple[np.ndarray, int, int]:
    """Unpacks a record to (values [flips, h, w, c], label, crop number). Raises ValueError."""
    if len(record) < HEADER.size or not record.startswith(MAGIC):
        raise ValueError("not a record of latents")
    _, code, *shape, label, number = HEADER.unpack_from(record)
    dtype = DTYPES[CODES[code]]
    if len(record) != HEADER.size + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a record of {len(record)} bytes does not fit its shape {shape}")
    return np.frombuffer(record, dtype, offset=HEADER.size).reshape(shape), label, number


# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write. It holds crops first, ..., last - 1 of those to encode."""

    file: str
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class ShardSums:
    """Contents of the JSON file beside a complete shard."""

    file: str
    records: int
    bytes: int
    sha256: str
    sum: list[float]  # [c] over the stored values of its records
    sum_of_squares: list[float]  # [c]
    unreadable: list[int]  # numbers of the images left out, one entry per crop
    largest_label: int  # -1 if there are no records


def shard_name(number: int, shards: int) -> str:
    return f"latents-{number:05d}-of-{shards:05d}{EXTENSION}"


def plan_shards(crops: int, shard_size: int) -> list[Shard]:
    """Splits `crops` crops into shards of `shard_size`; the last one may be smaller."""
    count = math.ceil(crops / shard_size)
    return [
        Shard(shard_name(s, count), s * shard_size, min((s + 1) * shard_size, crops))
        for s in range(count)
    ]


def _sums_file(shard: str) -> str:
    return shard.removesuffix(EXTENSION) + ".json"


def write_shard(
    workdir: str,
    shard: Shard,
    channels: int,
    batches: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray], np.ndarray]],
    name: Callable[[int], str],
) -> ShardSums:
    """Writes `batches` as `shard`, and its sums beside it. Raises UserError.

    batches: (crop numbers [B]; label, mask and unreadable [B] of `pipeline.fixed_crops`; latents
    [B, flips, h, w, c]). name: maps a crop number to its image's name, for messages. If `batches`
    raises, no file is left behind.
    """
    path = os.path.join(workdir, shard.file)
    total, squares = np.zeros(channels), np.zeros(channels)
    records, unreadable, largest = 0, [], -1
    with files.atomic(path) as beside:
        with contextlib.closing(
            array_record_module.ArrayRecordWriter(beside, WRITER_OPTIONS)
        ) as writer:
            for numbers, batch, values in batches:
                unreadable += batch["unreadable"][batch["unreadable"] >= 0].tolist()
                for row in np.flatnonzero(batch["mask"] > 0):
                    number, label = int(numbers[row]), int(batch["label"][row])
                    _check(values[row], label, name(number))
                    writer.write(pack(values[row], label, number))
                    # One record at a time, so that the sums do not depend on the batch size.
                    exact = values[row].astype(np.float64).reshape(-1, channels)
                    total, squares = total + exact.sum(0), squares + (exact**2).sum(0)
                    records, largest = records + 1, max(largest, label)
        sums = ShardSums(
            file=shard.file,
            records=records,
            bytes=os.path.getsize(beside),
            sha256=files.sha256(beside),
            sum=total.tolist(),
            sum_of_squares=squares.tolist(),
            unreadable=unreadable,
            largest_label=largest,
        )
        # Written before the shard is renamed: a shard counts once it has its final name.
        files.write_json(_sums_file(path), dataclasses.asdict(sums))
    return sums


def _check(values: np.ndarray, label: int, name: str) -> None:
    """Raises UserError for latents or labels that a diffusion model could not be trained on."""
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        if values.dtype == np.float16 and not np.isnan(wide).any():
            raise UserError(
                f"encode.dtype='float16' overflows above {FLOAT16_MAX}, and the latents of {name} "
                "do; use --config.encode.dtype=bfloat16"
            )
        raise UserError(f"the latents of {name} are not finite; the autoencoder's weights are bad")
    if label < 0:
        raise UserError(f"{name} has label {label}; encode a split whose images have labels")


def read_sums(workdir: str, shard: Shard) -> ShardSums | None:
    """The sums of a shard; None unless the shard is complete."""
    path = os.path.join(workdir, shard.file)
    sums = files.read_json(_sums_file(path))
    return ShardSums(**sums) if sums and files.size(path) == sums["bytes"] else None


def read_all_sums(workdir: str, shards: Sequence[Shard]) -> list[ShardSums]:
    """The sums of all shards. Raises UserError if one is missing."""
    sums = [read_sums(workdir, shard) for shard in shards]
    missing = [shard.file for shard, found in zip(shards, sums, strict=True) if found is None]
    if missing:
        raise UserError(
            f"{workdir} lacks {len(missing)} shards that were written ({missing[0]}); use a "
            "folder that all processes share, and rerun the command"
        )
    return [found for found in sums if found is not None]


def summary(shards: Sequence[ShardSums], positions: int) -> dict[str, Any]:
    """Manifest keys computed from the shards: count, statistics, shards.

    positions: latent positions per record, summed over flips.
    """
    count = sum(shard.records for shard in shards)
    n = positions * count
    total = [math.fsum(values) for values in zip(*(s.sum for s in shards), strict=True)]
    squares = [
        math.fsum(values) for values in zip(*(s.sum_of_squares for s in shards), strict=True)
    ]
    mean = [value / n for value in total]
    variance = [max(0.0, square / n - m**2) for square, m in zip(squares, mean, strict=True)]
    return {
        "count": count,
        "rms": math.sqrt(math.fsum(squares) / (n * len(squares))),
        "channel_mean": mean,
        "channel_std": [math.sqrt(value) for value in variance],
        "shards": [
            {"file": s.file, "records": s.records, "bytes": s.bytes, "sha256": s.sha256}
            for s in shards
        ],
    }


def check_identity(workdir: str, identity: Mapping[str, Any]) -> bool:
    """Whether `workdir` already has this identity. Raises UserError if it holds other latents."""
    before = files.read_json(os.path.join(workdir, IDENTITY))
    begun = any(name == MANIFEST or name.endswith(EXTENSION) for name in files.listdir(workdir))
    if begun and before is None:
        raise UserError(
            f"{workdir} holds latents or records but no {IDENTITY} to identify them; use "
            "another --workdir"
        )
    if begun and before != identity:
        changes = [
            f"{key} was {before.get(key)!r}, is {identity.get(key)!r}"
            for key in sorted(before.keys() | identity.keys())
            if before.get(key) != identity.get(key)
        ]
        raise UserError(
            f"{workdir} holds other latents: {'; '.join(changes)}; use another --workdir"
        )
    return before == identity


# --- reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Latents:
    """A source of latents; any thread or process may read it."""

    path: str
    manifest: dict[str, Any]
    records: Sequence[bytes]  # of all shards; a file is opened when it is first read

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """([flips, h, w, c] in the stored dtype, unscaled; label). Raises ValueError."""
        values, label, _ = unpack(self.records[i])
        if values.shape != self.shape or values.dtype.name != self.manifest["dtype"]:
            raise ValueError(f"latents {values.dtype} {values.shape} do not match the manifest")
        return values, label

    def name(self, i: int) -> str:
        for shard in self.manifest["shards"]:
            if i < shard["records"]:
                return f"{os.path.join(self.path, shard['file'])}, record {i}"
            i -= shard["records"]
        raise IndexError(i)

    def blank(self) -> np.ndarray:
        """Zeros of the shape and dtype of one variant's latents [h, w, c]."""
        return np.zeros(self.shape[1:], DTYPES[self.manifest["dtype"]])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[flips, h, w, c] of a record."""
        m = self.manifest
        return m["flips"], m["latent_size"], m["latent_size"], m["latent_channels"]


def latents(path: str) -> Latents:
    """The latents that the job `encode` wrote to `path`. Raises UserError if any are missing."""
    again = "rerun the command of the job encode to complete it"
    try:
        manifest = files.read_json(os.path.join(path, MANIFEST))
    except ValueError as error:
        raise UserError(f"data.path={path!r}: {MANIFEST} is not JSON; {again}") from error
    if manifest is None and IDENTITY in files.listdir(path):
        raise UserError(f"data.path={path!r} is not fully encoded; {again}")
    if manifest is None:
        raise UserError(
            f"data.path={path!r} holds no latents: it has no {MANIFEST}; make them with "
            "configs/encode.py, and name its workdir"
        )
    if not isinstance(manifest, dict) or manifest.get("kind") != "latents":
        raise UserError(f"data.path={path!r} holds no latents: {MANIFEST} is for something else")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"data.path={path!r} has latents of format {manifest['format']}, but this version "
            f"reads {FORMAT}; encode again"
        )
    shards, sizes = [], files.sizes(path)
    for shard in manifest["shards"]:
        file = os.path.join(path, shard["file"])
        size = sizes.get(shard["file"])
        if size is None:
            raise UserError(f"data.path={path!r} lacks the shard {shard['file']}; {again}")
        if size != shard["bytes"]:
            raise UserError(
                f"data.path={path!r}: the shard {shard['file']} has {size:,} bytes, not "
                f"{shard['bytes']:,}; {again}"
            )
        if shard["records"]:
            shards.append((file, shard["records"]))
    copies = files.local_files([file for file, _ in shards])
    # With the range in the name, Grain does not open the file to count its records.
    shards = [f"{copy}[0:{count}]" for copy, (_, count) in zip(copies, shards, strict=True)]
    records = cast(Sequence[bytes], grain.sources.ArrayRecordDataSource(shards))
    if len(records) != manifest["count"]:
        raise UserError(
            f"data.path={path!r}: the shards hold {len(records):,} crops, {MANIFEST} says "
            f"{manifest['count']:,}; {again}"
        )
    return Latents(path, manifest, records)
