# SPDX-License-Identifier: Apache-2.0
"""Local copies of objects, for libraries that read and write files only.

`local` fetches objects into the user's cache, once per version; what was not used for KEPT_S goes
when something new is fetched. `spool` is a folder for a run's files on their way to a bucket; it
belongs to this process and ends with it.
"""

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dcae_jax.files import buckets


def cache_folder(name: str) -> str:
    """The folder `name` in this user's cache, which need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "dcae_jax", name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


# --- on their way to a bucket ---------------------------------------------------------------------


_one_at_a_time = threading.Lock()


def _own() -> str:
    """The folder of this process in the cache."""
    with _one_at_a_time:
        return _own_folder(os.getpid())


@functools.cache
def _own_folder(process: int) -> str:
    """HOST-PROCESS in the cache, new; those that killed processes of this host left are removed."""
    root, host = cache_folder("spool"), socket.gethostname()
    os.makedirs(root, exist_ok=True)
    for name in os.listdir(root):
        theirs, _, number = name.rpartition("-")
        if theirs == host and number.isdecimal() and not _lives(int(number), process):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    folder = os.path.join(root, f"{host}-{process}")
    os.makedirs(folder)
    atexit.register(_end, folder, process)
    return folder


def _lives(number: int, own: int) -> bool:
    """Whether a process has this number, but for a predecessor of this one."""
    if number == own:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end(folder: str, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def spool(path: str) -> str:
    """The folder `path`; for a URL, a local folder of this process in its place."""
    if not buckets.is_url(path):
        return path
    folder = os.path.join(_own(), _digest(path))
    os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A new local folder, removed at the end of the block."""
    with tempfile.TemporaryDirectory(dir=_own()) as folder:
        yield folder


# --- from a bucket --------------------------------------------------------------------------------

KEPT_S = 30 * 24 * 3600.0  # that a copy outlives its last use

_own_copies: set[str] = set()  # folders in the cache that this process has asked for


def local_files(paths: Sequence[str]) -> list[str]:
    """`local` of each of several files, some at the same time."""
    with ThreadPoolExecutor(buckets.AT_ONCE) as pool:
        return list(pool.map(local, paths))


def local(path: str, keep: Callable[[str], bool] = lambda name: True) -> str:
    """The path; for the URL of an object or a folder, that of a copy in the user's cache.

    keep: of a folder, copies only the objects whose relative path it accepts. A URL without any
    object is returned as it is, so that the reader reports it.
    """
    if not buckets.is_url(path):
        return path
    path = path.rstrip("/")
    found = buckets.info(path)
    if found is None:
        return path
    objects, is_folder = {}, found["type"] == "directory"
    if is_folder:
        objects = {name: value for name, value in buckets.tree(path).items() if keep(name)}
    key = _digest(path + buckets.version(objects or found))
    entry = os.path.join(cache_folder("objects"), key)
    copy = os.path.join(entry, os.path.basename(path))
    _own_copies.add(entry)
    if os.path.exists(entry):
        os.utime(entry)
    if os.path.exists(copy):
        return copy
    _remove_unused()
    size = sum(int(value["size"]) for value in (objects.values() if is_folder else [found]))
    logging.info("fetching %s, %.1f MB, to %s", path, size / 1e6, copy)
    with scratch() as folder:
        beside = os.path.join(folder, "copy")
        if is_folder:
            os.mkdir(beside)
            buckets.get_folder(path, beside, objects)
        else:
            buckets.get(path, beside)
        os.makedirs(entry, exist_ok=True)
        try:
            os.replace(beside, copy)
        except OSError:
            if not os.path.exists(copy):  # else another process was faster
                raise
    return copy


def _remove_unused() -> None:
    """Removes copies that no process used for KEPT_S: neither asked for, nor read in a long run."""
    root = cache_folder("objects")
    for entry in (os.path.join(root, name) for name in _listed(root)):
        if entry not in _own_copies and time.time() - _last_used(entry) > KEPT_S:
            logging.info("removing %s, not used for long", entry)
            shutil.rmtree(entry, ignore_errors=True)


def _listed(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _last_used(entry: str) -> float:
    """When a copy was last asked for, or a file of it read; of folders, this walk is the reader."""
    used = [os.stat(entry).st_mtime]
    for parent, _, names in os.walk(entry):
        used += [os.stat(os.path.join(parent, name)).st_atime for name in names]
    return max(used)
