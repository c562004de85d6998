# SPDX-License-Identifier: Apache-2.0
"""`data.source='huggingface'`: Arrow files of datasets.save_to_disk, or parquet files.

Both are read with pyarrow, by row; nothing is loaded into memory or fetched. Arrow files are
memory-mapped; those in a bucket are copied to the user's cache first. In parquet files a row's
whole row group is read.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dcae_jax import errors
from dcae_jax import files as files_lib
from dcae_jax.data.transforms import decode
from dcae_jax.errors import UserError
from dcae_jax.files import buckets, parts

SPLITS = ("train", "validation", "test")  # in names of parquet files, besides those asked for
LARGE = 2**28  # bytes of a parquet row group, all of which is read for one image
TAIL = 2**16  # bytes at the end of a file that identify its content, with its size


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """Rows with an encoded image and an integer label (0 without such a column)."""

    blocks: tuple[tuple[str, int], ...]  # (file, number of the row group; -1 in an Arrow file)
    ends: np.ndarray  # [blocks] int64: number of rows up to the end of each block
    column: str  # of the images
    labels: np.ndarray  # [rows] int64
    class_names: tuple[str, ...]
    fingerprint: str  # of the files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def _locate(self, i: int) -> tuple[int, int]:
        """(number of the block, row in it)."""
        block = int(np.searchsorted(self.ends, i, "right"))
        return block, i - (int(self.ends[block - 1]) if block else 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        block, row = self._locate(i)
        value = _table(*self.blocks[block], self.column)[row].as_py()
        encoded = value["bytes"] if isinstance(value, dict) else value
        return decode(io.BytesIO(encoded), least), int(self.labels[i])

    def name(self, i: int) -> str:
        block, row = self._locate(i)
        file, group = self.blocks[block]
        return f"{file}, row {row}" if group < 0 else f"{file}, row group {group}, row {row}"

    @functools.cached_property
    def keys(self) -> Sequence[str]:
        """The images' file names, for rows that have one; else the number of the row."""
        with concurrent.futures.ThreadPoolExecutor(buckets.AT_ONCE) as pool:
            found = list(pool.map(lambda b: _paths(b[0], b[1], self.column), self.blocks))
        names = [name for block in found for name in block]
        return [name or str(i) for i, name in enumerate(names)]


def huggingface(path: str, split: str) -> HuggingFace:
    """The split `split` of the data set `path`; see `files_of`. Raises UserError."""
    files = files_of(path, split)
    with concurrent.futures.ThreadPoolExecutor(buckets.AT_ONCE) as pool:
        opened = list(pool.map(_contents, files))
        fingerprint = _fingerprint(files, list(pool.map(_end, files)))
    columns = opened[0][0]
    for file, (found, _, _) in zip(files, opened, strict=True):
        if found != columns:
            raise UserError(f"{file} has other columns or classes than {files[0]}; move one away")
    image, _, names = columns
    blocks = [block for _, found, _ in opened for block in found]
    numbers = np.concatenate([labels for _, _, found in opened for labels in found])
    if not len(numbers):
        raise UserError(f"data.path={path!r}, split {split!r}, has no rows")
    names = names or (tuple(map(str, range(numbers.max() + 1))) if columns[1] else ())
    return HuggingFace(
        tuple((file, group) for file, group, _ in blocks),
        np.cumsum([rows for _, _, rows in blocks]),
        image,
        numbers,
        names,
        fingerprint,
    )


def splits_of(path: str) -> tuple[str, ...]:
    """The splits of a data set; () if it has no such division. Raises UserError."""
    saved = files_lib.read_object(os.path.join(path, "dataset_dict.json"))
    if saved is not None:
        return tuple(saved["splits"])
    if files_lib.exists(os.path.join(path, "state.json")):
        return ()
    names = [os.path.relpath(file, path) for file in _parquet(path)]
    return tuple(split for split in SPLITS if any(_is_of(name, split) for name in names))


def files_of(path: str, split: str) -> list[str]:
    """The files of a split, in order. Raises UserError.

    path: a folder of datasets.save_to_disk, of one data set or of a dict of splits; or parquet
    files: one, a folder of them, or a pattern. Parquet files belong to a split by their names, as
    in train-00000-of-00008.parquet or train/0.parquet, if any has a split in its name.
    """
    splits = splits_of(path)
    if splits and split not in splits:
        raise UserError(
            f"data.path={path!r} has no split {split!r}; set data.split and data.held_out_split "
            f"to {' or '.join(splits)}"
        )
    if files_lib.exists(os.path.join(path, "dataset_dict.json")):
        path = os.path.join(path, split)
    state = files_lib.read_object(os.path.join(path, "state.json"))
    if state is not None:
        names = [entry["filename"] for entry in state.get("_data_files") or ()]
        return [files_lib.inside(path, name) for name in names]
    files = _parquet(path)
    if not files:
        raise UserError(
            f"data.path={path!r} is not a folder of datasets.save_to_disk and holds no *.parquet"
        )
    return [file for file in files if not splits or _is_of(os.path.relpath(file, path), split)]


def _parquet(path: str) -> list[str]:
    """The parquet files of a path: one file, those below a folder, or those of a pattern."""
    if files_lib.is_url(path):
        return list(buckets.found(path, "data.path", lambda name: name.endswith(".parquet")))
    if os.path.isdir(path):
        found = (os.path.join(path, file) for file in files_lib.walk(path))
        return sorted(file for file in found if file.endswith(".parquet"))
    return [path] if os.path.isfile(path) else sorted(glob.glob(path))


def _is_of(name: str, split: str) -> bool:
    """Whether a file's name contains the split, as a word of its own."""
    return re.search(rf"(^|[-._ /]){re.escape(split)}([-._ /]|$)", name) is not None


def _end(file: str) -> tuple[int, bytes]:
    """(bytes, the last TAIL of them) of a file. Raises FileNotFoundError."""
    size = files_lib.size(file)
    if size is None:
        raise FileNotFoundError(file)
    return size, files_lib.read_part(file, max(0, size - TAIL), min(TAIL, size))


def _fingerprint(files: Sequence[str], ends: Sequence[tuple[int, bytes]]) -> str:
    """A digest of the files' names, sizes and ends, where parquet keeps its statistics."""
    digest = hashlib.sha256()
    for file, (size, end) in zip(files, ends, strict=True):
        digest.update(f"{os.path.basename(file)!r} {size}\n".encode() + end)
    return digest.hexdigest()


# --- with pyarrow; opened once per process --------------------------------------------------------

Columns = tuple[str, str, tuple[str, ...]]  # of the images, of the labels or '', class names or ()


def _contents(file: str) -> tuple[Columns, list[tuple[str, int, int]], list[np.ndarray]]:
    """(columns; (file, row group or -1, rows) and the labels [rows] of each block) of a file."""
    schema, counts = _shape(file)
    columns = _columns(schema, file)
    groups = [-1] if file.endswith(".arrow") else range(len(counts))
    blocks = [(file, group, rows) for group, rows in zip(groups, counts, strict=True)]
    return columns, blocks, [_labels(*block[:2], columns[1], block[2]) for block in blocks]


def _shape(file: str) -> tuple[Any, list[int]]:
    """(schema, rows of each block) of a file. Raises UserError."""
    errors.require("data.source='huggingface' needs pyarrow", "pyarrow")
    import pyarrow as pa

    arrow = file.endswith(".arrow")
    if arrow:
        files_lib.local(file)
    try:
        if arrow:
            table = _arrow(file)
            return table.schema, [table.num_rows]
        opened = _parquet_file(file)
        meta = opened.metadata
        groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
    except buckets.StoreError:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read ({reason}); fetch it again") from error
    if any(group.total_byte_size > LARGE for group in groups):
        logging.warning(
            "%s has row groups of up to %.1f GB, each read for one image; save it once as Arrow "
            "(docs/data.md)",
            file,
            max(group.total_byte_size for group in groups) / 1e9,
        )
    return opened.schema_arrow, [group.num_rows for group in groups]


@functools.cache
def _arrow(file: str) -> Any:
    """The table of an Arrow file, memory-mapped."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.memory_map(files_lib.local(file))) as reader:
        return reader.read_all()


@functools.cache
def _metadata(file: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(_readable(file))


def _readable(file: str) -> Any:
    """What pyarrow opens: the path, or a reader of the object's parts."""
    return parts.Reader(file, _size(file)) if files_lib.is_url(file) else file


@functools.cache
def _size(url: str) -> int:
    size = files_lib.size(url)
    if size is None:
        raise FileNotFoundError(url)
    return size


def _parquet_file(file: str) -> Any:
    """A new reader, since one serves one thread; the metadata is kept."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(_readable(file), metadata=_metadata(file))


@functools.lru_cache(maxsize=4)  # `encode` and evaluations read rows in order
def _row_group(file: str, group: int, column: str) -> Any:
    import pyarrow as pa

    opened = _parquet_file(file)
    if pa.types.is_struct(opened.schema_arrow.field(column).type):
        column = f"{column}.bytes"
    return opened.read_row_group(group, [column], use_threads=False)


def _table(file: str, group: int, column: str) -> Any:
    """A column of a block; of images in a row group, their bytes alone."""
    return (_arrow(file) if group < 0 else _row_group(file, group, column))[column]


def _columns(schema: Any, file: str) -> Columns:
    """(image column, label column or '', class names or ()) of a file. Raises UserError."""
    import pyarrow as pa

    def encoded(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if encoded(field.type)]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        raise UserError(
            f"{file} has the columns {', '.join(schema.names)}; rename the one of encoded images "
            "{bytes, path} to image"
        )
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
    features = {
        name: feature["names"]
        for name, feature in (info.get("features") or {}).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    label = "label" if "label" in schema.names else next(iter(features), "")
    if label and not pa.types.is_integer(schema.field(label).type):
        raise UserError(
            f"{file}: the column {label} has the type {schema.field(label).type}, not an integer; "
            "convert it with dataset.class_encode_column"
        )
    return images[0], label, tuple(features.get(label) or ())


def _labels(file: str, group: int, column: str, rows: int) -> np.ndarray:
    """The labels of a block; a missing one is -1, no column gives 0."""
    if not column:
        return np.zeros(rows, np.int64)
    if group >= 0:
        table = _parquet_file(file).read_row_group(group, [column], use_threads=False)[column]
    else:
        table = _table(file, group, column)
    return table.fill_null(-1).to_numpy().astype(np.int64)


def _paths(file: str, group: int, column: str) -> list[str | None]:
    """The images' file names in a block, None for those without."""
    import pyarrow as pa

    opened = _parquet_file(file) if group >= 0 else None
    kind = (opened.schema_arrow if opened else _arrow(file).schema).field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        rows = opened.metadata.row_group(group).num_rows if opened else _arrow(file).num_rows
        return [None] * rows
    if opened:
        found = opened.read_row_group(group, [f"{column}.path"], use_threads=False)[column]
    else:
        found = _arrow(file)[column]
    return [name for chunk in found.chunks for name in chunk.field("path").to_pylist()]
