# SPDX-License-Identifier: Apache-2.0
"""The lease of a workdir in a bucket: objects WORKDIR/.lease/<number>, of which the highest counts.

A job takes the lease with a conditional put of the next number, which one of several wins, and
renews it every RENEW_S seconds. One that was not renewed for EXPIRE_S seconds has expired. Numbers
are not used again, so an owner that was cut off can only write an object that counts no more.
"""

import contextlib
import datetime
import json
import logging
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dcae_jax import files
from dcae_jax.errors import UserError
from dcae_jax.files import buckets
from dcae_jax.runtime import process

FOLDER = ".lease"
RENEW_S = 15.0
EXPIRE_S = 60.0
POLL_S = 2.0  # while a lease may be about to expire
SKEW_S = 60.0  # that the clocks of two hosts may differ

Owner = dict[str, Any]


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
    """Holds the lease. Raises UserError if another job renews it. Ends the process if it is lost:
    the machine was cut off for so long that another job took over."""
    lease = _Lease(workdir)
    thread = threading.Thread(target=lease.keep, daemon=True)
    thread.start()
    buckets.before_put.append(lease.confirm)
    try:
        yield
    finally:
        buckets.before_put.remove(lease.confirm)
        lease.ended.set()
        thread.join(RENEW_S)
        with contextlib.suppress(buckets.StoreError):  # then it expires
            lease.put(released=True)


class _Lease:
    """The lease of this process. `keep` runs in a thread of its own."""

    def __init__(self, workdir: str):
        self._workdir, self.ended = workdir, threading.Event()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._owner: Owner = _here() | {"since": now, "token": secrets.token_hex(8)}
        self._number = _take(workdir, self._content(renewed=time.time()))
        self._confirmed = time.monotonic()
        for number in _numbers(workdir):
            if number < self._number:
                buckets.remove(_url(workdir, number))

    def _content(self, **more: Any) -> bytes:
        return json.dumps(self._owner | more).encode()

    def put(self, **more: Any) -> None:
        url = _url(self._workdir, self._number)
        buckets.put(url, self._content(**more), patience=RENEW_S, guarded=False)

    def keep(self) -> None:
        """Renews the lease until the job has ended."""
        while not self.ended.wait(RENEW_S):
            try:
                self._look()
                self.put(renewed=time.time())
            except buckets.StoreError as error:
                logging.warning("%s", error)

    def confirm(self, url: str) -> None:
        """Before `url` is put: asks whether the lease is still held, unless that is certain."""
        if url.startswith(f"{self._workdir}/") and time.monotonic() - self._confirmed > EXPIRE_S:
            self._look()

    def _look(self) -> None:
        if max(_numbers(self._workdir), default=0) > self._number:
            text = "another job took over this workdir, since this one could not reach it for long"
            sys.stderr.write(f"error: {self._workdir}: {text}\n")
            sys.stderr.flush()
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(process.FAILED)
        self._confirmed = time.monotonic()


def _take(workdir: str, content: bytes) -> int:
    """Puts `content` as the next number, once the last lease is released or has expired.

    Raises UserError if its owner lives.
    """
    while True:
        number = max(_numbers(workdir), default=0)
        _await_end(workdir, number)
        if buckets.create(_url(workdir, number + 1), content):
            return number + 1


def _await_end(workdir: str, number: int) -> None:
    """Returns once the lease `number` has ended. Raises UserError if it is renewed meanwhile."""
    first, asked = buckets.read(_url(workdir, number)), time.monotonic()
    owner = _parse(first)
    if _has_ended(owner):
        return
    logging.info(
        "%s is in use by %s: waiting for %.0f s at most whether it lives",
        workdir,
        describe(owner),
        EXPIRE_S,
    )
    while time.monotonic() - asked < EXPIRE_S:
        time.sleep(POLL_S)
        now = buckets.read(_url(workdir, number))
        if _has_ended(_parse(now)):
            return
        if now != first:
            raise UserError(
                f"{workdir} is in use by {describe(owner)}; stop that job first, or use another "
                "--workdir"
            )


def _has_ended(owner: Owner) -> bool:
    """Whether an owner is known to hold its lease no more."""
    if not owner or owner.get("released"):
        return True
    if time.time() - owner.get("renewed", 0) > EXPIRE_S + SKEW_S:
        return True
    here = _here()
    if any(owner.get(key) != here[key] for key in ("host", "system")):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, PermissionError):
        pass
    return False


def holder(workdir: str) -> str:
    """Who holds the lease, for a message; '' if nobody does."""
    owner = _parse(buckets.read(_url(workdir, max(_numbers(workdir), default=0))))
    return "" if _has_ended(owner) else describe(owner)


def describe(owner: Owner) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _parse(content: bytes | None) -> Owner:
    """The owner that an object records; {} if there is none, or it is damaged."""
    with contextlib.suppress(ValueError):
        found = json.loads(content or b"")
        return found if isinstance(found, dict) else {}
    return {}


def _here() -> Owner:
    """This process. system: in which process numbers mean something."""
    system = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        system = f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    return {"host": socket.gethostname(), "pid": os.getpid(), "system": system}


def _numbers(workdir: str) -> list[int]:
    return [int(name) for name in files.listdir(f"{workdir}/{FOLDER}") if name.isdecimal()]


def _url(workdir: str, number: int) -> str:
    return f"{workdir}/{FOLDER}/{number}"
