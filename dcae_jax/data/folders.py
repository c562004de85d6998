# SPDX-License-Identifier: Apache-2.0
"""`data.source='folder'`: image files below a folder."""

import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from PIL import Image

from dcae_jax import files as files_lib
from dcae_jax.data import indexes
from dcae_jax.data.transforms import EXTENSIONS, decode
from dcae_jax.errors import UserError
from dcae_jax.files import buckets

NO_LABEL = -1  # an error in the job `encode`; autoencoders need no labels
INDEXED = 20_000  # files from which on a folder's list is cached; fewer are listed in a second


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files; a file's label is the rank of its top-level folder below the root.

    Without such folders, every label is 0; a file beside them has NO_LABEL.
    """

    root: str
    files: tuple[str, ...]  # relative to root
    class_names: tuple[str, ...]
    # [N] bytes, -1 for a dangling link, as a cached index or a bucket has them; None: read them.
    sizes: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        path = self.name(i)
        if self.sizes is None or not files_lib.is_url(path):
            return decode(path, least), self._label(self.files[i])
        encoded = files_lib.read_part(path, 0, int(self.sizes[i]))
        return decode(io.BytesIO(encoded), least), self._label(self.files[i])

    @functools.cached_property
    def _label(self) -> "Label":
        return Label(self.class_names)

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])

    @property
    def keys(self) -> Sequence[str]:
        """Names of the records that do not change when others are added."""
        return self.files

    def index(self) -> list[str]:
        """Names and sizes of the files."""
        sizes = self.sizes if self.sizes is not None else _sizes(self.root, self.files)
        return [
            f"{file!r} {size if size >= 0 else None}"
            for file, size in zip(self.files, sizes.tolist(), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Label:
    """File -> the rank of its top-level folder among `class_names`."""

    class_names: tuple[str, ...]

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        return {name: rank for rank, name in enumerate(self.class_names)}

    def __call__(self, file: str) -> int:
        if os.sep in file:
            return self._ranks[file.split(os.sep)[0]]
        return NO_LABEL if self.class_names else 0


def classes(files: Sequence[str]) -> tuple[str, ...]:
    """The top-level folders of `files`, sorted."""
    return tuple(sorted({file.split(os.sep)[0] for file in files if os.sep in file}))


def folder(path: str) -> Folder:
    """All images below `path`, or one image file, in sorted order. Raises UserError."""
    if files_lib.is_url(path):
        return _in_bucket(path.rstrip("/"))
    if os.path.isfile(path):
        return Folder(os.path.dirname(path) or ".", (os.path.basename(path),), ())
    if not os.path.isdir(path):
        raise UserError(f"data.path={path!r} does not exist; name a folder of images")
    files, sizes = _listed(path)
    if not files:
        raise UserError(f"data.path={path!r} holds no images ({' '.join(EXTENSIONS)})")
    return Folder(path, files, classes(files), sizes)


def _in_bucket(url: str) -> Folder:
    """`folder` of a URL: what a bucket lists, 1000 objects or more per request."""
    found = buckets.found(url, "data.path", lambda name: name.lower().endswith(EXTENSIONS))
    root = url.rpartition("/")[0] if url in found else url
    files = tuple(name[len(root) + 1 :] for name in found if name.startswith(f"{root}/"))
    if not files:
        raise UserError(f"data.path={url!r} holds no images ({' '.join(EXTENSIONS)})")
    sizes = np.array([int(value["size"]) for value in found.values()], np.int64)
    return Folder(root, files, classes(files), sizes)


def _listed(root: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """(image files below `root`, sorted; their sizes if there are many): from the index if no
    folder below `root` has been modified since, that is, nothing was added, removed or renamed.
    """
    place = indexes.cached(root)
    stored = indexes.read(place, "files", "sizes", "folders", "times")
    if stored is not None:
        folders = indexes.unpack(stored["folders"])
        times = [files_lib.modified(os.path.join(root, name)) for name in folders]
        if times == stored["times"].tolist():
            return indexes.unpack(stored["files"]), stored["sizes"]
    times, files = {}, []
    for name, modified, inside in files_lib.walk_folders(root):
        times[name] = modified
        images = (file for file in inside if file.lower().endswith(EXTENSIONS))
        files += [os.path.normpath(os.path.join(name, file)) for file in images]
    files = tuple(sorted(files))
    if len(files) < INDEXED:
        return files, None
    sizes = _sizes(root, files)
    if indexes.settled(list(times.values())):
        arrays = {"files": indexes.pack(files), "folders": indexes.pack(list(times))}
        arrays |= {"sizes": sizes, "times": np.array(list(times.values()), np.int64)}
        indexes.write(place, arrays)
    return files, sizes


def _sizes(root: str, files: Sequence[str]) -> np.ndarray:
    """Bytes of each file [N], read in threads: a million files on a network disk are slow.

    -1 for a dangling link, which counts as an unreadable record.
    """

    def some(first: int) -> list[int]:
        found = (files_lib.size(os.path.join(root, f)) for f in files[first : first + 1000])
        return [-1 if size is None else size for size in found]

    with futures.ThreadPoolExecutor(16) as pool:
        parts = pool.map(some, range(0, len(files), 1000))
        return np.fromiter(itertools.chain.from_iterable(parts), np.int64, len(files))
