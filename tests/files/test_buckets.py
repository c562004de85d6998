# SPDX-License-Identifier: Apache-2.0
"""A URL in place of a folder: the same files, whole or not at all, whatever requests fail."""

import os
import shutil
import time

import pytest
from support.memory_store import URL

from dcae_jax import errors, files
from dcae_jax.errors import UserError
from dcae_jax.files import buckets, copies, parts


def _use(root):
    """What jobs do with a workdir -> what they see of it."""
    files.check_folder(root)
    seen = [files.read_rows(root), files.read_json(f"{root}/config.json"), files.listdir(root)]
    files.write_json(f"{root}/config.json", {"a": 1})
    for step in (1, 2, 3):
        files.append_row(root, step, {"loss": float("nan") if step == 2 else 0.5 * step})
    files.merge_row(root, 2, {"psnr": 20.0})
    files.drop_rows_after(root, 2)
    files.write_file(f"{root}/images/a.png", b"png")
    for part in ("0.npy", "1.npy"):
        with files.atomic(f"{root}/parts/{part}") as beside, open(beside, "wb") as file:
            file.write(b"part")
    with pytest.raises(KeyError), files.atomic(f"{root}/config.json") as beside:
        with open(beside, "wb") as file:
            file.write(b"half")
        raise KeyError
    with files.atomic_folder(f"{root}/export") as beside:
        files.write_json(os.path.join(beside, "model.json"), {})
        files.write_file(os.path.join(beside, "params", "d", "x"), b"123")
    files.remove(f"{root}/parts/0.npy")
    files.remove(f"{root}/parts/0.npy")
    there = ("", "config.json", "export", "export/params/d", "parts/0.npy", "none", "none/none")
    for path in (f"{root}/{name}".rstrip("/") for name in there):
        seen += [files.exists(path), files.isdir(path), len(files.listdir(path))]
    seen += [files.size(f"{root}/config.json"), files.size(f"{root}/none"), files.sizes(root)]
    seen += [files.read_rows(root), files.read_object(f"{root}/config.json")]
    seen += [files.read_file(f"{root}/images/a.png"), files.read_file(f"{root}/none")]
    with open(files.local(f"{root}/images/a.png"), "rb") as file:
        seen.append(file.read())
    return seen + [sorted(files.walk(files.local(f"{root}/export")))]


@pytest.mark.parametrize("every", [0, 2, 3])
def test_a_bucket_holds_what_a_folder_does_whatever_requests_fail(
    store, tmp_path, monkeypatch, every
):
    """Catches an operation that a URL does otherwise, and a request that is not repeated."""
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    store.every = every
    assert _use(URL) == _use(str(tmp_path / "run"))
    assert not os.listdir(copies._own_folder(os.getpid())), "rubbish is left in the cache"


def test_an_upload_cut_short_is_marked_and_its_json_comes_last(store, monkeypatch):
    """Catches half an export that a reader takes for a whole one."""
    put, seen = buckets.put_file, []
    monkeypatch.setattr(
        buckets, "put_file", lambda url, path: (seen.append(files.listdir(URL)), put(url, path))
    )
    with files.atomic_folder(URL) as beside:
        files.write_json(os.path.join(beside, "model.json"), {})
        files.write_file(os.path.join(beside, "params", "x"), b"")
    assert seen == [[files.INCOMPLETE], [files.INCOMPLETE, "params"]]
    assert files.listdir(URL) == ["model.json", "params"] and not files.is_free(URL)


def test_what_was_left_incomplete_is_replaced(store, monkeypatch):
    """Catches a killed export that stands in the way of its own repetition, or mixes with it."""
    assert files.is_free(URL)
    files.write_file(f"{URL}/{files.INCOMPLETE}", b"")
    files.write_file(f"{URL}/old.safetensors", b"")
    assert files.is_free(URL)
    with files.atomic_folder(URL) as beside:
        files.write_json(os.path.join(beside, "model.json"), {})
    assert files.listdir(URL) == ["model.json"]


def test_a_store_that_stays_away_is_one_line(store, monkeypatch):
    """Catches a job that hangs for ever, or ends with a page of a library's frames."""
    monkeypatch.setattr(buckets, "PATIENCE_S", 0.6)
    store.every = 1
    with pytest.raises(buckets.StoreError) as caught:
        files.write_file(f"{URL}/x", b"")
    said = errors.explain(caught.value)
    assert said.startswith(f"{URL}/x: the store does not answer (connection reset); check")
    assert "\n" not in said and store.requests > 1


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError("Access Denied"), "no permission (Access Denied); "),
        (OSError("Forbidden: https://x\nno"), "no permission (Forbidden: https://x no); "),
        (ValueError("Invalid bucket name"), "Invalid bucket name; check the name of the bucket"),
    ],
)
def test_a_refusal_is_one_line_at_once(store, error, said):
    """Catches a job that repeats for a quarter of an hour what can never succeed."""
    store.every, store.error = 1, error
    with pytest.raises(buckets.StoreError) as caught:
        files.check_folder(URL)
    assert said in errors.explain(caught.value) and store.requests == 1


def test_a_bucket_that_does_not_exist_is_one_line(store):
    """Catches a misspelt name that is found out after minutes of work."""
    store.every, store.error = 1, FileNotFoundError("bucket/run/x")
    with pytest.raises(UserError, match="there is no bucket 'bucket'; check its name"):
        files.check_folder(URL)


@pytest.mark.parametrize("lost", [False, True])
def test_of_two_that_create_an_object_one_does(store, monkeypatch, lost):
    """Catches a conditional put that replaces, and one whose own success, answered to nobody,
    looks like another's."""
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    if lost:  # done, but the answer is not
        store.store.pipe_file(f"{URL}/x", b"one")
    assert buckets.create(f"{URL}/x", b"one")
    assert not buckets.create(f"{URL}/x", b"two")
    assert buckets.read(f"{URL}/x") == b"one"


def test_a_copy_is_fetched_once_per_version(store):
    """Catches a fetch for each reader, a stale copy, and half a copy left by a kill."""
    files.write_file(f"{URL}/d/a", b"1")
    files.write_file(f"{URL}/d/b", b"2")
    first = files.local(f"{URL}/d", lambda name: name != "b")
    assert os.path.basename(first) == "d" and os.listdir(first) == ["a"]
    before = store.requests
    assert files.local(f"{URL}/d/", lambda name: name != "b") == first
    assert store.requests - before == 2  # its description, its tree
    store.store.rm_file(f"{URL}/d/a")
    files.write_file(f"{URL}/d/a", b"new")
    second = files.local(f"{URL}/d", lambda name: name != "b")
    with open(os.path.join(second, "a"), "rb") as file:
        assert second != first and file.read() == b"new"
    assert files.local(f"{URL}/none") == f"{URL}/none"


def test_what_killed_processes_left_in_the_cache_is_removed(store):
    """Catches a disk that fills up with the checkpoints of killed runs."""
    own = copies._own_folder(os.getpid())
    host = os.path.basename(own).rpartition("-")[0]
    root = os.path.dirname(own)
    for name in (f"{host}-{2**22 + 1}", f"{host}-{os.getppid()}", "other-1"):
        os.makedirs(os.path.join(root, name, "checkpoints"), exist_ok=True)
    copies._own_folder.cache_clear()
    copies._own_folder(os.getpid())
    left = {f"{host}-{os.getpid()}", f"{host}-{os.getppid()}", "other-1"}
    assert set(os.listdir(root)) == left


@pytest.mark.parametrize("url", ["gs:/bucket/run", "https://host/run", "gs://", "S3://bucket"])
def test_a_url_of_another_kind_is_one_line(url):
    """Catches a local folder called 'gs:'."""
    with pytest.raises(UserError, match="is a URL of no known kind; give gs://BUCKET/FOLDER"):
        files.check(url, "--workdir")


def test_parts_of_an_object_are_read_as_of_a_file(store, tmp_path):
    """Catches a byte too many or too few, a read that stops short of what was asked, and a reader
    that asks for every 8 KB."""
    content = bytes(range(256)) * 400
    path = str(tmp_path / "x")
    for place in (path, f"{URL}/x"):
        files.write_file(place, content)
        for first, size in ((0, 3), (100, 100_000), (102_399, 10), (102_400, 10), (5, 0)):
            assert files.read_part(place, first, size) == content[first : first + size]
        with files.opened(place, len(content)) as file:
            seen = [file.read(1000), file.seek(50_000), file.read(10), file.tell(), file.seek(0)]
            assert seen == [content[:1000], 50_000, content[50_000:50_010], 50_010, 0]
            assert file.seek(-3, os.SEEK_END) == 102_397 and file.read() == content[-3:]
    reader, before = parts.Reader(f"{URL}/x", len(content)), store.requests
    assert reader.read(70_000) == content[:70_000] and reader.read() == content[70_000:]
    assert reader.read(5) == b"" and store.requests - before == 2


def test_copies_that_nobody_used_for_a_month_go_when_another_comes(store):
    """Catches a cache that grows for ever, and one that removes what a process reads."""
    for name in "abcdef":
        files.write_file(f"{URL}/{name}", name.encode())
    a, b, c, d = (files.local(f"{URL}/{name}") for name in "abcd")
    for path in (a, b, c, d):
        os.utime(path, (1e9, 1e9))
        os.utime(os.path.dirname(path), (time.time(), 1e9))  # listed now, by this very search
    files.local(f"{URL}/b")  # asked for again
    os.utime(c, (time.time(), 1e9))  # read by a run that asked for it long ago
    copies._own_copies.clear()  # of other processes, but for d
    copies._own_copies.add(os.path.dirname(d))
    e = files.local(f"{URL}/e")
    assert [os.path.exists(path) for path in (a, b, c, d, e)] == [False, True, True, True, True]


def test_a_lease_that_cannot_be_renewed_makes_no_other_request_impatient(store, monkeypatch):
    """Catches a run that ends after seconds of an outage since a short request failed before."""
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(buckets, "FIRST_S", 0.0)
    files.write_file(f"{URL}/x", b"1")
    store.every = 1
    with pytest.raises(buckets.StoreError):
        buckets.put(f"{URL}/.lease/1", b"", patience=0.0)
    monkeypatch.setattr(buckets, "PATIENCE_S", 0.6)
    before = store.requests
    with pytest.raises(buckets.StoreError):
        files.read_file(f"{URL}/x")
    assert store.requests - before > 1


@pytest.mark.parametrize("parent", [None, "the job"])
def test_the_first_request_is_impatient_in_a_job_alone(store, monkeypatch, parent):
    """Catches a job that waits a quarter of an hour for a misspelt name, and a reader process that
    ends its job since it began during an outage."""
    monkeypatch.setattr(buckets.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(buckets, "FIRST_S", 0.0)
    monkeypatch.setattr(buckets, "PATIENCE_S", 0.6)
    buckets._answered.discard("memory")
    store.every = 1
    with pytest.raises(buckets.StoreError):
        files.read_file(f"{URL}/x")
    assert (store.requests > 1) == (parent is not None)


def test_threads_that_fetch_at_once_share_the_process_own_folder(store, monkeypatch):
    """Catches a thread that removes the folder which another one has just begun to use."""
    listdir = os.listdir
    monkeypatch.setattr(copies.os, "listdir", lambda path: time.sleep(0.05) or listdir(path))
    for name in "abcd":
        files.write_file(f"{URL}/{name}", b"1")
    copies._own_folder.cache_clear()
    os.makedirs(copies.cache_folder("spool"), exist_ok=True)
    shutil.rmtree(copies.cache_folder("spool"))
    found = files.local_files([f"{URL}/{name}" for name in "abcd"])
    assert all(os.path.exists(path) for path in found)
