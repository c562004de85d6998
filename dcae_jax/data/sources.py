# SPDX-License-Identifier: Apache-2.0
"""Image sources: random access to photographs, files, data sets, and mixtures of them.

`training_source` and its siblings open what config.data names, each for one purpose.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from dcae_jax.config.schema import Data
from dcae_jax.data import huggingface as huggingface_lib
from dcae_jax.data.folders import NO_LABEL, Folder, folder
from dcae_jax.data.huggingface import HuggingFace, huggingface
from dcae_jax.data.transforms import decode, to_rgb
from dcae_jax.data.webdataset import WebDataset, webdataset
from dcae_jax.errors import UserError
from dcae_jax.files import buckets

# Photographs inside the wheels of scikit-image and scikit-learn.
PHOTOS = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "rocket.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "ihc.png"),
    ("skimage.data", "retina.jpg"),
    ("skimage.data", "camera.png"),
    ("sklearn.datasets.images", "china.jpg"),
)
HELD_OUT_PHOTOS = (
    ("sklearn.datasets.images", "flower.jpg"),
    ("skimage.data", "chelsea.png"),
)


class Source(Protocol):
    """Labelled images by number, which any thread or process may read."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Image.Image, int]:
        """(RGB image, label). Raises whatever a decoder raises for a broken image."""
        ...

    def name(self, i: int) -> str:
        """Name of image i, for messages."""
        ...


class ImageSource(Source, Protocol):
    """A source that config.data can name."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; () if unknown."""
        ...

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        """Like source[i], but may be smaller: short side >= `least` pixels; 0: full size.

        A JPEG decodes much faster at a reduced size.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Photos:
    """The embedded photographs, about a dozen, kept decoded. Each one is its own class."""

    images: tuple[Image.Image, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.images[i], i

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        del least  # decoded already
        return self[i]

    def name(self, i: int) -> str:
        return self.class_names[i]


def photos(files: Sequence[tuple[str, str]] = PHOTOS) -> Photos:
    """The photographs that ship inside scikit-image and scikit-learn."""
    images = []
    for package, name in files:
        # Finds the folder without importing the package, which would take seconds.
        spec = importlib.util.find_spec(package.split(".")[0])
        assert spec is not None and spec.origin is not None
        folder = os.path.join(os.path.dirname(spec.origin), *package.split(".")[1:])
        with Image.open(os.path.join(folder, name)) as image:
            images.append(to_rgb(image))
    return Photos(tuple(images), tuple(name for _, name in files))


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A split of a prepared TFDS data set, read as ArrayRecord without TensorFlow."""

    records: Sequence[Mapping[str, Any]]  # encoded images, labels
    title: str
    fingerprint: str  # version and splits of the data set
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        record = self.records[i]
        return decode(io.BytesIO(record["image"]), least), int(record.get("label", 0))

    def name(self, i: int) -> str:
        return f"{self.title}, record {i}"


def tfds(name: str, split: str, data_dir: str = "") -> Tfds:
    """Split `split` of the data set `name`, prepared with file_format='array_record'."""
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir or None)
        raw = {"image": tensorflow_datasets.decode.SkipDecoding()}
        # A decorator hides the method's parameters.
        records = builder.as_data_source(split, decoders=raw)  # pyright: ignore[reportCallIssue]
    except Exception as error:  # tfds raises many types for a missing data set
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.name={name!r}, split {split!r} cannot be read ({reason}); prepare it first "
            "with file_format='array_record' (docs/data.md)"
        ) from error
    features = records.dataset_info.features
    names = getattr(features["label"], "names", ()) if "label" in features else ()
    info = records.dataset_info
    splits = {name: (part.num_examples, part.num_bytes) for name, part in info.splits.items()}
    fingerprint = f"{info.full_name} {split} {sorted(splits.items())}"
    return Tfds(records, f"{name}/{split}", fingerprint, tuple(names))


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some records of another source."""

    source: ImageSource
    records: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.source[int(self.records[i])]

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        return self.source.read(int(self.records[i]), least)

    def name(self, i: int) -> str:
        return self.source.name(int(self.records[i]))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Concatenated sources; training draws from each by its weight.

    A part's labels are offset by the number of classes in the parts before it.
    """

    parts: tuple[ImageSource, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _locate(self, i: int) -> tuple[int, int]:
        """(part number, record number within the part)."""
        for number, part in enumerate(self.parts):
            if i < len(part):
                return number, i
            i -= len(part)
        raise IndexError(i)

    @functools.cached_property
    def _classes(self) -> tuple[tuple[str, ...], ...]:
        """Class names per part; a part without class names is one class."""
        return tuple(p.class_names or (f"part {n}",) for n, p in enumerate(self.parts))

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(name for names in self._classes for name in names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        number, record = self._locate(i)
        image, label = self.parts[number].read(record, least)
        if label < 0:  # NO_LABEL, which images of a test split have too
            return image, label
        return image, sum(map(len, self._classes[:number])) + label

    def name(self, i: int) -> str:
        number, record = self._locate(i)
        return self.parts[number].name(record)


# --- which of them a job reads --------------------------------------------------------------------

Use = Literal["train", "held out", "evaluate", "encode"]
FILES = ("folder", "huggingface", "webdataset")  # sources that data.path names
PARTS = ("photos", *FILES, "tfds")  # of a mixture


def training_source(data: Data) -> ImageSource:
    """The training images of config.data, without held-out ones. Raises UserError."""
    return _images(data, "train")


def held_out_source(data: Data) -> ImageSource:
    """The images that training does not see, for evaluation during and after it."""
    return _images(data, "held out")


def evaluation_source(data: Data) -> ImageSource:
    """Images for the job `evaluate`: the whole folder or split; else the held-out ones."""
    return _images(data, "evaluate")


def encoding_source(data: Data) -> ImageSource:
    """Images for the job `encode`: all of them; for the photographs, the training ones."""
    return _images(data, "encode")


def _images(data: Data, use: Use) -> ImageSource:
    """Raises UserError."""
    training = use in ("train", "encode")
    if data.source == "mixture":
        return _mixture(data, "held out" if use == "evaluate" else use)
    if data.source == "photos":
        return photos(PHOTOS if training else HELD_OUT_PHOTOS)
    if data.source == "tfds":
        split = data.held_out_split if use == "held out" else data.split
        return tfds(data.name, split, data.data_dir)
    if data.source == "latents":
        raise UserError(
            f"data.source='latents' ({data.path!r}) has no images; set "
            "data.source=folder, huggingface, webdataset, tfds, photos or mixture"
        )
    has_split = False  # a split of its own for evaluation
    if data.source == "huggingface" and data.held_out_split and not data.held_out_path:
        with buckets.named("data.path", data.path):
            has_split = bool(huggingface_lib.splits_of(data.path))
    if use == "held out" and (data.held_out_path or has_split):
        return _files(data, data.held_out_path or data.path, data.held_out_split or data.split)
    source = _files(data, data.path, data.split)
    if use == "encode":
        _check_labels(source, data.path)
    if data.held_out_path or has_split or not data.held_out or use in ("evaluate", "encode"):
        return source
    held_out = _hold_out(source, data.held_out, data.path)
    return Subset(source, held_out[0 if use == "train" else 1])


Files = Folder | HuggingFace | WebDataset


def _files(data: Data, path: str, split: str) -> Files:
    """The images in the files of `path`. split: of a huggingface set. Raises UserError."""
    with buckets.named("data.path" if path == data.path else "data.held_out_path", path):
        if data.source == "huggingface":
            return huggingface(path, split)
        return webdataset(path) if data.source == "webdataset" else folder(path)


def _check_labels(source: Files, path: str) -> None:
    """Raises UserError for images without a label, before hours of encoding."""
    if isinstance(source, Folder):
        beside = [file for file in source.files if os.sep not in file] if source.class_names else []
        if beside:
            raise UserError(
                f"data.path={path!r} has {len(beside)} images beside its class folders, without "
                f"a label ({beside[0]}); move them into a class folder, or elsewhere"
            )
        return
    without = np.flatnonzero(source.labels == NO_LABEL)
    if len(without):
        raise UserError(
            f"data.path={path!r} has {len(without)} images without a label "
            f"({source.name(int(without[0]))}); label or remove them"
        )


def _mixture(data: Data, use: Use) -> Mixture:
    """The parts (weight, source, path) of config.data.parts. Raises UserError.

    path: as data.path, or NAME/SPLIT of a tfds set; '' for photos.
    """
    if not data.parts:
        raise UserError("data.parts is empty; give (weight, source, path) for each part")
    if data.held_out_path:
        raise UserError(
            f"data.held_out_path={data.held_out_path!r} does not apply to a mixture: each part "
            "holds out data.held_out; leave it out"
        )
    parts, weights = [], []
    for entry in data.parts:
        if len(entry) != 3 or entry[1] not in PARTS or not entry[0] > 0:
            kinds = f"{', '.join(map(repr, PARTS[:-1]))} or {PARTS[-1]!r}"
            raise UserError(f"data.parts: {tuple(entry)!r} must be (weight above 0, {kinds}, path)")
        weight, kind, path = entry
        one = dataclasses.replace(data, source=kind, path=path)
        if kind == "tfds":
            name, _, split = path.rpartition("/")
            one = dataclasses.replace(one, name=name, split=split)
        parts.append(_images(one, use))
        weights.append(float(weight))
    return Mixture(tuple(parts), tuple(weights))


def _hold_out(source: Files, fraction: float, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(training records, held-out records). Held out are the files whose names hash lowest, so
    that a file keeps its side when others are added."""
    names = (os.fsencode(name) for name in source.keys)
    ranks = [int.from_bytes(hashlib.sha256(name).digest()[:8], "big") for name in names]
    order = np.argsort(np.array(ranks, np.uint64), kind="stable")
    held = min(max(1, math.ceil(fraction * len(source))), len(source) - 1)
    if held < 1:
        raise UserError(
            f"data.path={path!r} holds one image, too few to hold any out for evaluation; "
            "add images, or set data.held_out=0 to evaluate on the training images"
        )
    return np.sort(order[held:]), np.sort(order[:held])
