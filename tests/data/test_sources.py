# SPDX-License-Identifier: Apache-2.0
"""Image sources: what they hold and hold out, image formats, labels."""

import dataclasses
import io
import math
import os
import sys

import numpy as np
import pytest
from PIL import Image

from dcae_jax import files
from dcae_jax.config.schema import Data
from dcae_jax.data import folders, sources, transforms
from dcae_jax.errors import UserError


def test_held_out_files_are_not_trained_on_and_stay_when_others_come(image_folder):
    """Catches evaluation on training images, and a split that moves when a file is added."""
    settings = Data(source="folder", path=image_folder, held_out=0.25)

    def names(source):
        return {source.name(i) for i in range(len(source))}

    held = names(sources.held_out_source(settings))
    assert len(held) == 3
    assert not held & names(sources.training_source(settings))
    Image.new("RGB", (9, 9)).save(os.path.join(image_folder, "new.png"))
    settings = dataclasses.replace(settings, held_out=3 / 13)
    assert len(held & names(sources.held_out_source(settings))) >= 2


def _modes():
    grey = Image.linear_gradient("L").resize((16, 16))
    rgb = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    half_clear = rgb.copy()
    half_clear.putalpha(Image.new("L", (16, 16), 0))
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16)) * 257)
    return {
        "grey": (grey, np.asarray(grey.convert("RGB"))),
        "cmyk": (rgb.convert("CMYK"), np.asarray(rgb)),
        "palette": (rgb.quantize(256), np.asarray(rgb.quantize(256).convert("RGB"))),
        "transparent": (half_clear, np.full((16, 16, 3), 255)),
        "16 bit": (deep, np.asarray(grey.convert("RGB"))),
    }


@pytest.mark.parametrize("mode", ["grey", "cmyk", "palette", "transparent", "16 bit"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    """Catches 16 bits clipped to white, alpha shown as black, inverted CMYK."""
    image, want = _modes()[mode]
    extension = "tif" if mode == "cmyk" else "png"
    image.save(tmp_path / f"x.{extension}")
    got, _ = sources.folder(str(tmp_path))[0]
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - want).max() <= 1


def test_an_image_beside_class_folders_has_no_label(tmp_path):
    """Catches an image of no class that gets the first class's label, or the last label of the part
    before in a mixture; an autoencoder still trains on it, `encode` reports it before it starts."""
    for part in "ab":
        for name in ("cat/0", "dog/1", "loose"):
            path = tmp_path / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    path = str(tmp_path / "b")
    settings = Data(source="folder", path=path, held_out=0.0)
    source = sources.training_source(settings)
    assert [source[i][1] for i in range(3)] == [0, 1, -1]
    with pytest.raises(UserError, match="1 images beside its class folders.*loose.png.*move them"):
        sources.encoding_source(settings)
    parts = tuple((1.0, "folder", str(tmp_path / part)) for part in "ab")
    mixture = Data(source="mixture", parts=parts, held_out=0.0)
    source = sources.training_source(mixture)
    assert [source[i][1] for i in range(6)] == [0, 1, -1, 2, 3, -1]
    with pytest.raises(UserError, match="beside its class folders"):
        sources.encoding_source(mixture)


def test_exif_orientation_is_applied(tmp_path):
    """Catches photographs from telephones that lie on their side."""
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert sources.folder(str(tmp_path))[0][0].size == (10, 30)


@pytest.mark.parametrize("part", [(0, "folder", "x"), (1, "web", "x"), (1, "folder")])
def test_an_impossible_part_of_a_mixture_is_named(part):
    """Catches a part of weight 0, or of a source that does not exist, taken in silence."""
    with pytest.raises(UserError, match="data.parts"):
        sources.training_source(Data(source="mixture", parts=(part,)))


@pytest.mark.parametrize("missing", [True, False])
def test_no_images_is_an_error_that_names_the_path(missing, tmp_path):
    """Catches an endless loop, or a traceback, on an empty or missing folder."""
    path = str(tmp_path / "nothing") if missing else str(tmp_path)
    with pytest.raises(UserError, match=path):
        sources.folder(path)


def test_held_out_photographs_are_no_training_photographs():
    """Catches figures of the demo that were measured on what it trained on."""
    assert not set(sources.PHOTOS) & set(sources.HELD_OUT_PHOTOS)
    assert {name for _, name in sources.HELD_OUT_PHOTOS} == {"flower.jpg", "chelsea.png"}
    assert len(sources.photos()) == len(sources.PHOTOS)


def test_a_tfds_set_that_is_not_prepared_says_how():
    """Catches tfds's own page of alternatives in place of one line."""
    with pytest.raises(UserError, match="array_record"):
        sources.tfds("mnist", "train", "/nonexistent")


def test_a_prepared_tfds_set_is_read_without_tensorflow(tmp_path):
    """Catches a reader that needs TensorFlow, or loses the label or the pixels of a record."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                file = io.BytesIO()
                Image.new("RGB", (9, 8), (i * 10, 0, 0)).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 3}

    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = sources.tfds("tiny", "train", str(tmp_path))
    assert len(source) == 5 and "tensorflow" not in sys.modules
    assert source.class_names == ("0", "1", "2")
    records = [source[i] for i in range(5)]
    seen = sorted((image.getpixel((0, 0))[0], image.size, label) for image, label in records)
    assert seen == [(i * 10, (9, 8), i % 3) for i in range(5)]


@pytest.mark.parametrize("turned", [1, 6])
def test_a_jpeg_is_decoded_at_a_fraction_where_the_crop_halves_it_anyway(tmp_path, turned):
    """Catches a fraction below what the crop needs, and one for crops at the image's own scale."""
    photo = sources.photos()[0][0].resize((640, 512))
    exif = Image.Exif()
    exif[0x0112] = turned
    photo.save(tmp_path / "a.jpg", quality=95, exif=exif)
    photo.save(tmp_path / "b.png")
    source = sources.folder(str(tmp_path))
    sides = {least: min(source.read(0, least)[0].size) for least in (0, 64, 65, 256, 257, 600)}
    assert sides == {0: 512, 64: 64, 65: 128, 256: 256, 257: 512, 600: 512}
    assert min(source.read(1, 64)[0].size) == 512

    assert transforms.least_side(Data(crop="random"), 128) == 0
    assert transforms.least_side(Data(crop="center"), 128) == 128
    settings = Data(crop="center", rotation=45.0)
    assert transforms.least_side(settings, 128) == math.ceil(128 * math.sqrt(2))
    assert transforms.least_side(Data(crop="random_resized", crop_area=(0.25, 1.0)), 128) == 512

    whole, part = (transforms.center_crop(source.read(0, least)[0], 128) for least in (0, 128))
    difference = np.abs(np.asarray(whole, np.float32) - np.asarray(part, np.float32))
    assert difference.mean() < 2  # of 255


def test_the_labels_of_a_mixture_are_those_of_all_parts(tmp_path):
    """Catches classes of two parts that become one, and a held-out folder that nobody reads."""
    for part, names in (("a", ("cat", "dog")), ("b", ("car", "van", "bus"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    parts = tuple((1.0, "folder", str(tmp_path / part)) for part in "ab")
    settings = {"source": "mixture", "parts": parts, "held_out": 0.0}
    mixture = sources.encoding_source(Data(**settings))
    names = mixture.class_names
    assert names == ("cat", "dog", "bus", "car", "van")
    found = [mixture[i][1] for i in range(5)]
    assert found == [0, 1, 2, 3, 4] == [mixture.read(i, 4)[1] for i in range(5)]
    assert all(f"/{names[label]}/" in mixture.name(i) for i, label in enumerate(found))
    with pytest.raises(UserError, match="held_out_path='x'"):
        sources.training_source(Data(**settings, held_out_path="x"))


def test_a_large_folder_is_listed_once_until_it_changes(image_folder, tmp_path, monkeypatch):
    """Catches a million files listed at each start, and a list that misses a change in a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "INDEXED", 12)
    os.mkdir(os.path.join(image_folder, "empty"))

    def settle():
        for folder, *_ in os.walk(image_folder):
            os.utime(folder, (1e9, 1e9))

    def index():
        with monkeypatch.context() as patch:
            patch.setattr(files, "walk_folders", None)
            return sources.folder(image_folder).index()

    plain = sources.folder(image_folder)
    with pytest.raises(TypeError):
        index()  # what has just changed may change again at the same time
    settle()
    assert sources.folder(image_folder).index() == index() == plain.index()
    file = plain.name(3)
    for change in (
        lambda: os.rename(file, f"{file}.jpg"),
        lambda: Image.new("RGB", (9, 9)).save(os.path.join(image_folder, "empty", "new.png")),
        lambda: os.remove(plain.name(5)),
    ):
        settle()
        sources.folder(image_folder)
        index()
        change()
        with pytest.raises(TypeError):
            index()
