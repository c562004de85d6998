# SPDX-License-Identifier: Apache-2.0
"""Identity of a source's contents, computed without reading an image."""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from dcae_jax import files as files_lib
from dcae_jax.config.schema import Data
from dcae_jax.data.sources import Folder, ImageSource, Mixture, Subset, Tfds

# Keys of config.data that determine the images of a source.
IDENTITY = {
    "photos": (),
    "folder": ("path",),
    "tfds": ("name", "split", "data_dir"),
    "mixture": ("parts", "data_dir"),
}


def identity(data: Data, source: ImageSource) -> dict[str, Any]:
    """Everything that determines the images of `source` (of `encoding_source`), by key."""
    values = {"images": len(source), "names and sizes of the files": index(source)}
    for key in ("source", *IDENTITY[data.source]):
        value = getattr(data, key)
        values[f"data.{key}"] = files_lib.whole_path(value) if key == "path" else value
    return values


def index(source: ImageSource) -> str:
    """sha256 of the names and sizes of all files of `source`, held-out ones included.

    No image is read, so an edit that keeps a file's size goes unnoticed.
    """
    digest = hashlib.sha256()
    for line in _index(source):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _index(source: ImageSource) -> Iterator[str]:
    if isinstance(source, Subset):
        yield from _index(source.source)
    elif isinstance(source, Mixture):
        for number, part in enumerate(source.parts):
            yield f"part {number}"
            yield from _index(part)
    elif isinstance(source, Folder):
        for file, size in zip(source.files, _sizes(source), strict=True):
            yield f"{file!r} {size}"
    elif isinstance(source, Tfds):
        yield source.fingerprint
    else:
        yield from map(source.name, range(len(source)))


def _sizes(source: Folder) -> Iterator[int | None]:
    """Size of each file in bytes, read in threads: a million files on a network disk are slow.

    None for a dangling link, which counts as an unreadable record.
    """

    def some(first: int) -> list[int | None]:
        return [files_lib.size(source.name(i)) for i in range(first, min(first + 1000, count))]

    count = len(source)
    with futures.ThreadPoolExecutor(16) as pool:
        yield from itertools.chain.from_iterable(pool.map(some, range(0, count, 1000)))
