# SPDX-License-Identifier: Apache-2.0
"""Two jobs on one workdir in a bucket, where no kernel lock ends with its process."""

import json
import os
import threading
import time

import pytest
from support.memory_store import URL, memory_store

from dcae_jax import files
from dcae_jax.errors import UserError
from dcae_jax.files import buckets
from dcae_jax.runtime import bucket_lease, lease, process


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    for name, seconds in (("RENEW_S", 0.1), ("POLL_S", 0.02), ("EXPIRE_S", 30.0), ("SKEW_S", 1.0)):
        monkeypatch.setattr(bucket_lease, name, seconds)
    with memory_store(monkeypatch, tmp_path) as system:
        yield system


def _lease(number, **changes):
    """Writes the lease of a process on another host."""
    owner = {"host": "elsewhere", "pid": 7, "since": "2026", "token": "x", "renewed": time.time()}
    files.write_json(f"{URL}/{bucket_lease.FOLDER}/{number}", owner | changes)


def test_the_second_is_refused_and_names_the_first():
    """Catches two runs that write each other's checkpoints, and a refusal that helps nobody."""
    assert lease.holder(URL) == ""
    with lease.hold(URL):
        assert lease.holder(URL).startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .* since 20"):
            with lease.hold(URL):
                pass
        assert files.listdir(f"{URL}/{bucket_lease.FOLDER}") == ["1"]
    assert lease.holder(URL) == ""
    with lease.hold(URL):  # released, and its number is not used again
        assert files.listdir(f"{URL}/{bucket_lease.FOLDER}") == ["2"]


@pytest.mark.parametrize(
    "changes, least, most",
    [
        ({}, 3.0, 30.0),  # killed a moment ago
        ({"renewed": time.time() - 3600}, 0.0, 2.5),  # a while ago
        ({"released": True}, 0.0, 2.5),
        (bucket_lease._here() | {"pid": 2**22 + 1}, 0.0, 2.5),  # on this host
    ],
)
def test_a_dead_owner_stands_in_nobodys_way(monkeypatch, changes, least, most):
    """Catches a run that stays refused after a preemption, or waits for what it can know."""
    monkeypatch.setattr(bucket_lease, "EXPIRE_S", 3.0)
    _lease(3, **changes)
    began = time.monotonic()
    with lease.hold(URL):
        assert least <= time.monotonic() - began < most
        assert files.listdir(f"{URL}/{bucket_lease.FOLDER}") == ["4"]


def test_an_owner_that_renews_is_alive_whatever_its_clock_says():
    """Catches a takeover from a host whose clock is late."""
    alive = threading.Event()

    def renew():
        for count in range(400):
            _lease(1, renewed=time.time() - 0.5, count=count)
            if alive.wait(0.05):
                return

    thread = threading.Thread(target=renew)
    _lease(1)
    thread.start()
    try:
        with pytest.raises(UserError, match="is in use by process 7 on elsewhere since 2026"):
            with lease.hold(URL):
                pass
    finally:
        alive.set()
        thread.join()


def test_of_several_that_find_it_free_one_takes_it(monkeypatch):
    """Catches a race after a preemption, of a job's two copies."""
    create, together = buckets.create, threading.Barrier(4)
    monkeypatch.setattr(buckets, "create", lambda *given: (together.wait(60), create(*given))[1])
    held, refused, ended = [], [], threading.Event()

    def take(number):
        try:
            with lease.hold(URL):
                held.append(number)
                ended.wait(10)
        except (UserError, threading.BrokenBarrierError):
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        if len(held) + len(refused) == 4:
            break
        time.sleep(0.02)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3, (held, refused)


def test_an_owner_that_was_cut_off_stops_before_it_writes(monkeypatch, capsys):
    """Catches a host that comes back after an hour and overwrites what its successor wrote."""
    ended = []

    def leave(status):
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(bucket_lease, "RENEW_S", 1000.0)
    monkeypatch.setattr(bucket_lease.os, "_exit", leave)
    with lease.hold(URL):
        files.write_file(f"{URL}/x", b"mine")
        _lease(2)
        monkeypatch.setattr(bucket_lease, "EXPIRE_S", 0.0)
        with pytest.raises(SystemExit):
            files.write_file(f"{URL}/x", b"too late")
        files.write_file(f"{URL}-of-another/x", b"")
    assert ended == [process.FAILED] and files.read_file(f"{URL}/x") == b"mine"
    assert "another job took over this workdir" in capsys.readouterr().err
    # Its last put did not touch the lease that counts.
    newest = json.loads(files.read_file(f"{URL}/{bucket_lease.FOLDER}/2"))
    assert newest["host"] == "elsewhere" and "released" not in newest


def test_a_lease_is_renewed_through_failing_requests(store, monkeypatch):
    """Catches a lease that one failed request ends."""
    monkeypatch.setattr(buckets, "PATIENCE_S", 0.3)
    with lease.hold(URL):
        store.every = 1
        time.sleep(0.5)
        store.every = 0
        path = f"{URL}/{bucket_lease.FOLDER}/1"
        before, ends = files.read_file(path), time.monotonic() + 20
        while files.read_file(path) == before and time.monotonic() < ends:
            time.sleep(0.05)
        assert files.read_file(path) != before
