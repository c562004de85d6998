# SPDX-License-Identifier: Apache-2.0
"""Image sources: random access to photographs, image folders, TFDS sets and mixtures of them.

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

from dcae_jax import files as files_lib
from dcae_jax.config.schema import Data
from dcae_jax.data.transforms import to_rgb
from dcae_jax.errors import UserError

# Formats that are opened, whatever the file extension. Pillow's other readers are unsafe for
# untrusted files: the EPS reader, for example, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

NO_LABEL = -1  # an error in the job `encode`; autoencoders need no labels

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
class Folder:
    """Image files; a file's label is the rank of its top-level folder below the root.

    Without such folders, every label is 0; a file beside them has NO_LABEL.
    """

    root: str
    files: tuple[str, ...]  # relative to root
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        file = self.files[i]
        top = file.split(os.sep)[0] if os.sep in file else ""
        label = self.class_names.index(top) if top else NO_LABEL if self.class_names else 0
        with Image.open(os.path.join(self.root, file), formats=FORMATS) as image:
            return to_rgb(_draft(image, least)), label

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])


def folder(path: str) -> Folder:
    """All images below `path`, or one image file, in sorted order. Raises UserError."""
    if os.path.isfile(path):
        return Folder(os.path.dirname(path) or ".", (os.path.basename(path),), ())
    if not os.path.isdir(path):
        raise UserError(f"data.path={path!r} does not exist; name a folder of images")
    files = sorted(file for file in files_lib.walk(path) if file.lower().endswith(EXTENSIONS))
    if not files:
        raise UserError(f"data.path={path!r} holds no images ({' '.join(EXTENSIONS)})")
    classes = sorted({file.split(os.sep)[0] for file in files if os.sep in file})
    return Folder(path, tuple(files), tuple(classes))


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
        with Image.open(io.BytesIO(record["image"]), formats=FORMATS) as image:
            return to_rgb(_draft(image, least)), int(record.get("label", 0))

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
            "data.source=folder, tfds, photos or mixture"
        )
    if data.held_out_path and use == "held out":
        return folder(data.held_out_path)
    source = folder(data.path)
    if use == "encode":
        _check_labels(source)
    if data.held_out_path or not data.held_out or use in ("evaluate", "encode"):
        return source
    return Subset(source, _hold_out(source, data.held_out)[0 if use == "train" else 1])


def _check_labels(source: Folder) -> None:
    """Raises UserError for images beside class folders, before hours of encoding."""
    beside = [file for file in source.files if os.sep not in file] if source.class_names else []
    if beside:
        raise UserError(
            f"data.path={source.root!r} has {len(beside)} images beside its class folders, without "
            f"a label ({beside[0]}); move them into a class folder, or elsewhere"
        )


def _mixture(data: Data, use: Use) -> Mixture:
    """The parts (weight, source, path) of config.data.parts. Raises UserError.

    path: a folder, or NAME/SPLIT of a tfds set; '' for photos.
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
        if len(entry) != 3 or entry[1] not in ("photos", "folder", "tfds") or not entry[0] > 0:
            raise UserError(
                f"data.parts: {tuple(entry)!r} must be (weight above 0, 'photos', 'folder' or "
                "'tfds', path)"
            )
        weight, kind, path = entry
        one = dataclasses.replace(data, source=kind, path=path)
        if kind == "tfds":
            name, _, split = path.rpartition("/")
            one = dataclasses.replace(one, name=name, split=split)
        parts.append(_images(one, use))
        weights.append(float(weight))
    return Mixture(tuple(parts), tuple(weights))


def _hold_out(source: Folder, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training records, held-out records). Held out are the files whose names hash lowest, so
    that a file keeps its side when others are added."""
    ranks = [int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big") for f in source.files]
    order = np.argsort(np.array(ranks, np.uint64), kind="stable")
    held = min(max(1, math.ceil(fraction * len(source))), len(source) - 1)
    if held < 1:
        raise UserError(
            f"data.path={source.root!r} holds one image, too few to hold any out for evaluation; "
            "add images, or set data.held_out=0 to evaluate on the training images"
        )
    return np.sort(order[held:]), np.sort(order[:held])


def _draft(image: Image.Image, least: int) -> Image.Image:
    """Sets an opened JPEG to decode at 1/2, 1/4 or 1/8 size, with a short side >= `least`.

    Other formats are unchanged, and so is a JPEG if least=0."""
    if least:
        image.draft(None, (least, least))
    return image
