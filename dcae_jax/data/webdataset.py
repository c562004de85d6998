# SPDX-License-Identifier: Apache-2.0
"""`data.source='webdataset'`: images in tar files, read by their offset.

The first start reads the headers of each tar and writes TAR.index.npz beside it (or, where that
folder is read-only, to this user's cache). The index counts while the tar has the same size and
time of modification; in a bucket, the same size and generation or ETag.
"""

import concurrent.futures
import dataclasses
import glob
import io
import logging
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dcae_jax import files as files_lib
from dcae_jax.data import folders, indexes
from dcae_jax.data.transforms import EXTENSIONS, decode
from dcae_jax.errors import UserError
from dcae_jax.files import buckets

LABEL = ".cls"  # extension of a sample's class, an integer as text
INDEX = ".index.npz"
UNLABELLED = -2  # an image without a .cls beside it, in an index


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Images in tars, in their order there; the tars are sorted by name.

    The label of KEY.jpg is the number in KEY.cls. If there is no .cls at all, it is the rank of
    the top-level folder, as in `Folder`.
    """

    tars: tuple[str, ...]
    files: tuple[str, ...]  # names within their tar
    places: np.ndarray  # [N, 3] int64: number of the tar, first byte, bytes
    labels: np.ndarray  # [N] int64
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        tar, first, size = self.places[i].tolist()
        encoded = files_lib.read_part(self.tars[tar], first, size)
        return decode(io.BytesIO(encoded), least), int(self.labels[i])

    def name(self, i: int) -> str:
        return f"{self.tars[self.places[i, 0]]}, {self.files[i]}"

    @property
    def keys(self) -> Sequence[str]:
        """Names of the records that do not change when others are added."""
        return self.files

    def index(self) -> list[str]:
        """Names, sizes and labels of the images, by tar."""
        rows = zip(self.files, self.places.tolist(), self.labels.tolist(), strict=True)
        return [f"{tar} {file!r} {size} {label}" for file, (tar, _, size), label in rows]


def webdataset(path: str) -> WebDataset:
    """The images in the tars of a folder, in one tar, or in those of a pattern such as
    '/data/train-*.tar'. Raises UserError."""
    found = _tars(path)
    if not found:
        raise UserError(f"data.path={path!r} holds no *.tar; name a folder, a tar or a pattern")
    tars, parts = tuple(found), _indexes(found)
    files = tuple(name for part in parts for name in indexes.unpack(part["files"]))
    if not files:
        raise UserError(f"data.path={path!r} holds no images ({' '.join(EXTENSIONS)}) in its tars")
    numbers = np.repeat(np.arange(len(tars)), [len(part["labels"]) for part in parts])
    places = np.column_stack([numbers, np.concatenate([part["places"] for part in parts])])
    labels = np.concatenate([part["labels"] for part in parts])
    if (labels == UNLABELLED).all():
        names = folders.classes(files)
        label = folders.Label(names)
        labels = np.array([label(file) for file in files])
    else:
        labels = np.where(labels == UNLABELLED, folders.NO_LABEL, labels)
        names = tuple(map(str, range(labels.max() + 1)))
    return WebDataset(tars, files, places, labels, names)


Tars = Mapping[str, dict[str, Any] | None]  # {path: the description of an object in a bucket}


def _tars(path: str) -> Tars:
    """The tars that `path` names, sorted by name. Raises UserError."""
    if files_lib.is_url(path):
        return buckets.found(
            path, "data.path", lambda name: "/" not in name and name.endswith(".tar")
        )
    pattern = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
    return dict.fromkeys(sorted([path] if os.path.isfile(path) else glob.glob(pattern)))


def _indexes(tars: Tars) -> list[indexes.Arrays]:
    """The index of each tar. Hosts and threads that start together begin at different tars, so
    that each finds most of the indexes written."""
    order = random.sample(list(tars), len(tars))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(_index, order, (tars[tar] for tar in order))
        by_tar = dict(zip(order, found, strict=True))
    return [by_tar[tar] for tar in tars]


def _index(tar: str, described: dict[str, Any] | None) -> indexes.Arrays:
    """The index of one tar, written if there is none of its size and time. Raises UserError."""
    if described is None:
        status = os.stat(tar)
        size, changed = status.st_size, status.st_mtime_ns
    else:
        size, changed = int(described["size"]), buckets.stamp(described)
    stamp = np.array([size, changed])
    places = (f"{tar}{INDEX}", indexes.cached(tar))
    for place in places:
        stored = indexes.read(place, "files", "places", "labels", "stamp")
        if stored is not None and np.array_equal(stored["stamp"], stamp):
            return stored
    logging.info("indexing %s", tar)
    arrays = _scan(tar, size)
    if described is not None or indexes.settled([changed]):
        any(indexes.write(place, {**arrays, "stamp": stamp}) for place in places)
    return arrays


def _scan(tar: str, size: int) -> indexes.Arrays:
    """The images of a tar, from its headers: names, places (first byte, bytes) and labels."""
    files, places, keys, labels = [], [], [], {}
    try:
        with files_lib.opened(tar, size) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                parent, base = os.path.split(os.path.normpath(member.name))
                stem, dot, extension = base.partition(".")
                extension = (dot + extension).lower()
                key = os.path.join(parent, stem)
                if extension == LABEL and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    labels[key] = _label(content.read(32), f"{tar}, {member.name}")
                elif extension in EXTENSIONS and member.isfile():
                    files.append(os.path.normpath(member.name))
                    places.append((member.offset_data, member.size))
                    keys.append(key)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(
            f"{tar} is not a whole, uncompressed tar ({error}); unpack it with gunzip, or fetch it "
            "again"
        ) from error
    # tarfile stops at a damaged header as at the end.
    if files_lib.read_part(tar, end, min(tarfile.BLOCKSIZE, size - end)).strip(b"\0"):
        raise UserError(f"{tar} is damaged at byte {end}; fetch it again")
    return {
        "files": indexes.pack(files),
        "places": np.array(places, np.int64).reshape(-1, 2),
        "labels": np.array([labels.get(key, UNLABELLED) for key in keys], np.int64),
    }


def _label(content: bytes, name: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"{name} holds {content!r}, not a class number; repair it") from error
