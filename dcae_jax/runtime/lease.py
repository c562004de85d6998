# SPDX-License-Identifier: Apache-2.0
"""Workdir lease: one job per workdir; a second one is refused with the owner's name.

`hold` is the whole interface: what keeps the lease of a bucket can take the place of `_file_lock`.
For a local folder it is a kernel lock (flock, through `filelock`) on WORKDIR/.lock. It ends with
its process, whatever that dies of; a `.lock` that a crash leaves behind means nothing.
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

from dcae_jax.errors import UserError

FILE = ".lock"
# Folders of a workdir in which jobs write files beside the name that they are to get.
FOLDERS = ("images", "diverged", "parts")
# What jobs write into or append to, and so may be no link to somewhere else.
OWN = (*FOLDERS, "checkpoints", "damaged", "profile", "reference", "metrics.jsonl")
# What a file system says that has no locks (some network and object stores).
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: str, process_index: int = 0) -> Iterator[None]:
    """Keeps other jobs out of `workdir`, which is made if it is not there.

    process_index: of a distributed run, only process 0 takes the lease, for all of them. Raises
    UserError, naming the owner's host, process id and start, where another job holds it, and where
    one of OWN is a link.
    """
    if process_index:
        yield
        return
    made = not os.path.isdir(workdir)
    os.makedirs(workdir, exist_ok=True)
    try:
        with _file_lock(workdir) as locked:
            for path in (os.path.join(workdir, name) for name in OWN):
                if os.path.islink(path):
                    raise UserError(
                        f"{path} is a link, through which this job would write elsewhere; "
                        "put what it points to in its place"
                    )
            if locked:
                _clear(workdir)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(workdir)  # where the job was refused before it wrote anything


@contextlib.contextmanager
def _file_lock(workdir: str) -> Iterator[bool]:
    """Holds WORKDIR/.lock; False where the file system has no locks. Raises UserError."""
    path = os.path.join(workdir, FILE)
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            # filelock itself follows no link, should one appear between here and there.
            raise UserError(f"{path} is a link or not a file; remove it, then run the same command")
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
        logging.warning("%s cannot be locked (%s): start one job only", workdir, error.strerror)
        yield False
        return
    try:
        _sign(path)
        yield True
    finally:
        # Before the lock ends: a file removed after that could be the next owner's.
        with contextlib.suppress(OSError):
            os.remove(path)
        lock.release()


def _sign(path: str) -> None:
    """Writes into the lock file, which this process holds, whose it is."""
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
    """What the lock file says of its owner, for people."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
        finally:
            os.close(descriptor)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # between its lock and its writing
        return "another job"


def holder(workdir: str) -> str:
    """Who holds the lease of `workdir`, for people; '' if nobody does, or nobody can tell."""
    import fcntl  # of POSIX

    path = os.path.join(workdir, FILE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # a job that ends removes it
        return ""
    try:
        # Shared and for an instant: a file that a crash left behind is locked by nobody.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(path)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


def _clear(workdir: str) -> None:
    """Removes what a killed owner had half written (NAME.PID.tmp).

    Only in the workdir itself and in its FOLDERS: never through a link, nor in a folder that is a
    workdir with a lock of its own.
    """
    _clear_folder(workdir)
    for name in FOLDERS:
        folder = os.path.join(workdir, name)
        if not os.path.lexists(os.path.join(folder, FILE)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _clear_folder(folder, os.O_NOFOLLOW)


def _clear_folder(folder: str, flags: int = 0) -> None:
    """flags: of `os.open`, beside those of a directory; a link that is not followed is left."""
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
