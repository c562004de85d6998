# SPDX-License-Identifier: Apache-2.0
"""Images in, batches out: sources, crops, and Grain pipelines whose state is one number.

Example i of a run is a function of (seed, i) alone: which epoch it falls in, which record it
reads, how it is cropped. The position of the data is the global index i of the next example, so
that a run continues with the same batches on any number of hosts, workers and threads.
"""

import dataclasses
import hashlib
import importlib.util
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image, ImageEnhance, ImageOps

from dcae_jax import host_memory
from dcae_jax.config import UserError, training_resolutions
from dcae_jax.latents import Latents, latents

Batch = dict[str, np.ndarray]

TRIES = 8  # records tried for one example before giving up
BAD_SHARE, BAD_AFTER = 0.01, 200  # above this share of at least so many records: an error

# What is opened, whatever a file is called. Pillow's other readers are not for strangers' files:
# that of EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

MOST_PIXELS = 2**26  # of an image while it is resized: a sliver 1 x 30,000 is no photograph

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


# --- sources: random access to PIL images ---------------------------------------------------------
# A source has len(), source[i] -> (RGB image, label), and name(i) for messages. What
# source.read(i, least) gives may be smaller, its short side `least` pixels or more: a JPEG decoder
# that halves an image skips most of its work.


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
    """Several sources one after the other; training draws from each by its weight."""

    parts: tuple[Any, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _locate(self, i: int) -> tuple[Any, int]:
        for part in self.parts:
            if i < len(part):
                return part, i
            i -= len(part)
        raise IndexError(i)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        part, record = self._locate(i)
        return part[record]

    def read(self, i: int, least: int) -> tuple[Image.Image, int]:
        part, record = self._locate(i)
        return part.read(record, least)

    def name(self, i: int) -> str:
        part, record = self._locate(i)
        return part.name(record)


def _mixture(data: Any, open_source: Any) -> Mixture:
    """The parts (weight, source, path) of config.data.parts, opened by `open_source`.

    path: a folder, or NAME/SPLIT of a tfds set; '' for photos. Raises UserError.
    """
    if not data.parts:
        raise UserError("data.parts is empty; give (weight, source, path) for each part")
    parts, weights = [], []
    for entry in data.parts:
        if len(entry) != 3 or entry[1] not in ("photos", "folder", "tfds") or not entry[0] > 0:
            raise UserError(
                f"data.parts: {tuple(entry)!r} must be (weight above 0, 'photos', 'folder' or "
                "'tfds', path)"
            )
        weight, kind, path = entry
        one = data.copy_and_resolve_references()
        one.source, one.path, one.held_out_path = kind, path, ""
        if kind == "tfds":
            one.name, _, one.split = path.rpartition("/")
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


# --- crops ----------------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with BOX while possible, BICUBIC to `size`, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square of `size` at the image's own scale; smaller images are enlarged first."""
    if min(image.size) < size:
        image = _resize_short_side(image, size)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image, size: int, area: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A square that covers a share of the image's area drawn from `area`, resized to `size`."""
    side = math.sqrt(image.width * image.height * rng.uniform(*area))
    side = int(np.clip(round(side), 1, min(image.size)))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    if shape[0] * shape[1] > MOST_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} is too long to be enlarged")
    return image.resize(shape, Image.Resampling.BICUBIC)


def least_side(data: Any, size: int) -> int:
    """Short side that an image must have for `augment` to lose nothing; 0: its own.

    ADM's crop halves an image down to this anyway. What random_resized shrinks has twice the pixels
    a side that it needs, for the smallest share of the area, before the bicubic filter.
    """
    outer = math.ceil(size * _turned(data.rotation))
    if data.crop == "center":
        return outer
    if data.crop == "random_resized":
        return math.ceil(2 * outer / math.sqrt(data.crop_area[0]))
    return 0


def _turned(degrees: float) -> float:
    """Side of the square from which one of side 1, turned by so much, can be cut."""
    turn = math.radians(abs(degrees))
    return math.cos(turn) + math.sin(turn)


def augment(image: Image.Image, size: int, data: Any, rng: np.random.Generator) -> np.ndarray:
    """A training example [size, size, 3] uint8, cropped and changed as config.data says."""
    # A rotated square needs a larger one to be cut from, or its corners would be empty.
    angle = rng.uniform(-data.rotation, data.rotation) if data.rotation else 0.0
    outer = math.ceil(size * _turned(angle))
    if data.crop == "center":
        image = center_crop(image, outer)
    elif data.crop == "random_resized":
        image = random_resized_crop(image, outer, data.crop_area, rng)
    else:
        image = random_crop(image, outer, rng)
    if outer > size:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
        margin = (outer - size) // 2
        image = image.crop((margin, margin, margin + size, margin + size))
    if data.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if data.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + rng.uniform(-data.color_jitter, data.color_jitter))
    return np.asarray(image)


# --- training: an endless stream of batches -------------------------------------------------------


def resolution_at(seed: int, sizes: tuple[int, ...], step: int) -> int:
    """The resolution of the batch of `step`, drawn from (seed, step)."""
    return int(np.random.default_rng((seed, 1, step)).choice(sizes))


@dataclasses.dataclass(frozen=True)
class _Load(grain.transforms.MapWithIndex):
    """(global index, record) -> example. A record that cannot be read is replaced.

    Failures travel with the example ('unreadable', record numbers, -1 where none), since the
    process that reads is not the one that counts.
    """

    source: Any
    data: Any
    seed: int
    batch_size: int
    sizes: tuple[int, ...]

    def map_with_index(self, index: int, record: int) -> dict[str, np.ndarray]:
        host_memory.keep()  # also where this is a worker: an image's pages are faulted in once
        read = self._latent if isinstance(self.source, Latents) else self._image
        unreadable = np.full(TRIES, -1, np.int64)
        for attempt in range(TRIES):
            try:
                return read(index, record) | {"unreadable": unreadable}
            except Exception:  # whatever a decoder raises, the record is of no use
                unreadable[attempt] = record
                # The index counts through the epochs, so this is hash(seed, epoch, index, try).
                rng = np.random.default_rng((self.seed, 3, index, attempt))
                record = int(rng.integers(len(self.source)))
        # Nothing could be read. This example only carries the news, and is then thrown away.
        return {"label": np.int32(0), "unreadable": unreadable} | (
            {"latent": self.source.blank()}
            if isinstance(self.source, Latents)
            else {"image": np.zeros((self._size(index),) * 2 + (3,), np.uint8)}
        )

    def _size(self, index: int) -> int:
        return resolution_at(self.seed, self.sizes, index // self.batch_size)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 2, index))

    def _image(self, index: int, record: int) -> dict[str, np.ndarray]:
        size = self._size(index)
        image, label = self.source.read(record, least_side(self.data, size))
        pixels = augment(image, size, self.data, self._rng(index))
        return {"image": pixels, "label": np.int32(label)}

    def _latent(self, index: int, record: int) -> dict[str, np.ndarray]:
        """One of the stored variants: the crop, or its mirror image where both are there."""
        values, label = self.source[record]
        variant = self._rng(index).integers(len(values)) if self.data.flip else 0
        return {"latent": values[variant], "label": np.int32(label)}


@dataclasses.dataclass
class Unreadable:
    """Counts records that could not be read, names each once, and stops when there are many."""

    source: Any
    seen: set[int] = dataclasses.field(default_factory=set)
    read: int = 0
    failed: int = 0

    def take(self, batch: Batch) -> Batch:
        """The batch without its report, which is counted. Raises UserError."""
        report = batch.pop("unreadable")
        bad = report[report >= 0].tolist()
        none_left = bool((report >= 0).all(-1).any())
        self.count(len(report) + len(bad), bad, "replaced", none_left)
        return batch

    def count(self, read: int, bad: list[int], fate: str, none_left: bool = False) -> None:
        """Counts so many attempts, and the records that failed, named once. Raises UserError.

        fate: what became of them, for the log. none_left: for an example no record was found.
        """
        self.read += read
        self.failed += len(bad)
        for record in sorted(set(bad) - self.seen):
            self.seen.add(record)
            logging.warning("unreadable, %s: %s", fate, self.source.name(record))
        too_many = self.read >= BAD_AFTER and self.failed > BAD_SHARE * self.read
        if none_left or too_many:
            known = bad or sorted(self.seen)
            example = self.source.name(known[0]) if known else "see the log"
            raise UserError(
                f"{self.failed} of {self.read} records read are unreadable ({example}); "
                "repair or remove them"
            )


def _record_order(source: Any, seed: int) -> grain.MapDataset:
    """Global index -> record: each epoch a new order; a mixture's parts each by their own."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    parts, first = [], 0
    for part in source.parts:
        records = grain.MapDataset.range(first, first + len(part))
        parts.append(records.seed(seed).shuffle().repeat())
        first += len(part)
    return grain.MapDataset.mix(parts, weights=source.weights)


def training_batches(
    config: Any, source: Any, start: int, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """This process's share of the global batches, from the example with global index `start`.

    source: what `training_source` opened.

    A batch: image [B / processes, size, size, 3] uint8, label [B / processes] int32. Of latents,
    instead of image: latent [B / processes, h, w, c] in the stored dtype, unscaled. Process p
    gets rows p * B / processes onwards of each global batch of B = config.batch_size.
    Raises UserError when too many records cannot be read.
    """
    local = config.batch_size // processes
    load = _Load(source, config.data, config.seed, config.batch_size, training_resolutions(config))
    dataset = (
        _record_order(source, config.seed)
        .map_with_index(load)[start:]
        .batch(local)[process::processes]
    )
    settings = config.data
    stream = _read_ahead(dataset, settings.threads, settings.prefetch, settings.workers)
    counter = Unreadable(source)
    for batch in stream:
        yield counter.take(batch)


def _read_ahead(batches: grain.MapDataset, threads: int, ahead: int, workers: int) -> Any:
    """Iterates over `batches`, `ahead` of them read in advance (by each of the processes)."""
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = batches.to_iter_dataset(options)
    if not workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also in a notebook
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


# --- evaluation and encoding: each image once -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LoadOnce(grain.transforms.Map):
    """Number of a crop -> the crop. Numbers below 0, and unreadable records, have mask 0."""

    source: Any
    size: int
    crops: int

    def map(self, number: int) -> dict[str, np.ndarray]:
        pixels, label, mask = np.zeros((self.size, self.size, 3), np.uint8), 0, 0.0
        unreadable = -1
        if number >= 0:
            record = int(number) % len(self.source)
            try:
                image, label = self.source[record]
                if self.crops == 1:
                    pixels = np.asarray(center_crop(image, self.size))
                else:
                    rng = np.random.default_rng((4, number))
                    pixels = np.asarray(random_crop(image, self.size, rng))
                mask = 1.0
            except Exception:  # as in training; the image is left out and named
                unreadable = record
        return {
            "image": pixels,
            "label": np.int32(label),
            "mask": np.float32(mask),
            "unreadable": np.int64(unreadable),
        }


def fixed_crops(
    source: Any,
    numbers: np.ndarray,
    *,
    size: int,
    batch_size: int,
    crops: int = 1,
    threads: int = 4,
    workers: int = 0,
) -> Iterator[Batch]:
    """The crops of these numbers, in order; a number below 0 fills up, with mask 0.

    numbers: a multiple of batch_size of them. Crop n is of image n % len(source): ADM's centre crop
    with crops = 1, else one at a place that is fixed by n. A batch: image [B, size, size, 3] uint8,
    label [B] int32, mask [B] float32, unreadable [B] (the image's number, or -1).
    """
    batches = grain.MapDataset.source(numbers).map(_LoadOnce(source, size, crops)).batch(batch_size)
    yield from _read_ahead(batches, threads, threads, workers)


def evaluation_batches(
    source: Any,
    *,
    size: int,
    batch_size: int,
    count: int = 0,
    crops: int = 1,
    threads: int = 4,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """This process's share of all images of `source`, each once, in order.

    A batch: image [B / processes, size, size, 3] uint8, label, mask [B / processes] float32. The
    last batch is filled with images of mask 0. With crops > 1 an image is cut that many times at
    fixed random places instead of once in the middle. `count` > 0 stops after so many crops.
    """
    total = len(source) * crops
    total = min(total, count) if count else total
    local = batch_size // processes
    mine = padded(np.arange(total), batch_size).reshape(-1, processes, local)[:, process].ravel()
    named = set()
    for batch in fixed_crops(
        source, mine, size=size, batch_size=local, crops=crops, threads=threads
    ):
        for record in batch.pop("unreadable").tolist():
            if record >= 0 and record not in named:
                named.add(record)
                logging.warning("unreadable, left out: %s", source.name(record))
        yield batch


def padded(numbers: np.ndarray, multiple: int) -> np.ndarray:
    """`numbers` with -1 behind them, to a multiple."""
    return np.pad(numbers, (0, -len(numbers) % multiple), constant_values=-1)
