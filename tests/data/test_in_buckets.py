# SPDX-License-Identifier: Apache-2.0
"""Training images in an object store, in memory: the batches of a disk, and its errors."""

import errno
import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from support import ROOT as ROOT_FOLDER
from support import data
from support.memory_store import memory_store

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import calibration
from dcae_jax.config.schema import Data
from dcae_jax.data import contents, folders, huggingface, indexes, pipeline, sources, webdataset
from dcae_jax.errors import MachineError, UserError
from dcae_jax.files import buckets, parts
from dcae_jax.jobs import evaluate

ROOT = "memory://bucket"
KINDS = ["folder", "webdataset", "arrow", "parquet"]


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    with memory_store(monkeypatch, tmp_path / "cache") as system:
        for cached in (huggingface._arrow, huggingface._metadata, huggingface._size):
            cached.cache_clear()
        huggingface._row_group.cache_clear()
        yield system


@pytest.fixture
def images(image_folder):
    """Those of the other tests, with a slope, so that each crop is another; one is no image."""
    for path in sorted(pathlib.Path(image_folder).rglob("*.png")):
        image = Image.open(path)
        slope = Image.linear_gradient("L").resize(image.size).rotate(30)
        Image.merge("RGB", (*image.split()[:2], slope)).save(path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 25, 3), np.uint8)
    Image.fromarray(noise).save(os.path.join(image_folder, "class2", "ä 5.png"))  # a larger file
    path.write_bytes(b"\x89PNG not really")
    return image_folder


def _both(images, kind, folder):
    """The keys of config.data that read the images packed as `kind`, on a disk and in the store."""
    disk = {"data__source": "folder", "data__path": images}
    if kind != "folder":
        disk = data.pack(images, kind, folder / "packed")
    _put(disk["data__path"], f"{ROOT}/{kind}")
    return disk, disk | {"data__path": f"{ROOT}/{kind}"}


def _put(folder, url):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            buckets.put_file(f"{url}/{path.relative_to(folder)}", str(path))


def _source(keys, **more):
    return sources.encoding_source(data.section(data.config(**keys, **more)))


def _same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_gives_the_batches_of_a_disk_whatever_requests_fail(
    images, store, tmp_path, kind, caplog
):
    """Catches another order, label, crop, split or replacement than of the same files on a disk, a
    record that is replaced since one request failed, and an identity of the place."""
    disk, there = _both(images, kind, tmp_path)
    wanted = data.take(data.config(**disk), 6)
    named = {r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()}
    caplog.clear()
    store.every = 3
    _same(data.take(data.config(**there), 6), wanted)
    found = {r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()}
    assert len(found) == 1
    assert found == {line.replace(disk["data__path"], there["data__path"]) for line in named}
    assert contents.index(_source(there)) == contents.index(_source(disk))
    held_out = [
        sources.held_out_source(data.section(data.config(**keys, data__held_out=0.3)))
        for keys in (disk, there)
    ]
    assert len(held_out[0]) == len(held_out[1]) == 4
    _same(*(list(pipeline.evaluation_batches(s, size=16, batch_size=2)) for s in held_out))


@pytest.mark.parametrize(
    "kind, pattern, one, misspelt",
    [
        ("webdataset", "*[01].tar", "0.tar", "2*.tar"),
        ("parquet", "?.parq*", "0.parquet", "2*.parquet"),
        ("folder", "", "class0/ä 0.png", "class*"),
    ],
)
def test_one_object_and_a_pattern_name_what_they_name_on_a_disk(
    images, store, tmp_path, kind, pattern, one, misspelt
):
    """Catches an object of a sibling or of a folder below taken for one of the pattern's."""
    disk, there = _both(images, kind, tmp_path)
    path, url = disk["data__path"], there["data__path"]
    _put(path, f"{url}2")
    if kind == "webdataset":  # a folder's own tars
        _put(path, f"{url}/deeper")
    for name in (one, pattern) if pattern else (one,):
        left, right = (_source({**disk, "data__path": f"{p}/{name}"}) for p in (path, url))
        assert len(left) == len(right) > 0 and contents.index(left) == contents.index(right)
    for same in (url, f"{url}/"):
        assert len(_source({**there, "data__path": same})) == len(_source(disk))
    for missing in (misspelt, "none"):
        with pytest.raises(UserError, match=r"data.path='memory://bucket/.*' (holds|is not)"):
            _source({**there, "data__path": f"{url}/{missing}"})


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_splits_are_found_in_a_bucket(store, layout):
    """Catches a dict of splits, or the splits in file names, that is looked for on the disk."""
    saved = os.path.join(ROOT_FOLDER, "tests", "goldens", "huggingface", layout)
    _put(saved, f"{ROOT}/{layout}")
    for path in (saved, f"{ROOT}/{layout}"):
        settings = Data(source="huggingface", path=path)
        held_out = sources.held_out_source(settings)
        assert len(sources.training_source(settings)) == 6
        assert [held_out[i][0].getpixel((0, 0))[0] // 20 for i in range(len(held_out))] == [7, 8]


def test_a_file_is_identified_by_its_size_and_its_end(store, tmp_path, monkeypatch):
    """Catches a digest of the beginning, which files of one data set share."""
    monkeypatch.setattr(huggingface, "TAIL", 4)
    for place in (str(tmp_path / "x"), f"{ROOT}/x"):
        files.write_file(place, b"0123456789")
        assert huggingface._end(place) == (10, b"6789")
        files.write_file(place, b"012")
        assert huggingface._end(place) == (3, b"012")


def test_parts_of_a_mixture_and_held_out_images_are_in_buckets(images, store, tmp_path):
    """Catches a key that still reads folders alone."""
    _put(images, f"{ROOT}/train")
    parts = {p: ((1.0, "photos", ""), (1.0, "folder", p)) for p in (images, f"{ROOT}/train")}
    left, right = (
        data.take(data.config(data__source="mixture", data__parts=p), 3) for p in parts.values()
    )
    _same(left, right)
    held = {"data__source": "folder", "data__held_out_path": f"{ROOT}/train/class0"}
    settings = data.section(data.config(data__path=images, **held))
    assert len(sources.held_out_source(settings)) == 4


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_a_store_that_is_away_ends_the_job_and_replaces_nothing(
    images, store, tmp_path, monkeypatch, kind, use, caplog
):
    """Catches examples that are replaced, or left out of a score, since a store did not answer."""
    _, there = _both(images, kind, tmp_path)
    source = _source(there)
    monkeypatch.setattr(buckets, "PATIENCE_S", 0.0)
    store.every = 4  # too few to run out of records to try
    with pytest.raises(buckets.StoreError, match=f"{kind}.*: the store does not answer"):
        if use == "train":
            data.take(data.config(**there), 20)
        else:
            list(pipeline.evaluation_batches(source, size=16, batch_size=2))
    assert not any("store" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("use", ["train", "evaluate"])
@pytest.mark.parametrize(
    "error",
    [
        *(OSError(n, os.strerror(n)) for n in (errno.EIO, errno.ESTALE, errno.ENOTCONN)),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"),
        RuntimeError("pread() failed: Input/output error"),  # as ArrayRecord's
    ],
)
def test_an_outage_of_a_disk_ends_the_job_and_names_the_file(
    images, monkeypatch, error, use, caplog
):
    """Catches examples that are replaced while a network disk is away, so that the run is another
    than it would have been. A file without permission is an unreadable record, as before."""
    decode = folders.decode

    def fail(path, least):
        if path.endswith("ä 3.png"):
            raise error
        return decode(path, least)

    monkeypatch.setattr(folders, "decode", fail)
    keys = {"data__source": "folder", "data__path": images, "data__held_out": 0.0}

    def read():
        if use == "train":
            return data.take(data.config(**keys), 6)
        return list(pipeline.evaluation_batches(_source(keys), size=16, batch_size=4))

    with pytest.raises(MachineError, match="ä 3.png cannot be read .*; check the disk") as caught:
        read()
    assert "\n" not in str(caught.value)
    error = PermissionError(errno.EACCES, "Permission denied")
    read()
    assert any("ä 3.png" in r.getMessage() for r in caplog.records)


def test_an_object_that_is_gone_or_shorter_is_an_unreadable_record(
    images, store, caplog, monkeypatch
):
    """Catches a job that waits a quarter of an hour, or ends, for one object that was removed."""
    _put(images, f"{ROOT}/train")
    keys = {"data__source": "folder", "data__path": f"{ROOT}/train", "data__held_out": 0.0}
    batches = data.batches(data.config(**keys))
    store.store.rm_file(f"{ROOT}/train/class0/ä 0.png")
    store.store.pipe_file(f"{ROOT}/train/class1/ä 1.png", b"")
    for _ in range(9):
        next(batches)
    said = [r.getMessage() for r in caplog.records if "unreadable, replaced" in r.getMessage()]
    assert {line.rpartition("/")[2] for line in said} == {"ä 0.png", "ä 1.png", "ä 8.png"}

    class Answer(Exception):
        code = 416

    monkeypatch.setattr(buckets, "PATIENCE_S", 0.0)
    store.every, store.error = 1, Answer("Requested range not satisfiable")
    assert buckets.read_range(f"{ROOT}/x", 9, 1) == b""


def test_a_tar_in_a_bucket_is_indexed_once_and_again_when_it_is_put_again(
    images, store, tmp_path, monkeypatch
):
    """Catches tars that are read whole at each start, an index of another tar, and a start that
    fails where the bucket may only be read."""
    _, there = _both(images, "webdataset", tmp_path)
    url = there["data__path"]
    whole = webdataset.webdataset(url)
    assert buckets.names(url) == ["0.tar", "0.tar.index.npz", "1.tar", "1.tar.index.npz"]
    scanned, scan = [], webdataset._scan
    monkeypatch.setattr(webdataset, "_scan", lambda *a: scanned.append(a) or scan(*a))
    assert webdataset.webdataset(url).index() == whole.index() and not scanned
    buckets.put(f"{url}/0.tar", buckets.read(f"{url}/1.tar") or b"")
    assert webdataset.webdataset(url).files == whole.files[6:] * 2 and len(scanned) == 1
    buckets.put(f"{url}/1.tar", buckets.read(f"{url}/1.tar") or b"")

    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store.store, "pipe_file", refuse)
    for _ in range(2):
        assert webdataset.webdataset(url).files == whole.files[6:] * 2 and len(scanned) == 2
    assert os.path.exists(indexes.cached(f"{url}/1.tar"))


@pytest.mark.parametrize("fault", ["header", "cut", "compressed"])
def test_a_damaged_tar_in_a_bucket_is_named(images, store, tmp_path, fault):
    """Catches images that vanish because tarfile stops in silence at a damaged header."""
    _, there = _both(images, "webdataset", tmp_path)
    url = there["data__path"]
    places, content = webdataset.webdataset(url).places, bytearray(buckets.read(f"{url}/0.tar"))
    if fault == "header":
        content[places[3, 1] - 3 * 512] ^= 1
    elif fault == "cut":
        content = content[: places[5, 1] + 10]
    else:
        content = b"\x1f\x8b" + content
    buckets.put(f"{url}/0.tar", bytes(content))
    with pytest.raises(UserError, match="0.tar is (damaged|not a whole)"):
        webdataset.webdataset(url)


def test_a_store_that_is_away_is_not_taken_for_a_damaged_file(images, store, tmp_path, monkeypatch):
    """Catches the advice to fetch a good parquet file again, or to name another image."""
    _, there = _both(images, "parquet", tmp_path)
    read, tail = parts.buckets.read_range, huggingface.TAIL

    def refuse(url, first, size):
        if size != tail and "parquet" in url or "images" in url:
            raise buckets.StoreError(f"{url}: no permission")
        return read(url, first, size)

    monkeypatch.setattr(parts.buckets, "read_range", refuse)
    with pytest.raises(buckets.StoreError, match=r"data.path='memory.*no permission"):
        _source(there)
    _put(images, f"{ROOT}/images")
    with pytest.raises(buckets.StoreError, match="no permission"):
        evaluate.read_image(f"{ROOT}/images/class0/ä 0.png")


def test_one_image_in_a_bucket_is_evaluated_as_one(images, store):
    """Catches an image file taken for a folder of images, or a folder for a file; and images to
    calibrate with that are looked for on the disk."""
    _put(images, f"{ROOT}/images")
    for root in (images, f"{ROOT}/images"):
        one = f"{root}/class0/ä 0.png"
        there = [files.isfile(path) for path in (one, f"{root}/class0", f"{root}/none")]
        assert there == [True, False, False]
        np.testing.assert_array_equal(
            evaluate.read_image(one), np.asarray(Image.open(f"{images}/class0/ä 0.png"))
        )
    left, right = (calibration.crops(f"{r}/class0", 8) for r in (images, f"{ROOT}/images"))
    np.testing.assert_array_equal(left, right)
    with pytest.raises(UserError, match="calibrate=.*ä 8.png cannot be read; remove it"):
        calibration.crops(f"{ROOT}/images", 8)
    store.every, store.error = 1, PermissionError("Access Denied")
    with pytest.raises(buckets.StoreError, match="no permission"):
        calibration.crops(f"{ROOT}/images", 8)


@pytest.mark.parametrize("source", ["folder", "webdataset", "huggingface"])
def test_a_bucket_that_cannot_be_read_is_one_line_with_its_key(store, monkeypatch, source):
    """Catches a listing that waits for minutes, and a line that does not say which key is wrong."""
    keys = {"data__source": source, "data__path": f"{ROOT}/train", "data__held_out_path": ""}
    buckets._answered.discard("memory")
    monkeypatch.setattr(buckets, "FIRST_S", 0.0)
    store.every = 1
    with pytest.raises(buckets.StoreError) as caught:
        _source(keys)
    assert str(caught.value).startswith(f"data.path='{ROOT}/train': ")
    assert "the store does not answer (connection reset)" in str(caught.value)
    store.error = FileNotFoundError("bucket")
    with pytest.raises(
        UserError, match="data.path=.*: there is no bucket 'bucket'; check its name"
    ):
        _source(keys)
    store.error = PermissionError("Access Denied")
    keys |= {"data__path": "/", "data__held_out_path": f"{ROOT}/val"}
    with pytest.raises(buckets.StoreError, match="data.held_out_path=.*: .*no permission"):
        sources.held_out_source(data.section(data.config(**keys)))


@pytest.mark.parametrize("key", ["path", "held_out_path", "parts"])
def test_a_data_set_may_be_a_url_of_a_store_alone(key, monkeypatch):
    """Catches a URL that is refused, and one that becomes a local folder."""
    monkeypatch.setitem(buckets.STORES, "s3", "fsspec")
    config = config_lib.default()
    for url in ("s3://bucket/train", "https://host/train"):
        value = ((1.0, "folder", url),) if key == "parts" else url
        config.update_from_flattened_dict({f"data.{key}": value})
        if url.startswith("s3"):
            assert isinstance(config_lib.validate(config).data, Data)
            continue
        with pytest.raises(UserError, match=f"data.{key}.*is a URL of no known kind"):
            config_lib.validate(config)
