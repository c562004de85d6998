# SPDX-License-Identifier: Apache-2.0
"""Latents on disk: a folder of ArrayRecord shards, and a manifest that says what is in them.

One record is one crop of an image: a header (HEADER) and the values [flips, h, w, c] in C order,
both little-endian. `flips` is 2 where the mirrored crop stands behind the crop, else 1. The values
are what the encoder gave, unscaled. docs/latents.md lists the keys of the manifest.
"""

import dataclasses
import math
import os
import struct
from typing import Any

import grain
import ml_dtypes
import numpy as np

from dcae_jax import files as files_lib
from dcae_jax.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "encode.json"  # of the job that writes the shards, there from its start
FORMAT = 1
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access; latents hardly compress

MAGIC = b"DCL1"
HEADER = struct.Struct("<4sBBHHHiq")  # MAGIC, dtype, flips, h, w, c, label, number of the crop
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CODES = tuple(DTYPES)  # what a header's dtype counts in


def shard_name(number: int, shards: int) -> str:
    return f"latents-{number:05d}-of-{shards:05d}.array_record"


def sidecar(shard: str) -> str:
    """The JSON beside a shard: its size and the sums that the statistics are made of."""
    return shard.removesuffix(".array_record") + ".json"


def pack(values: np.ndarray, label: int, number: int) -> bytes:
    """A record. values: [flips, h, w, c] of one of DTYPES; number: of the crop among all."""
    code = CODES.index(values.dtype.name)
    return HEADER.pack(MAGIC, code, *values.shape, label, number) + values.tobytes()


def unpack(record: bytes) -> tuple[np.ndarray, int, int]:
    """(values [flips, h, w, c], label, number of the crop) of a record. Raises ValueError."""
    if len(record) < HEADER.size or not record.startswith(MAGIC):
        raise ValueError("no record of latents")
    _, code, *shape, label, number = HEADER.unpack_from(record)
    dtype = DTYPES[CODES[code]]
    if len(record) != HEADER.size + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a record of {len(record)} bytes says that its shape is {shape}")
    return np.frombuffer(record, dtype, offset=HEADER.size).reshape(shape), label, number


@dataclasses.dataclass(frozen=True)
class Latents:
    """A source of latents; any thread or process may read it."""

    path: str
    manifest: dict[str, Any]
    records: Any  # Grain's source of the shards' records, which opens files when they are read

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """([flips, h, w, c] in the stored dtype, unscaled; label). Raises ValueError."""
        values, label, _ = unpack(self.records[i])
        if values.shape != self.shape or values.dtype.name != self.manifest["dtype"]:
            raise ValueError(f"latents {values.dtype} {values.shape} are not those of the manifest")
        return values, label

    def name(self, i: int) -> str:
        for shard in self.manifest["shards"]:
            if i < shard["records"]:
                return f"{os.path.join(self.path, shard['file'])}, record {i}"
            i -= shard["records"]
        raise IndexError(i)

    def blank(self) -> np.ndarray:
        """Zeros in the place of one variant's latents [h, w, c]."""
        return np.zeros(self.shape[1:], DTYPES[self.manifest["dtype"]])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[flips, h, w, c] of a record."""
        m = self.manifest
        return m["flips"], m["latent_size"], m["latent_size"], m["latent_channels"]


def latents(path: str) -> Latents:
    """What the job `encode` left in `path`. Raises UserError unless it is there, whole."""
    again = "run the command of the job encode again, which completes it"
    try:
        manifest = files_lib.read_json(os.path.join(path, MANIFEST))
    except ValueError as error:
        raise UserError(f"data.path={path!r}: {MANIFEST} is not JSON; {again}") from error
    if manifest is None and os.path.exists(os.path.join(path, IDENTITY)):
        raise UserError(f"data.path={path!r} is not encoded to the end; {again}")
    if manifest is None:
        raise UserError(
            f"data.path={path!r} holds no latents: it has no {MANIFEST}; make them with "
            "configs/encode.py, and name its workdir"
        )
    if not isinstance(manifest, dict) or manifest.get("kind") != "latents":
        raise UserError(f"data.path={path!r} holds no latents: {MANIFEST} is of something else")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"data.path={path!r} has latents of format {manifest['format']}, this program reads "
            f"{FORMAT}; encode again"
        )
    files = []
    for shard in manifest["shards"]:
        file = os.path.join(path, shard["file"])
        if not os.path.exists(file):
            raise UserError(f"data.path={path!r} lacks the shard {shard['file']}; {again}")
        size = os.path.getsize(file)
        if size != shard["bytes"]:
            raise UserError(
                f"data.path={path!r}: the shard {shard['file']} has {size:,} bytes, not "
                f"{shard['bytes']:,}; {again}"
            )
        if shard["records"]:
            # With the range in its name, a file is not opened to count its records.
            files.append(f"{file}[0:{shard['records']}]")
    records = grain.sources.ArrayRecordDataSource(files)
    if len(records) != manifest["count"]:
        raise UserError(
            f"data.path={path!r}: the shards hold {len(records):,} crops, {MANIFEST} says "
            f"{manifest['count']:,}; {again}"
        )
    return Latents(path, manifest, records)
