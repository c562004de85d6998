# SPDX-License-Identifier: Apache-2.0
"""Storage: atomic writes, JSON, metrics.jsonl, PNG files, text tables; on disks and in buckets.

A file is written whole or not at all. Paths are strings, never `pathlib`: a path may be a URL of an
object store (buckets.py). What a library can only read or write on a disk goes through `local` and
`spool`.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dcae_jax.errors import UserError
from dcae_jax.files import buckets, copies
from dcae_jax.files.buckets import is_url
from dcae_jax.files.copies import cache_folder, local, local_files, spool
from dcae_jax.files.grids import difference, image_grid
from dcae_jax.files.parts import opened, read_part

# From other files of this room, and all that is below.
__all__ = ["cache_folder", "difference", "image_grid", "is_url", "local", "local_files"]
__all__ += ["opened", "read_part", "spool"]

METRICS = "metrics.jsonl"
MAX_JSON = 10_000_000  # bytes
INCOMPLETE = ".incomplete"  # in a bucket, an object of a folder that is being written


@contextlib.contextmanager
def atomic(path: str, flush: bool = True) -> Iterator[str]:
    """The name of a file to write beside `path`, which becomes `path` at the end of the block.

    A reader sees the old file or the new one, whole and flushed to disk (without `flush`, a crash
    of the machine may lose both). If the block raises, nothing is left. The folder of `path` is
    created. An object is put from a file in the cache.
    """
    if is_url(path):
        with copies.scratch() as folder:
            beside = os.path.join(folder, os.path.basename(path))
            yield beside
            buckets.put_file(path, beside)
        return
    with _temporary(path) as beside:
        yield beside
        if flush:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """A new folder beside `path`, which becomes `path` at the end of the block.

    `path` must not exist, or be an empty folder. If the block raises, nothing is left. In a bucket,
    INCOMPLETE is there while objects are put, those of JSON last: readers look for these first.
    """
    if is_url(path):
        with copies.scratch() as folder:
            yield folder
            names = sorted(walk(folder), key=lambda name: (name.endswith(".json"), name))
            if INCOMPLETE in listdir(path):
                buckets.remove_folder(path)
            buckets.put(f"{path}/{INCOMPLETE}", b"")
            buckets.put_folder(path, folder, names[:-1], last=names[-1])
            buckets.remove(f"{path}/{INCOMPLETE}")
        return
    with _temporary(path) as beside:
        os.mkdir(beside)
        yield beside
        os.replace(beside, path)


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[str]:
    """PATH.PID.tmp: the convention by which the next job on a workdir finds what a kill left."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = f"{path}.{os.getpid()}.tmp"
    _remove(beside)  # of a killed process of this number, or a link that would be written through
    try:
        yield beside
    finally:
        _remove(beside)


def _remove(path: str) -> None:
    """Removes a file, a folder or a link, which is not followed; nothing if there is none."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def check(path: str, key: str) -> None:
    """Raises UserError for a URL that cannot be read."""
    if is_url(path):
        buckets.check(path, key)


def check_local(path: str, key: str) -> None:
    """Raises UserError for a URL, where only files are read and written."""
    if is_url(path):
        raise UserError(
            f"{key}={path!r} is a URL, but this reads and writes folders only; copy it to a folder,"
            " or mount the bucket and name the mounted folder"
        )


def check_folder(path: str) -> None:
    """Raises unless files can be written in the folder `path`, which need not exist yet.

    UserError where a file is in the way; OSError, with the folder's name, where the system refuses.
    Nothing is left behind. For a URL, raises unless objects can be put and removed there.
    """
    if is_url(path):
        return buckets.probe(path)
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there) or os.curdir
    if not os.path.isdir(there):
        raise UserError(f"{path!r}: {there!r} is not a folder; remove it, or name another folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, there) from error


def absolute(path: str) -> str:
    """The absolute path, ~ replaced; a URL as it is, without a slash at its end."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(os.path.expanduser(path))


def real(path: str) -> str:
    """The absolute path without links, to compare it with another; a URL as it is."""
    return path if is_url(path) else os.path.realpath(path)


def whole_path(path: str) -> str:
    """A path that exists, absolute, for readers in other folders; a hub name as it is."""
    if is_url(path):
        return absolute(path)
    there = os.path.exists(os.path.expanduser(path))
    return os.path.abspath(os.path.expanduser(path)) if there else path


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return buckets.info(path) is not None if is_url(path) else os.path.exists(path)


def isdir(path: str) -> bool:
    """Whether there is such a folder."""
    return bool(buckets.names(path)) if is_url(path) else os.path.isdir(path)


def isfile(path: str) -> bool:
    """Whether there is such a file."""
    return size(path) is not None if is_url(path) else os.path.isfile(path)


def listdir(folder: str) -> list[str]:
    """What is in `folder`, sorted; [] if there is no such folder."""
    if is_url(folder):
        return buckets.names(folder)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def size(path: str) -> int | None:
    """Bytes of the file `path`, None if there is no such file."""
    if is_url(path):
        found = buckets.info(path)
        return None if found is None or found["type"] == "directory" else int(found["size"])
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        return None


def sizes(folder: str) -> dict[str, int]:
    """{path relative to `folder`: bytes} of all files below it."""
    if is_url(folder):
        return {path: int(found["size"]) for path, found in buckets.tree(folder).items()}
    return {path: size(os.path.join(folder, path)) or 0 for path in walk(folder)}


def is_free(folder: str) -> bool:
    """Whether `atomic_folder` can write `folder`: there is none, or it is empty or incomplete."""
    names = listdir(folder)
    if is_url(folder):
        return not names or INCOMPLETE in names
    return not names and (os.path.isdir(folder) or not os.path.exists(folder))


def publish(path: str) -> int:
    """Puts the files of `spool(path)` to the bucket -> their bytes. Of a folder: nothing, 0."""
    if not is_url(path):
        return 0
    found = sizes(spool(path))
    buckets.put_folder(path, spool(path), list(found))
    return sum(found.values())


def remove(path: str) -> None:
    """Removes a file, if there is one."""
    if is_url(path):
        return buckets.remove(path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def modified(path: str) -> int | None:
    """When `path` was last modified, in ns since 1970; None if there is no such file or folder."""
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return None


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk(root: str) -> Iterator[str]:
    """The paths, relative to the folder `root`, of all files below it."""
    for folder, _, names in walk_folders(root):
        yield from (os.path.normpath(os.path.join(folder, name)) for name in names)


def walk_folders(root: str) -> Iterator[tuple[str, int | None, list[str]]]:
    """(path relative to `root`, `modified` before it was read, its files) of each folder below it.

    The folder `root` itself comes first. Links to folders are followed, each folder once, so that
    a loop of links ends.
    """
    seen = {os.path.realpath(root)}
    times = {root: modified(root)}
    for parent, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        new = {}
        for name in folders:
            new.setdefault(os.path.realpath(os.path.join(parent, name)), name)
        # In place: os.walk continues with what is left.
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
        times |= {path: modified(path) for path in (os.path.join(parent, name) for name in folders)}
        yield os.path.relpath(parent, root), times.pop(parent), files


def write_file(path: str, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all."""
    if is_url(path):
        return buckets.put(path, data)
    with atomic(path) as beside, open(beside, "wb") as file:
        file.write(data)


def read_file(path: str) -> bytes | None:
    """The content of the file `path`, None if there is no such file."""
    if is_url(path):
        return buckets.read(path)
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def write_json(path: str, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: str) -> Any:
    """The value in the JSON file `path`, None if there is no such file."""
    data = read_file(path)
    return None if data is None else json.loads(data.decode())  # bytes may be taken for UTF-16


def inside(folder: str, name: str) -> str:
    """The path of `name` in `folder`. Raises UserError if it is a link out of it.

    The hub's cache keeps files once, with links from each revision to MODEL/blobs.
    """
    if is_url(folder):
        return f"{folder}/{name}"
    path, root = os.path.join(folder, name), os.path.realpath(folder)
    for parent in (root, os.path.dirname(root)):
        if os.path.basename(os.path.dirname(parent)) == "snapshots":
            root = os.path.dirname(os.path.dirname(parent))
            break
    real = os.path.realpath(path)
    if os.path.commonpath((root, real)) != root:
        raise UserError(
            f"{path} is a link out of its folder, to {real}; if you mean that, copy the file there"
        )
    return path


def read_object(path: str) -> dict[str, Any] | None:
    """The JSON object in the file `path`, None if there is no such file. Raises UserError."""
    if not exists(path):
        return None
    found = size(path)
    regular = is_url(path) or os.path.isfile(path)  # to read a pipe would be to wait for it
    if not regular or found is None or found > MAX_JSON:
        raise UserError(f"{path} is not a JSON file of at most {MAX_JSON} bytes; fetch it again")
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def append_row(workdir: str, step: int, values: dict[str, float]) -> None:
    """Adds the row of `step` to metrics.jsonl. A value that is not finite becomes null."""
    row = {"step": step}
    row |= {k: v if math.isfinite(v) else None for k, v in sorted(values.items())}
    if is_url(workdir):
        path, line = f"{workdir}/{METRICS}", json.dumps(row) + "\n"
        return buckets.put(path, (buckets.read(path) or b"") + line.encode())
    os.makedirs(workdir, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(os.path.join(workdir, METRICS), flags, 0o666)
    with open(descriptor, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def merge_row(workdir: str, step: int, values: dict[str, float]) -> None:
    """Adds `values` to the row of `step` in metrics.jsonl: steps stay unique and rising."""
    rows = {row["step"]: row for row in read_rows(workdir)}
    finite = {k: v if math.isfinite(v) else None for k, v in sorted(values.items())}
    rows[step] = rows.get(step, {"step": step}) | finite
    text = "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows))
    write_file(os.path.join(workdir, METRICS), text.encode())


def read_rows(workdir: str) -> list[dict[str, Any]]:
    """All whole rows of metrics.jsonl; a last line cut by a crash is left out."""
    lines = (read_file(os.path.join(workdir, METRICS)) or b"").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def drop_rows_after(workdir: str, step: int) -> None:
    """Removes the rows later than `step`, which a resumed run is going to write again."""
    rows = [row for row in read_rows(workdir) if row["step"] <= step]
    path = os.path.join(workdir, METRICS)
    if exists(path):
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_png(path: str, pixels: np.ndarray) -> None:
    """Writes an image [H, W, 3] uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_file(path, buffer.getvalue())


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned text, the header first; numbers are right-aligned."""
    text = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    lines = []
    for number, row in enumerate(text):
        cells = [
            cell.rjust(width) if isinstance(rows[-1][i], int | float) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
