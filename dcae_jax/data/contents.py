# SPDX-License-Identifier: Apache-2.0
"""Identity of a source's contents, computed without reading an image."""

import hashlib
from collections.abc import Iterator
from typing import Any

from dcae_jax import files as files_lib
from dcae_jax.config.schema import Data
from dcae_jax.data.folders import Folder
from dcae_jax.data.huggingface import HuggingFace
from dcae_jax.data.sources import ImageSource, Mixture, Subset, Tfds
from dcae_jax.data.webdataset import WebDataset

# Keys of config.data that determine the images of a source.
IDENTITY = {
    "photos": (),
    "folder": ("path",),
    "huggingface": ("path", "split"),
    "webdataset": ("path",),
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
    elif isinstance(source, Folder | WebDataset):
        yield from source.index()
    elif isinstance(source, Tfds | HuggingFace):
        yield source.fingerprint
    else:
        yield from map(source.name, range(len(source)))
