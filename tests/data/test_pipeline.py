# SPDX-License-Identifier: Apache-2.0
"""Batches: order, position, hosts, workers, unreadable files."""

import os

import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, data, to_json

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Data
from dcae_jax.data import pipeline, sources
from dcae_jax.errors import UserError


def _joined(batches, key="image"):
    return np.concatenate([batch[key] for batch in batches])


def test_hosts_share_the_global_batches_of_one(image_folder):
    """Catches an order or an augmentation that depends on how many hosts read."""
    config = data.config(data__source="folder", data__path=image_folder)
    whole = data.take(config, 8)
    parts = [data.take(config, 8, process=p, processes=2) for p in range(2)]
    for k in range(8):
        for key in ("image", "label"):
            joined = np.concatenate([parts[0][k][key], parts[1][k][key]])
            np.testing.assert_array_equal(joined, whole[k][key])


def test_the_position_is_the_global_index_alone(image_folder):
    """Catches a resumed run that starts its epoch again, or draws other crops."""
    config = data.config(data__source="folder", data__path=image_folder)
    whole = data.take(config, 8)
    resumed = data.take(config, 5, start=3 * config.batch_size)
    np.testing.assert_array_equal(_joined(resumed), _joined(whole[3:]))


def test_workers_and_threads_do_not_change_the_batches(image_folder):
    """Catches batches that arrive in the order in which workers finish."""
    base = data.take(data.config(data__source="folder", data__path=image_folder), 4)
    other = data.config(
        data__source="folder", data__path=image_folder, data__workers=2, data__threads=1
    )
    np.testing.assert_array_equal(_joined(data.take(other, 4)), _joined(base))


def test_an_epoch_reads_each_record_once_and_the_next_in_another_order(image_folder):
    """Catches sampling with replacement, and the same order in every epoch."""
    config = data.config(data__source="folder", data__path=image_folder, data__held_out=0.0)
    colours = _joined(data.take(config, 6))[:, 0, 0, 0]
    first, second = colours[:12], colours[12:]
    assert sorted(first) == sorted(second) == [i * 20 for i in range(12)]
    assert list(first) != list(second)
    other = _joined(
        data.take(
            data.config(**{"data__source": "folder", "data__path": image_folder, "seed": 8}), 3
        )
    )
    assert list(other[:, 0, 0, 0]) != list(first)


def test_the_label_is_the_top_folder(image_folder):
    """Catches labels that follow the order of reading instead of the class."""
    batch = data.take(data.config(data__source="folder", data__path=image_folder), 1)[0]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] // 20 % 3, batch["label"])


def test_a_mixture_draws_by_weight_and_the_same_on_any_number_of_hosts(image_folder, tmp_path):
    """Catches parts drawn by their size instead of their weight, or by each host for itself."""
    (tmp_path / "white").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), "white").save(tmp_path / "white" / f"{i}.png")
    parts = ((3.0, "folder", str(tmp_path / "white")), (1.0, "folder", image_folder))
    config = data.config(data__source="mixture", data__parts=parts, data__held_out=0.0)
    whole = data.take(config, 50)
    white = (_joined(whole) == 255).all((1, 2, 3))
    assert 0.7 < white.mean() < 0.8
    hosts = [data.take(config, 50, process=p, processes=2) for p in range(2)]
    for k in (0, 7, 49):
        joined = np.concatenate([hosts[0][k]["image"], hosts[1][k]["image"]])
        np.testing.assert_array_equal(joined, whole[k]["image"])
    np.testing.assert_array_equal(_joined(data.take(config, 10, start=160)), _joined(whole[40:]))
    held = sources.held_out_source(
        data.section(data.config(data__source="mixture", data__parts=parts))
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
    drawn = np.bincount(_joined(data.take(config, 400 // config.batch_size))[:, 0, 0, 0])
    assert len(drawn) == 4 and (drawn[:2] > 130).all() and (drawn[2:] > 5).all(), drawn
    with pytest.raises(UserError, match="VARIANT,PHASE"):
        config_lib.load_file(os.path.join(CONFIGS, "mix.py"), "tiny,phase4")


def test_an_unreadable_file_is_replaced_counted_and_named_once(image_folder, caplog):
    """Catches a crash on one broken file, and a log that repeats it every epoch."""
    for i in range(400):
        path = os.path.join(image_folder, "class0", f"good{i}.png")
        Image.new("RGB", (16, 16), (7, 7, 7)).save(path)
    bad = os.path.join(image_folder, "class0", "ä 0.png")
    with open(bad, "wb") as file:
        file.write(b"\x89PNG not really")
    config = data.config(data__source="folder", data__path=image_folder, data__held_out=0.0)
    batches = data.take(config, 206)  # two epochs of 412
    assert all(batch["image"].any(axis=(1, 2, 3)).all() for batch in batches)
    assert sum(bad in record.getMessage() for record in caplog.records) == 1
    again = data.take(config, 103, start=103 * 4)
    np.testing.assert_array_equal(_joined(again), _joined(batches[103:]))


def test_many_unreadable_files_are_an_error(image_folder):
    """Catches a run that trains on replacements while its data set is broken."""
    for i in range(3):
        with open(os.path.join(image_folder, "class0", f"bad{i}.jpg"), "wb") as file:
            file.write(b"")
    config = data.config(data__source="folder", data__path=image_folder)
    with pytest.raises(UserError, match="unreadable"):
        data.take(config, 60)


def test_nothing_but_unreadable_files_is_an_error_at_once(tmp_path):
    """Catches a batch of zeros handed to the model when no record can be read."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="unreadable"):
        data.take(data.config(data__source="folder", data__path=str(tmp_path)), 1)


def test_evaluation_reads_each_image_once_and_masks_the_rest(image_folder):
    """Catches the last images counted twice, or dropped, when the batch does not divide."""
    source = sources.folder(image_folder)
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


@pytest.mark.parametrize(("images", "count"), [(25_620, 1000), (1281, 1280), (12, 6), (5, 5)])
def test_fewer_crops_than_images_are_spread_over_all_of_them(images, count):
    """Catches the first images of a sorted source, which are of few classes (39 of ImageNet's
    thousand), and a distance that always meets the same of classes that take turns."""
    found = pipeline.spread(images, count)
    assert len(found) == count and found[0] >= 0 and found[-1] < images
    assert (np.diff(found) > 0).all() and np.diff(found).max() <= 2 * images / count
    if count < images // 20:
        assert len(set(found * 1000 // images)) == 1000  # sorted by class
        assert len(set(found % 25)) == 25  # 25 classes that take turns


def test_more_crops_than_images_take_each_image_equally_often():
    """Catches a second crop of the first images alone where the last round is not whole."""
    np.testing.assert_array_equal(pipeline.spread(5, 10), np.arange(10))
    found = pipeline.spread(100, 210)
    np.testing.assert_array_equal(found[:200], np.arange(200))
    assert len(set(found[200:] // 10)) == 10  # one of each ten


def test_an_evaluation_with_a_count_sees_every_part_of_a_mixture(image_folder, tmp_path):
    """Catches an evaluation of the first part alone, and batches in another order of hosts."""
    (tmp_path / "white").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), "white").save(tmp_path / "white" / f"{i}.png")
    parts = tuple((1.0, "folder", str(path)) for path in (image_folder, tmp_path / "white"))
    source = sources.encoding_source(Data(source="mixture", parts=parts))
    batches = pipeline.evaluation_batches(source, size=16, batch_size=3, count=6)
    first = _joined(batches)[:, 0, 0]
    assert (first == 255).all(1).tolist() == [False] * 3 + [True] * 3


def test_parts_of_one_length_have_orders_of_their_own(tmp_path):
    """Catches parts that are drawn in step: record i of one always beside i of the other."""
    for part, channel in (("a", 0), ("b", 1)):
        (tmp_path / part).mkdir()
        for i in range(16):
            colour = [0, 0, 0]
            colour[channel] = 10 * i + 10
            Image.new("RGB", (16, 16), tuple(colour)).save(tmp_path / part / f"{i:02d}.png")
    parts = tuple((1.0, "folder", str(tmp_path / part)) for part in "ab")
    config = data.config(data__source="mixture", data__parts=parts, data__held_out=0.0)
    drawn = _joined(data.take(config, 8))[:, 0, 0]
    orders = [[int(v) for v in drawn[:, channel] if v] for channel in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == [10 * i + 10 for i in range(16)]
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 8


def test_another_batch_size_goes_on_with_whole_batches_of_one_size(image_folder):
    """Catches a batch of images of two sizes, where allow_change lets the batch size differ: the
    32 examples of 8 batches are not a multiple of 5; and another position after a second resume."""
    config = data.config(data__source="folder", data__path=image_folder)
    config.resolutions = (16, 24, 32)
    config.batch_size = 5
    batches = data.take(config, 20, start=32)
    assert {batch["image"].shape[1] for batch in batches} == {16, 24, 32}
    again = data.take(config, 17, start=32 + 3 * 5)
    for before, after in zip(batches[3:], again, strict=True):
        np.testing.assert_array_equal(before["image"], after["image"])
