# SPDX-License-Identifier: Apache-2.0
"""Images packed in tars, Arrow and parquet files: the batches of the folder that they came from."""

import dataclasses
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import ROOT, data

from dcae_jax.config.schema import Data
from dcae_jax.data import contents, huggingface, indexes, sources, webdataset
from dcae_jax.errors import UserError

KINDS = ["webdataset", "arrow", "parquet"]
SAVED = os.path.join(ROOT, "tests", "goldens", "huggingface")


@pytest.fixture
def image_folder(image_folder):
    """Those of the other tests, with a slope, so that each crop is another."""
    for path in pathlib.Path(image_folder).rglob("*.png"):
        image = Image.open(path)
        slope = Image.linear_gradient("L").resize(image.size).rotate(30)
        Image.merge("RGB", (*image.split()[:2], slope)).save(path)
    return image_folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_images_give_the_batches_of_their_folder(image_folder, tmp_path, kind):
    """Catches another order, label, crop or split than of the same images in a folder; alone and as
    a part of a mixture."""
    packed = data.pack(image_folder, kind, tmp_path / "packed")
    held = {"data__held_out": 0.25}
    folder = data.config(data__source="folder", data__path=image_folder, **held)
    same = data.config(**packed, **held)
    wanted = data.take(folder, 8)
    _assert_equal(data.take(same, 8), wanted)
    assert len({int(label) for batch in wanted for label in batch["label"]}) == 3

    def held_out(config):
        source = sources.held_out_source(data.section(config))
        pairs = [source[i] for i in range(len(source))]
        return [(np.asarray(image).tolist(), label) for image, label in pairs]

    assert held_out(same) == held_out(folder)
    names = sources.encoding_source(data.section(same)).class_names
    assert len(names) == 3 and (kind == "webdataset" or names == ("class0", "class1", "class2"))

    def mixed(source, path):
        parts = ((2.0, "photos", ""), (1.0, source, path))
        return data.take(data.config(data__source="mixture", data__parts=parts, **held), 6)

    found = mixed(packed["data__source"], packed["data__path"])
    _assert_equal(found, mixed("folder", image_folder))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_images_resume_on_any_number_of_hosts_and_workers(image_folder, tmp_path, kind):
    """Catches an order that depends on who reads, or on where a process started; and a source that
    a worker process cannot open."""
    packed = data.pack(image_folder, kind, tmp_path / "packed")
    whole = data.take(data.config(**packed), 8)
    for processes in (2, 4):
        parts = [
            data.take(data.config(**packed), 5, start=12, process=p, processes=processes)
            for p in range(processes)
        ]
        joined = [
            {key: np.concatenate([part[k][key] for part in parts]) for key in ("image", "label")}
            for k in range(5)
        ]
        _assert_equal(joined, whole[3:])
    workers = data.config(**packed, data__workers=2, data__threads=1)
    _assert_equal(data.take(workers, 3, start=20), whole[5:])


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_a_corrupt_record_is_replaced_and_named(tmp_path, kind, caplog):
    """Catches a crash on one broken image, and a log that does not say which one it is."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(400):
        Image.new("RGB", (16, 16), (7, 7, i % 256)).save(images / f"{i:03d}.png")
    (images / "123.png").write_bytes(b"\x89PNG not really")
    packed = {"data__source": "folder", "data__path": str(images)}
    if kind != "folder":
        packed = data.pack(images, kind, tmp_path / "packed")
    config = data.config(**packed, data__held_out=0.0)
    batches = data.take(config, 200)  # two epochs
    assert all(batch["image"].any(axis=(1, 2, 3)).all() for batch in batches)
    (said,) = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    where = {
        "folder": "images/123.png",
        "webdataset": "packed/0.tar, 123.png",
        "arrow": "packed/data-0.arrow, row 123",
        "parquet": "packed/0.parquet, row group 41, row 0",
    }
    assert "replaced: " in said and said.endswith(where[kind])
    folder = data.config(data__source="folder", data__path=str(images), data__held_out=0.0)
    _assert_equal(batches[:110], data.take(folder, 110))
    _assert_equal(data.take(config, 20, start=400), batches[100:120])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_images_have_an_identity_without_being_decoded(
    image_folder, tmp_path, kind, monkeypatch
):
    """Catches a file that was replaced between a kill and a resume, and a start that decodes."""
    packed = data.pack(image_folder, kind, tmp_path / "packed")
    settings = data.section(data.config(**packed))

    def index():
        return contents.index(sources.training_source(settings))

    def unread(*_, **__):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", unread)
    known = index()
    assert index() == known
    monkeypatch.undo()
    Image.new("RGB", (50, 50)).save(os.path.join(image_folder, "class0", "ä 0.png"))
    shutil.rmtree(tmp_path / "packed")
    data.pack(image_folder, kind, tmp_path / "packed")
    huggingface._arrow.cache_clear()
    huggingface._metadata.cache_clear()
    assert index() != known


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_what_the_library_datasets_writes_is_read(layout):
    """Catches files of datasets 5.2 (save_to_disk, to_parquet; colour 20 * i, label i % 3) whose
    splits, rows, labels or class names are not found."""
    settings = Data(source="huggingface", path=os.path.join(SAVED, layout))
    source = sources.training_source(settings)
    rows = [source[i] for i in range(len(source))]
    assert [(image.getpixel((0, 0)), image.size, label) for image, label in rows] == [
        ((20 * i, 100, 200), (20 + i, 30 - i), i % 3) for i in range(6)
    ]
    assert source.class_names == ("a", "b", "c")
    held_out = sources.held_out_source(settings)
    assert [held_out[i][0].getpixel((0, 0))[0] // 20 for i in range(len(held_out))] == [7, 8]
    one = dataclasses.replace(settings, held_out_split="", held_out=0.2)
    assert len(sources.training_source(one)) == 4 and len(sources.held_out_source(one)) == 2
    with pytest.raises(UserError, match="no split 'test'; set .* to train or validation"):
        sources.held_out_source(dataclasses.replace(settings, held_out_split="test"))


def test_a_data_set_that_cannot_be_read_is_one_line(tmp_path):
    """Catches pyarrow's traceback, and an image column that is guessed."""
    with pytest.raises(UserError, match="holds no .*parquet"):
        huggingface.huggingface(str(tmp_path), "train")
    file = tmp_path / "0.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="0.parquet cannot be read .*; fetch it again"):
        huggingface.huggingface(str(tmp_path), "train")
    saved = pathlib.Path(SAVED, "parquet", "data", "train-00000-of-00001.parquet")
    table = pq.read_table(saved)
    pq.write_table(table.append_column("mask", table["image"]), file)
    assert huggingface.huggingface(str(tmp_path), "train").column == "image"
    pq.write_table(table.drop_columns(["image"]), file)
    huggingface._metadata.cache_clear()
    with pytest.raises(UserError, match="has the columns label; rename"):
        huggingface.huggingface(str(tmp_path), "train")


# --- tars -----------------------------------------------------------------------------------------


def test_a_tar_is_indexed_once_and_again_when_it_changes(image_folder, tmp_path, monkeypatch):
    """Catches tars whose headers are read at each start, and an index of another tar."""
    path = data.pack(image_folder, "webdataset", tmp_path / "packed")["data__path"]
    whole = webdataset.webdataset(path)
    assert sorted(os.listdir(path)) == ["0.tar", "0.tar.index.npz", "1.tar", "1.tar.index.npz"]
    scanned, scan = [], webdataset._scan
    monkeypatch.setattr(webdataset, "_scan", lambda *a: scanned.append(a) or scan(*a))
    again = webdataset.webdataset(path)
    assert again.index() == whole.index() and not scanned
    pathlib.Path(path, "0.tar.index.npz").write_bytes(b"PK half")
    assert webdataset.webdataset(path).index() == whole.index() and len(scanned) == 1
    shutil.copy(os.path.join(path, "1.tar"), os.path.join(path, "0.tar"))
    os.utime(os.path.join(path, "0.tar"), (1.1e9, 1.1e9))
    assert webdataset.webdataset(path).files == whole.files[6:] * 2 and len(scanned) == 2


def test_the_index_of_a_read_only_folder_is_in_the_cache(image_folder, tmp_path, monkeypatch):
    """Catches a start that fails, or indexes each time, where the data cannot be written."""
    path = data.pack(image_folder, "webdataset", tmp_path / "packed")["data__path"]
    write = indexes.write
    monkeypatch.setattr(
        indexes, "write", lambda place, arrays: not place.startswith(path) and write(place, arrays)
    )
    whole = webdataset.webdataset(path)
    assert len(os.listdir(path)) == 2
    monkeypatch.setattr(webdataset, "_scan", None)
    assert webdataset.webdataset(path).index() == whole.index()


def test_a_tar_without_numbers_has_the_labels_of_its_folders(image_folder, tmp_path):
    """Catches the tar of an ImageFolder read as a single class."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(image_folder, ".")
    source, folder = webdataset.webdataset(str(tmp_path / "x.tar")), sources.folder(image_folder)
    assert source.class_names == folder.class_names
    labels = dict(zip(source.files, source.labels.tolist(), strict=True))
    assert labels == {file: folder[i][1] for i, file in enumerate(folder.files)}


@pytest.mark.parametrize("fault", ["header", "cut", "compressed", "label"])
def test_a_damaged_tar_is_named(image_folder, tmp_path, fault):
    """Catches images that vanish because tarfile stops in silence at a damaged header."""
    path = data.pack(image_folder, "webdataset", tmp_path / "packed")["data__path"]
    tar = pathlib.Path(path, "0.tar")
    content = bytearray(tar.read_bytes())
    places = webdataset.webdataset(path).places
    pathlib.Path(path, "0.tar.index.npz").unlink()
    if fault == "header":
        content[places[3, 1] - 3 * 512] ^= 1  # its extended header
    elif fault == "label":
        content = content.replace(b"0" + bytes(511), b"x" + bytes(511), 1)
    elif fault == "cut":
        content = content[: places[5, 1] + 10]
    else:
        content = b"\x1f\x8b" + content
    tar.write_bytes(content)
    match = "not a class number" if fault == "label" else "0.tar is (damaged|not a whole)"
    with pytest.raises(UserError, match=match):
        webdataset.webdataset(path)


def test_images_without_a_label_are_reported_before_they_are_encoded(image_folder, tmp_path):
    """Catches an image without a .cls that gets another's label in hours of encoding."""
    packed = data.pack(image_folder, "webdataset", tmp_path / "packed")
    with tarfile.open(os.path.join(packed["data__path"], "2.tar"), "w") as tar:
        tar.add(os.path.join(image_folder, "class0", "ä 0.png"), "new.png")
    settings = data.section(data.config(**packed))
    assert [source[i][1] for source in [sources.evaluation_source(settings)] for i in (0, 12)] == [
        0,
        -1,
    ]
    with pytest.raises(UserError, match=r"has 1 images without a label \(.*2.tar, new.png\)"):
        sources.encoding_source(settings)
