# SPDX-License-Identifier: Apache-2.0
"""Images in, batches out: order, position, formats, broken files."""

import io
import itertools
import math
import os
import sys

import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, to_json

from dcae_jax import config as config_lib
from dcae_jax.data import pipeline, sources, transforms
from dcae_jax.errors import UserError


def _config(**changes):
    config = config_lib.default()
    config.batch_size, config.resolution, config.seed = 4, 16, 7
    config.data.threads = 2
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures in three classes, each of one colour that is its number."""
    for i in range(12):
        folder = tmp_path / "pictures" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30 - i), (i * 20, 100, 200)).save(folder / f"ä {i}.png")
    return str(tmp_path / "pictures")


def _take(config, count, start=0, process=0, processes=1):
    source = sources.training_source(config.data)
    batches = pipeline.training_batches(config, source, start, process, processes)
    return list(itertools.islice(batches, count))


def _joined(batches, key="image"):
    return np.concatenate([batch[key] for batch in batches])


def test_hosts_share_the_global_batches_of_one(pictures):
    """Catches an order or an augmentation that depends on how many hosts read."""
    config = _config(data__source="folder", data__path=pictures)
    whole = _take(config, 8)
    parts = [_take(config, 8, process=p, processes=2) for p in range(2)]
    for k in range(8):
        for key in ("image", "label"):
            joined = np.concatenate([parts[0][k][key], parts[1][k][key]])
            np.testing.assert_array_equal(joined, whole[k][key])


def test_the_position_is_the_global_index_alone(pictures):
    """Catches a resumed run that starts its epoch again, or draws other crops."""
    config = _config(data__source="folder", data__path=pictures)
    whole = _take(config, 8)
    resumed = _take(config, 5, start=3 * config.batch_size)
    np.testing.assert_array_equal(_joined(resumed), _joined(whole[3:]))


def test_workers_and_threads_do_not_change_the_batches(pictures):
    """Catches batches that arrive in the order in which workers finish."""
    base = _take(_config(data__source="folder", data__path=pictures), 4)
    other = _config(data__source="folder", data__path=pictures, data__workers=2, data__threads=1)
    np.testing.assert_array_equal(_joined(_take(other, 4)), _joined(base))


def test_an_epoch_reads_each_record_once_and_the_next_in_another_order(pictures):
    """Catches sampling with replacement, and the same order in every epoch."""
    config = _config(data__source="folder", data__path=pictures, data__held_out=0.0)
    colours = _joined(_take(config, 6))[:, 0, 0, 0]
    first, second = colours[:12], colours[12:]
    assert sorted(first) == sorted(second) == [i * 20 for i in range(12)]
    assert list(first) != list(second)
    other = _joined(
        _take(_config(**{"data__source": "folder", "data__path": pictures, "seed": 8}), 3)
    )
    assert list(other[:, 0, 0, 0]) != list(first)


def test_the_label_is_the_top_folder(pictures):
    """Catches labels that follow the order of reading instead of the class."""
    batch = _take(_config(data__source="folder", data__path=pictures), 1)[0]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] // 20 % 3, batch["label"])


def test_held_out_files_are_not_trained_on_and_stay_when_others_come(pictures):
    """Catches evaluation on training images, and a split that moves when a file is added."""
    settings = _config(data__source="folder", data__path=pictures, data__held_out=0.25).data

    def names(source):
        return {source.name(i) for i in range(len(source))}

    held = names(sources.held_out_source(settings))
    assert len(held) == 3
    assert not held & names(sources.training_source(settings))
    Image.new("RGB", (9, 9)).save(os.path.join(pictures, "new.png"))
    settings.held_out = 3 / 13
    assert len(held & names(sources.held_out_source(settings))) >= 2


def test_center_crop_is_adms():
    """Catches a resize in one go, another filter, or a crop one pixel off."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (97, 131, 3), dtype=np.uint8))
    half = image.resize((65, 48), Image.Resampling.BOX)
    scale = 32 / 48
    small = half.resize((round(65 * scale), 32), Image.Resampling.BICUBIC)
    left = (small.width - 32) // 2
    want = np.asarray(small)[:, left : left + 32]
    np.testing.assert_array_equal(np.asarray(transforms.center_crop(image, 32)), want)
    assert transforms.center_crop(Image.new("RGB", (5, 9)), 32).size == (32, 32)


@pytest.mark.parametrize("crop", ["random", "random_resized", "center"])
@pytest.mark.parametrize("size", [(8, 40), (70, 30), (16, 16)])
def test_every_crop_has_the_asked_size(crop, size):
    """Catches crops of images smaller than the resolution, and empty corners of rotation."""
    settings = _config(data__crop=crop, data__rotation=20.0, data__color_jitter=0.1).data
    image = Image.new("RGB", size, (200, 200, 200))
    for seed in range(8):
        out = transforms.augment(image, 16, settings, np.random.default_rng(seed))
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8
        assert out.min() > 100  # a black corner would be 0


def test_flips_and_jitter_happen_only_when_asked_for():
    """Catches augmentation that cannot be switched off, or is never on."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 200
    image = Image.fromarray(pixels)

    def variants(**changes):
        settings = _config(data__crop="center", **changes).data
        rngs = (np.random.default_rng(seed) for seed in range(20))
        return {transforms.augment(image, 16, settings, rng).tobytes() for rng in rngs}

    assert variants(data__flip=False) == {pixels.tobytes()}
    assert variants() == {pixels.tobytes(), pixels[:, ::-1].tobytes()}
    assert len(variants(data__flip=False, data__color_jitter=0.3)) > 10


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


def test_exif_orientation_is_applied(tmp_path):
    """Catches photographs from telephones that lie on their side."""
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert sources.folder(str(tmp_path))[0][0].size == (10, 30)


def test_a_mixture_draws_by_weight_and_the_same_on_any_number_of_hosts(pictures, tmp_path):
    """Catches parts drawn by their size instead of their weight, or by each host for itself."""
    (tmp_path / "white").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), "white").save(tmp_path / "white" / f"{i}.png")
    parts = ((3.0, "folder", str(tmp_path / "white")), (1.0, "folder", pictures))
    config = _config(data__source="mixture", data__parts=parts, data__held_out=0.0)
    whole = _take(config, 50)
    white = (_joined(whole) == 255).all((1, 2, 3))
    assert 0.7 < white.mean() < 0.8
    hosts = [_take(config, 50, process=p, processes=2) for p in range(2)]
    for k in (0, 7, 49):
        joined = np.concatenate([hosts[0][k]["image"], hosts[1][k]["image"]])
        np.testing.assert_array_equal(joined, whole[k]["image"])
    np.testing.assert_array_equal(_joined(_take(config, 10, start=160)), _joined(whole[40:]))
    held = sources.held_out_source(
        _config(**{"data__source": "mixture", "data__parts": parts}).data
    )
    assert len(held) == 2  # one of each part


@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
def test_the_papers_mix_is_its_phase_on_four_folders(phase, tmp_path):
    """Catches parts that cannot be opened, one that is never drawn, and a phase changed beside its
    data."""
    config = config_lib.load_file(os.path.join(CONFIGS, "mix.py"), f"tiny,{phase}")
    alone = config_lib.load_file(os.path.join(CONFIGS, f"{phase}.py"), "tiny")
    changes = config_lib.identity_changes(to_json(alone), to_json(config))
    assert changes.keys() == {"data.source", "data.parts"} and config.steps == alone.steps
    parts = []
    for level, (weight, kind, path) in enumerate(config.data.parts):
        here = tmp_path / path.lstrip("/")
        here.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (level, 0, 0)).save(here / f"{i}.png")
        parts.append((weight, kind, str(here)))
    config.data.parts, config.resolution, config.resolutions = tuple(parts), 16, ()
    config.data.color_jitter = 0.0
    drawn = np.bincount(_joined(_take(config, 400 // config.batch_size))[:, 0, 0, 0])
    assert len(drawn) == 4 and (drawn[:2] > 130).all() and (drawn[2:] > 5).all(), drawn
    with pytest.raises(UserError, match="VARIANT,PHASE"):
        config_lib.load_file(os.path.join(CONFIGS, "mix.py"), "tiny,phase4")


@pytest.mark.parametrize("part", [(0, "folder", "x"), (1, "web", "x"), (1, "folder")])
def test_an_impossible_part_of_a_mixture_is_named(part):
    """Catches a part of weight 0, or of a source that does not exist, taken in silence."""
    with pytest.raises(UserError, match="data.parts"):
        sources.training_source(_config(data__source="mixture", data__parts=(part,)).data)


def test_an_unreadable_file_is_replaced_counted_and_named_once(pictures, caplog):
    """Catches a crash on one broken file, and a log that repeats it every epoch."""
    for i in range(400):
        path = os.path.join(pictures, "class0", f"good{i}.png")
        Image.new("RGB", (16, 16), (7, 7, 7)).save(path)
    bad = os.path.join(pictures, "class0", "ä 0.png")
    with open(bad, "wb") as file:
        file.write(b"\x89PNG not really")
    config = _config(data__source="folder", data__path=pictures, data__held_out=0.0)
    batches = _take(config, 206)  # two epochs of 412
    assert all(batch["image"].any(axis=(1, 2, 3)).all() for batch in batches)
    assert sum(bad in record.getMessage() for record in caplog.records) == 1
    again = _take(config, 103, start=103 * 4)
    np.testing.assert_array_equal(_joined(again), _joined(batches[103:]))


def test_many_unreadable_files_are_an_error(pictures):
    """Catches a run that trains on replacements while its data set is broken."""
    for i in range(3):
        with open(os.path.join(pictures, "class0", f"bad{i}.jpg"), "wb") as file:
            file.write(b"")
    config = _config(data__source="folder", data__path=pictures)
    with pytest.raises(UserError, match="unreadable"):
        _take(config, 60)


def test_nothing_but_unreadable_files_is_an_error_at_once(tmp_path):
    """Catches a batch of zeros handed to the model when no record can be read."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="unreadable"):
        _take(_config(data__source="folder", data__path=str(tmp_path)), 1)


@pytest.mark.parametrize("missing", [True, False])
def test_no_images_is_an_error_that_names_the_path(missing, tmp_path):
    """Catches an endless loop, or a traceback, on an empty or missing folder."""
    path = str(tmp_path / "nothing") if missing else str(tmp_path)
    with pytest.raises(UserError, match=path):
        sources.folder(path)


def test_evaluation_reads_each_image_once_and_masks_the_rest(pictures):
    """Catches the last images counted twice, or dropped, when the batch does not divide."""
    source = sources.folder(pictures)
    for processes in (1, 2):
        seen = []
        for process in range(processes):
            batches = pipeline.evaluation_batches(
                source, size=16, batch_size=8, process=process, processes=processes
            )
            for batch in batches:
                assert len(batch["mask"]) == 8 // processes
                seen += [image[0, 0, 0] for image in batch["image"][batch["mask"] > 0]]
        assert sorted(seen) == sorted(int(file.split()[-1][:-4]) * 20 for file in source.files)


def test_fixed_crops_are_the_same_each_time():
    """Catches evaluation on other crops at every step, which makes its curve meaningless."""
    source = sources.photos(sources.HELD_OUT_PHOTOS)
    runs = [
        list(pipeline.evaluation_batches(source, size=32, batch_size=4, count=8, crops=4))
        for _ in range(2)
    ]
    first, second = (_joined(run) for run in runs)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first.reshape(8, -1), axis=0)) == 8


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
    assert sources.class_names(source) == ("0", "1", "2")
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

    settings = config_lib.default().data
    settings.crop = "random"
    assert transforms.least_side(settings, 128) == 0
    settings.crop = "center"
    assert transforms.least_side(settings, 128) == 128
    settings.rotation = 45.0
    assert transforms.least_side(settings, 128) == math.ceil(128 * math.sqrt(2))
    settings.crop, settings.crop_area, settings.rotation = "random_resized", (0.25, 1.0), 0.0
    assert transforms.least_side(settings, 128) == 512

    whole, part = (transforms.center_crop(source.read(0, least)[0], 128) for least in (0, 128))
    difference = np.abs(np.asarray(whole, np.float32) - np.asarray(part, np.float32))
    assert difference.mean() < 2  # of 255


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_a_picture_turned_by_any_angle_has_its_size(crop):
    """Catches a square around a turned one that shrinks above 90 degrees."""
    settings = _config(data__rotation=180.0, data__crop=crop).data
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    for seed in range(40):
        out = transforms.augment(image, 32, settings, np.random.default_rng(seed))
        assert out.shape == (32, 32, 3), seed
    settings.crop = "center"
    assert transforms.least_side(settings, 64) == math.ceil(64 * math.sqrt(2))  # as for 45 degrees


def test_the_labels_of_a_mixture_are_those_of_all_parts(tmp_path):
    """Catches classes of two parts that become one, and a held-out folder that nobody reads."""
    for part, names in (("a", ("cat", "dog")), ("b", ("car", "van", "bus"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    parts = tuple((1.0, "folder", str(tmp_path / part)) for part in "ab")
    settings = {"data__source": "mixture", "data__parts": parts, "data__held_out": 0.0}
    mixture = sources.encoding_source(_config(**settings).data)
    names = sources.class_names(mixture)
    assert names == ("cat", "dog", "bus", "car", "van")
    found = [mixture[i][1] for i in range(5)]
    assert found == [0, 1, 2, 3, 4] == [mixture.read(i, 4)[1] for i in range(5)]
    assert all(f"/{names[label]}/" in mixture.name(i) for i, label in enumerate(found))
    with pytest.raises(UserError, match="held_out_path='x'"):
        sources.training_source(_config(**settings, data__held_out_path="x").data)
