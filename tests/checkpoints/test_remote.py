# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a bucket: a put of the manifest commits one, and damage is found as on a disk."""

import functools
import os

import pytest
from support.memory_store import URL, memory_store

from dcae_jax import files
from dcae_jax.checkpoints import integrity, remote
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import MachineError
from dcae_jax.files import buckets

FOLDER = f"{URL}/checkpoints"


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    with memory_store(monkeypatch, tmp_path / "cache") as system:
        yield system


@pytest.fixture
def local(tmp_path):
    """Makes a finished checkpoint on this disk -> its folder."""

    def make(step):
        folder = tmp_path / str(step)
        for name in ("weights/d/a", "optimizer/b", "data/metadata", "_CHECKPOINT_METADATA"):
            files.write_file(str(folder / name), f"{step} {name}".encode())
        integrity.write(str(folder))
        return str(folder)

    return make


def test_the_newest_are_kept_and_come_back_whole(local):
    """Catches a bucket that fills up, and a checkpoint that lost a file on the way."""
    for step in (2, 4, 6):
        remote.publish(FOLDER, step, local(step), keep=2)
    assert checkpoints.saved_steps(URL) == [4, 6]
    assert not [name for name in files.sizes(FOLDER) if name.startswith("2/")]
    assert checkpoints.resume_step(URL) == 6
    there = os.path.join(files.spool(FOLDER), "6")
    assert sorted(files.walk(there)) == sorted(files.walk(local(6))) and not integrity.damage(there)
    part = checkpoints.local_step(URL, 4, "weights")
    assert sorted(files.walk(part)) == [integrity.FILE, "weights/d/a"]
    assert not integrity.damage(part, "weights")


def test_a_file_that_a_store_cut_is_not_committed(local, monkeypatch):
    """Catches a checkpoint that counts, and is found damaged when it is needed."""
    put = buckets.put_file

    def cut(url, path):
        buckets.put(url, b"4") if url.endswith("b") else put(url, path)

    monkeypatch.setattr(buckets, "put_file", cut)
    with pytest.raises(buckets.StoreError, match="4/optimizer/b has 1 of 13 bytes after its"):
        remote.publish(FOLDER, 4, local(4), keep=3)
    assert checkpoints.saved_steps(URL) == []


@pytest.mark.parametrize("files_put", range(5))
def test_an_upload_cut_short_does_not_count_and_is_removed(local, monkeypatch, files_put):
    """Catches a checkpoint that counts before its last file, and rubbish that nobody removes."""
    remote.publish(FOLDER, 2, local(2), keep=3)
    count = iter(range(100))

    def killed(put, *given):
        if next(count) == files_put:
            raise KeyboardInterrupt
        put(*given)

    for name in ("put_file", "put"):  # a file, the manifest
        monkeypatch.setattr(buckets, name, functools.partial(killed, getattr(buckets, name)))
    monkeypatch.setattr(buckets, "AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        remote.publish(FOLDER, 4, local(4), keep=3)
    assert checkpoints.saved_steps(URL) == [2] and checkpoints.resume_step(URL) == 2
    remote.clear(FOLDER)
    assert {name.split("/")[0] for name in files.sizes(FOLDER)} == {"2"}


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda path: buckets.put(path, b"4 weights/d/A"), "does not match its checksum"),
        (lambda path: buckets.put(path, b"4"), "has 1 of 13 bytes"),
        (buckets.remove, "is missing"),
    ],
)
def test_a_damaged_one_is_moved_and_the_one_before_is_used(local, caplog, damage, said):
    """Catches a flipped bit that a run resumes from, and the evidence lost."""
    for step in (2, 4):
        remote.publish(FOLDER, step, local(step), keep=3)
    damage(f"{FOLDER}/4/weights/d/a")
    assert checkpoints.resume_step(URL) == 2
    assert said in caplog.text and f"moved to {URL}/damaged/4" in caplog.text
    assert checkpoints.saved_steps(URL) == [2]
    assert files.exists(f"{URL}/damaged/4/optimizer/b")
    assert not os.path.exists(os.path.join(files.spool(FOLDER), "4"))
    remote.publish(FOLDER, 4, local(4), keep=3)  # its step is saved again
    assert checkpoints.resume_step(URL) == 4


def test_if_all_are_damaged_nothing_is_touched(local):
    """Catches a run that starts over in place of one that could be repaired."""
    remote.publish(FOLDER, 2, local(2), keep=3)
    buckets.put(f"{FOLDER}/2/optimizer/b", b"x")
    before = files.sizes(URL)
    with pytest.raises(MachineError, match=f"no checkpoint in {FOLDER} is undamaged .2: optimizer"):
        checkpoints.resume_step(URL)
    assert files.sizes(URL) == before


def test_sizes_are_compared_without_reading(local, store):
    """Catches a status that fetches gigabytes."""
    remote.publish(FOLDER, 2, local(2), keep=3)
    before = store.requests
    assert integrity.damage(f"{FOLDER}/2") == "" and store.requests - before == 2
    buckets.put(f"{FOLDER}/2/weights/d/a", b"4")
    assert integrity.damage(f"{FOLDER}/2") == "weights/d/a has 1 of 13 bytes"
