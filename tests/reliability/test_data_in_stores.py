# SPDX-License-Identifier: Apache-2.0
"""Training images in a bucket: the batches and the training of a disk, though requests fail."""

import pathlib
import threading
import time

import numpy as np
import pytest
from support import data as data_lib
from support import killing, stores

from dcae_jax.data import contents, sources, webdataset
from dcae_jax.files import buckets
from dcae_jax.runtime import process

KINDS = ["folder", "webdataset", "arrow", "parquet"]


@pytest.fixture(scope="module")
def sets(bucket, data, tmp_path_factory):
    """{kind: (the keys of config.data of the images on a disk, and in the bucket)}."""
    url, found = bucket[0], {}
    (pathlib.Path(data) / "7.png").write_bytes(b"\x89PNG not really")
    for kind in KINDS:
        disk = {"data__source": "folder", "data__path": data}
        if kind != "folder":
            disk = data_lib.pack(data, kind, tmp_path_factory.mktemp(kind) / "packed")
        root = pathlib.Path(disk["data__path"])
        for path in (path for path in root.rglob("*") if path.is_file()):
            buckets.put_file(f"{url}/sets/{kind}/{path.relative_to(root)}", str(path))
        found[kind] = disk, disk | {"data__path": f"{url}/sets/{kind}"}
    return found


def _source(keys):
    return sources.training_source(data_lib.section(data_lib.config(**keys)))


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_store_gives_the_batches_of_a_disk(bucket, sets, kind, monkeypatch, caplog):
    """Catches a request that is read short or given up, connections that worker processes share,
    and tars that are read whole again."""
    _, proxy = bucket
    disk, there = sets[kind]
    wanted = data_lib.take(data_lib.config(**disk), 12)
    proxy.every, failed = 10, proxy.failed
    try:
        for workers in (0, 2):
            found = data_lib.take(data_lib.config(**there, data__workers=workers), 12)
            for a, b in zip(found, wanted, strict=True):
                for key in ("image", "label"):
                    np.testing.assert_array_equal(a[key], b[key])
        assert contents.index(_source(there)) == contents.index(_source(disk))
        if kind == "webdataset":
            monkeypatch.setattr(webdataset, "_scan", None)
            url = there["data__path"]
            for path in (url, f"{url}/0.tar", f"{url}/[0]*.tar"):
                assert webdataset.webdataset(path).files[0] == "0.png"
            assert "0.tar.index.npz" in buckets.names(url)
    finally:
        proxy.every = 0
    broken = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert len(broken) == 3 and len({line.rpartition("/")[2] for line in broken}) == 1, broken
    print(f"{kind}: requests failed:", proxy.failed - failed)


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_outage_of_twenty_seconds_changes_nothing_but_time(bucket, sets, workers, caplog):
    """Catches examples that are replaced, or a job that ends, while a store is away for a while."""
    _, proxy = bucket
    disk, there = sets["webdataset"]
    wanted = data_lib.take(data_lib.config(**disk), 24)
    batches = data_lib.batches(data_lib.config(**there, data__workers=workers, data__prefetch=1))
    found, began = [next(batches)], time.monotonic()
    proxy.answer = 503
    end = threading.Timer(20, lambda: setattr(proxy, "answer", 0))
    end.start()
    try:
        found += [next(batches) for _ in wanted[1:]]
    finally:
        end.join()
    assert time.monotonic() - began > 20
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    said = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert len(said) == 2, said  # the image that is broken, on the disk and in the bucket


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_refuses_ends_the_job_and_replaces_nothing(bucket, sets, workers, caplog):
    """Catches examples that are replaced once the credentials have expired; likewise in the worker
    processes, whose errors must reach the job as one line."""
    _, proxy = bucket
    settings = data_lib.config(**sets["webdataset"][1], data__workers=workers, data__prefetch=1)
    batches = data_lib.batches(settings)
    next(batches)
    caplog.clear()
    proxy.answer = 403
    try:
        with pytest.raises(buckets.StoreError, match="no permission") as caught:
            for _ in range(50):
                next(batches)
    finally:
        proxy.answer = 0
    assert "\n" not in str(caught.value)
    said = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert all(line.endswith("7.png") for line in said), said


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_an_object_that_is_shorter_or_gone_is_an_unreadable_record(bucket, sets):
    """Catches a job that repeats for a quarter of an hour a range that the store refuses."""
    url = f"{bucket[0]}/short"
    buckets.put(url, b"12345")
    assert buckets.read_range(url, 3, 10) == b"45" and buckets.read_range(url, 3, 0) == b""
    began = time.monotonic()
    assert buckets.read_range(url, 100, 10) == b""
    with pytest.raises(FileNotFoundError):
        buckets.read_range(f"{url}-none", 0, 10)
    assert time.monotonic() - began < 10


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
@pytest.mark.parametrize(
    "path, answer, status, words",
    [
        ("buckett/train", 0, process.MISTAKE, "there is no bucket 'buckett'; check its name"),
        ("buckett/*.tar", 0, process.MISTAKE, "there is no bucket 'buckett'; check its name"),
        (f"{stores.BUCKET}/none", 0, process.MISTAKE, "holds no "),
        (f"{stores.BUCKET}/train", 403, process.FAILED, "no permission ("),
        (f"{stores.BUCKET}/train", 503, process.FAILED, "the store does not answer ("),
    ],
)
def test_data_that_cannot_be_read_is_one_line(bucket, run, tmp_path, path, answer, status, words):
    """Catches a page of a library's frames, and a key that is not named."""
    url, proxy = bucket
    url = f"{url.partition(':')[0]}://{path}"
    source = "webdataset" if path.endswith("tar") else "folder"
    argv = killing.arguments(tmp_path / "run", url, data__source=source)
    proxy.answer, began = answer, time.monotonic()
    try:
        found, _, said = run(argv, stderr=tmp_path / "log")
    finally:
        proxy.answer = 0
    print(f"{time.monotonic() - began:.0f} s:", said)
    line = said.splitlines()[-1]
    assert found == status and words in line and f"data.path={url!r}" in line, said
    assert "Traceback" not in said


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_training_from_and_to_a_failing_store_has_the_rows_of_a_disk(bucket, run, sets, tmp_path):
    """Catches a source that trains on other images from a bucket than from a disk."""
    url, proxy = bucket
    few = {"steps": 4, "save_every": 2, "evaluate_every": 2, "log_every": 1}
    disk = tmp_path / "disk"
    argv = killing.arguments(disk, sets["folder"][0]["data__path"], **few)
    status, _, said = run(argv, stderr=tmp_path / "disk.log")
    assert status == 0, said[-3000:]
    for kind in ("folder", "webdataset", "parquet"):
        keys = sets[kind][1]
        argv = killing.arguments(
            f"{url}/{kind}", keys["data__path"], data__source=keys["data__source"], **few
        )
        proxy.every, failed, began = 10, proxy.failed, time.monotonic()
        try:
            status, _, said = run(argv, stderr=tmp_path / f"{kind}.log")
        finally:
            proxy.every = 0
        assert status == 0, said[-3000:]
        spent, failed = time.monotonic() - began, proxy.failed - failed
        print(f"{kind}: {failed} requests failed, {spent:.0f} s")
        there = tmp_path / kind
        buckets.get_folder(f"{url}/{kind}", str(there), buckets.tree(f"{url}/{kind}"))
        rows = killing.rows(there)
        assert len(rows) >= 4 and rows == killing.rows(disk)
