# SPDX-License-Identifier: Apache-2.0
"""Where images come from: random access to photographs, folders, TFDS sets and mixtures of them.

A source has len(), source[i] -> (RGB image, label), and name(i) for messages. What
source.read(i, least) gives may be smaller, its short side `least` pixels or more: a JPEG decoder
that halves an image skips most of its work.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from dcae_jax.data.latents import latents
from dcae_jax.errors import UserError

# What is opened, whatever a file is called. Pillow's other readers are not for strangers' files:
# that of EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

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
        """Of image i, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class Photos:
    """The embedded photographs; a dozen, kept decoded. The label is the photograph."""

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.images[i], i

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        del least  # decoded already
        return self[i]

    def name(self, i: int) -> str:
        return self.names[i]


def photos(files: Sequence[tuple[str, str]] = PHOTOS) -> Photos:
    """The photographs that ship inside scikit-image and scikit-learn."""
    images = []
    for package, name in files:
        # The folder is found without importing the package, which takes seconds.
        spec = importlib.util.find_spec(package.split(".")[0])
        folder = os.path.join(os.path.dirname(spec.origin), *package.split(".")[1:])
        with Image.open(os.path.join(folder, name)) as image:
            images.append(to_rgb(image))
    return Photos(tuple(images), tuple(name for _, name in files))


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files; the label is the rank of the first folder below the root."""

    root: str
    files: tuple[str, ...]  # relative to root
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        file = self.files[i]
        top = file.split(os.sep)[0] if os.sep in file else ""
        label = self.classes.index(top) if top else 0
        with Image.open(os.path.join(self.root, file), formats=FORMATS) as image:
            return to_rgb(_draft(image, least)), label

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])


def folder(path: str) -> Folder:
    """All images below `path`, or one image file, in sorted order. Raises UserError.

    Links to folders are followed, each folder once, so that a loop of links ends.
    """
    if os.path.isfile(path):
        return Folder(os.path.dirname(path) or ".", (os.path.basename(path),), ())
    if not os.path.isdir(path):
        raise UserError(f"data.path={path!r} does not exist; name a folder of images")
    files = []
    seen = {os.path.realpath(path)}
    for parent, folders, names in os.walk(path, followlinks=True):
        inside = os.path.relpath(parent, path)
        folders.sort()
        new = {}
        for name in folders:
            new.setdefault(os.path.realpath(os.path.join(parent, name)), name)
        # In place: os.walk goes on with what is left.
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
        for name in names:
            if name.lower().endswith(EXTENSIONS):
                files.append(os.path.normpath(os.path.join(inside, name)))
    if not files:
        raise UserError(f"data.path={path!r} holds no image ({' '.join(EXTENSIONS)})")
    files.sort()
    classes = sorted({file.split(os.sep)[0] for file in files if os.sep in file})
    return Folder(path, tuple(files), tuple(classes))


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A split of a prepared TensorFlow data set, read as ArrayRecord without TensorFlow."""

    records: Any
    title: str

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
        records = builder.as_data_source(
            split, decoders={"image": tensorflow_datasets.decode.SkipDecoding()}
        )
    except Exception as error:  # tfds raises many kinds for "not there"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.name={name!r}, split {split!r} cannot be read ({reason}); prepare it first "
            "with file_format='array_record' (docs/data.md)"
        ) from error
    return Tfds(records, f"{name}/{split}")


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some records of another source."""

    source: Any
    records: np.ndarray

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
    """Several sources one after the other; training draws from each by its weight.

    The labels of a part are those after the labels of the parts before it.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _locate(self, i: int) -> tuple[int, int]:
        """(number of the part, record there)."""
        for number, part in enumerate(self.parts):
            if i < len(part):
                return number, i
            i -= len(part)
        raise IndexError(i)

    @functools.cached_property
    def classes(self) -> tuple[tuple[str, ...], ...]:
        """The classes of each part; of one that knows none, the part itself."""
        return tuple(class_names(p) or (f"part {n}",) for n, p in enumerate(self.parts))

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i, 0)

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        number, record = self._locate(i)
        image, label = self.parts[number].read(record, least)
        return image, sum(map(len, self.classes[:number])) + label

    def name(self, i: int) -> str:
        number, record = self._locate(i)
        return self.parts[number].name(record)


def _mixture(data: Any, open_source: Any) -> Mixture:
    """The parts (weight, source, path) of config.data.parts, opened by `open_source`.

    path: a folder, or NAME/SPLIT of a tfds set; '' for photos. Raises UserError.
    """
    if not data.parts:
        raise UserError("data.parts is empty; give (weight, source, path) for each part")
    if data.held_out_path:
        raise UserError(
            f"data.held_out_path={data.held_out_path!r} is not for a mixture, whose parts hold out "
            "data.held_out each; leave it out"
        )
    parts, weights = [], []
    for entry in data.parts:
        if len(entry) != 3 or entry[1] not in ("photos", "folder", "tfds") or not entry[0] > 0:
            raise UserError(
                f"data.parts: {tuple(entry)!r} must be (weight above 0, 'photos', 'folder' or "
                "'tfds', path)"
            )
        weight, kind, path = entry
        one = dataclasses.replace(data, source=kind, path=path, held_out_path="")
        if kind == "tfds":
            name, _, split = path.rpartition("/")
            one = dataclasses.replace(one, name=name, split=split)
        parts.append(open_source(one))
        weights.append(float(weight))
    return Mixture(tuple(parts), tuple(weights))


def training_source(data: Any) -> Any:
    """The source that config.data names, without what is held out. Raises UserError."""
    if data.source == "mixture":
        return _mixture(data, training_source)
    if data.source == "photos":
        return photos(PHOTOS)
    if data.source == "tfds":
        return tfds(data.name, data.split, data.data_dir)
    if data.source == "latents":
        return latents(data.path)
    source = folder(data.path)
    if data.held_out_path or not data.held_out:
        return source
    return Subset(source, _hold_out(source, data.held_out)[0])


def held_out_source(data: Any) -> Any:
    """The images that training does not see, for evaluation during and after it.

    None for latents: diffusion is judged by its samples.
    """
    if data.source == "latents":
        return None
    if data.source == "mixture":
        return _mixture(data, held_out_source)
    if data.source == "photos":
        return photos(HELD_OUT_PHOTOS)
    if data.source == "tfds":
        return tfds(data.name, data.held_out_split, data.data_dir)
    if data.held_out_path:
        return folder(data.held_out_path)
    source = folder(data.path)
    return Subset(source, _hold_out(source, data.held_out)[1]) if data.held_out else source


def evaluation_source(data: Any) -> Any:
    """What the job `evaluate` judges on: the whole folder or split that config.data names."""
    if data.source == "latents":
        raise UserError(
            f"data.source='latents' ({data.path!r}) has no images; name those with "
            "data.source=folder, tfds, photos or mixture"
        )
    if data.source == "folder":
        return folder(data.path)
    if data.source == "tfds":
        return tfds(data.name, data.split, data.data_dir)
    return held_out_source(data)


def encoding_source(data: Any) -> Any:
    """What the job `encode` reads: all that config.data names, of the photographs those to train
    on. Raises UserError."""
    if data.source == "mixture":
        return _mixture(data, encoding_source)
    if data.source == "photos":
        return photos(PHOTOS)
    return evaluation_source(data)


def class_names(source: Any) -> tuple[str, ...]:
    """The names of the labels 0, 1, ...; () where the source does not know them."""
    if isinstance(source, Subset):
        return class_names(source.source)
    if isinstance(source, Mixture):
        return tuple(name for names in source.classes for name in names)
    if isinstance(source, Photos):
        return source.names
    if isinstance(source, Folder):
        return source.classes
    if isinstance(source, Tfds):
        features = source.records.dataset_info.features
        return tuple(getattr(features["label"], "names", ())) if "label" in features else ()
    return ()


def _hold_out(source: Folder, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Records (to train on, held out): those whose names hash lowest, so that a file keeps its
    side when others are added."""
    ranks = [int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big") for f in source.files]
    order = np.argsort(np.array(ranks, np.uint64), kind="stable")
    held = min(max(1, math.ceil(share * len(source))), len(source) - 1)
    if held < 1:
        raise UserError(
            f"data.path={source.root!r} holds one image: too few to hold any out for evaluation; "
            "add images, or set data.held_out=0 to evaluate on what is trained on"
        )
    return np.sort(order[held:]), np.sort(order[:held])


def _draft(image: Image.Image, least: int) -> Image.Image:
    """An opened JPEG set to be decoded at 1/2, 1/4 or 1/8, its short side `least` or more; others
    as they are, and with least=0."""
    if least:
        image.draft(None, (least, least))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB: turned as its EXIF says, alpha over white, 16 bits scaled to 8."""
    try:
        ImageOps.exif_transpose(image, in_place=True)  # the other form copies every image
    except OSError:  # of the pixels, which are read here
        raise
    except Exception:  # of broken EXIF, which Pillow reports in many ways: the pixels are good
        image.load()
    if image.mode.startswith("I"):  # convert() would clip at 255 instead of scaling
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point images have no known range")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()  # raises for a truncated file
    return image if image.mode == "RGB" else image.convert("RGB")
