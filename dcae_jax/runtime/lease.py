# SPDX-License-Identifier: Apache-2.0
"""Workdir lease: one job per workdir; a second one is refused, with the owner's host and pid.

On a local folder the lease is a kernel lock (flock, through `filelock`) on WORKDIR/.lock. It ends
with its process, even a killed one; a `.lock` that a crash leaves behind means nothing. For a
bucket see bucket_lease.py.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import re
import socket
import stat
from collections.abc import Iterator

import filelock

from dcae_jax import files
from dcae_jax.errors import UserError
from dcae_jax.runtime import bucket_lease

FILE = ".lock"
# Subfolders of a workdir where jobs write temporary files before renaming them.
FOLDERS = ("images", "diverged", "parts", "reference")
# What jobs write into or append to; none of it may be a link.
OWN = (*FOLDERS, "checkpoints", "damaged", "profile", "metrics.jsonl")
# Errors of file systems without locks (some network and object stores).
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: str, process_index: int = 0) -> Iterator[None]:
    """Keeps other jobs out of `workdir`, which is created if it does not exist.

    process_index: in a distributed run, process 0 takes the lease for all. Raises UserError if
    another job holds it, with its host, process id and start time, or if one of OWN is a link.
    """
    if process_index:
        yield
        return
    if files.is_url(workdir):
        with bucket_lease.hold(workdir):
            yield
        return
    made = not os.path.isdir(workdir)
    os.makedirs(workdir, exist_ok=True)
    try:
        with _file_lock(workdir) as locked:
            for path in (os.path.join(workdir, name) for name in OWN):
                if os.path.islink(path):
                    raise UserError(
                        f"{path} is a link, so this job would write outside its workdir; "
                        "replace it with its target"
                    )
            if locked:
                _clear(workdir)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(workdir)  # if the job was refused before it wrote anything


@contextlib.contextmanager
def _file_lock(workdir: str) -> Iterator[bool]:
    """Holds WORKDIR/.lock; False if the file system has no locks. Raises UserError."""
    path = os.path.join(workdir, FILE)
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            # filelock does not follow a link either, should one appear after this check.
            raise UserError(f"{path} is a link or not a file; remove it and rerun the command")
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{workdir} is in use by {_owner(path)}; stop that job first, or use another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        logging.warning("%s cannot be locked (%s); run only one job in it", workdir, error.strerror)
        yield False
        return
    try:
        _sign(path)
        yield True
    finally:
        # Before releasing the lock: after that, the file may be the next owner's.
        with contextlib.suppress(OSError):
            os.remove(path)
        lock.release()


def _sign(path: str) -> None:
    """Writes this process's identity into the lock file that it holds."""
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    finally:
        os.close(descriptor)


def _owner(path: str) -> str:
    """The owner recorded in the lock file, for a message."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
        finally:
            os.close(descriptor)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # locked, but not written yet
        return "another job"


def holder(workdir: str) -> str:
    """Who holds the lease of `workdir`, for a message; '' if nobody does or it is unknown."""
    import fcntl  # POSIX only

    if files.is_url(workdir):
        return bucket_lease.holder(workdir)
    path = os.path.join(workdir, FILE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # a job that exits removes it
        return ""
    try:
        # A momentary shared lock: nobody locks a file that a crash left behind.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(path)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


def _clear(workdir: str) -> None:
    """Removes temporary files that a killed owner left (NAME.PID.tmp).

    Only in the workdir itself and in its FOLDERS: never through a link, nor in a folder that is
    itself a workdir with a lock.
    """
    _clear_folder(workdir)
    for name in FOLDERS:
        folder = os.path.join(workdir, name)
        if not os.path.lexists(os.path.join(folder, FILE)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _clear_folder(folder, os.O_NOFOLLOW)


def _clear_folder(folder: str, flags: int = 0) -> None:
    """As `_clear`, in one folder. flags: more flags for `os.open`. Skips links."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        with os.scandir(descriptor) as entries:
            halves = [
                entry.name
                for entry in entries
                if re.search(r"\.\d+\.tmp$", entry.name) and entry.is_file(follow_symlinks=False)
            ]
        for name in halves:
            os.remove(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
