# SPDX-License-Identifier: Apache-2.0
"""One job a workdir: the second is refused, and told who is there.

The lock is the kernel's (flock), on WORKDIR/.lock. It ends with its process, whatever that dies
of, so that nothing has to be cleaned up after a crash; the file itself may stay and means nothing.
Of the processes of a distributed run, the first holds it for all.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator

from dcae_jax.config import UserError

FILE = ".lock"
# What a file system says that knows no locks (some network and object stores).
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: str, process: int = 0) -> Iterator[None]:
    """Keeps other jobs out of `workdir`, which is made if it is not there.

    process: this process's number in a distributed run; only number 0 takes the lock. Raises
    UserError, naming the owner's host, process id and start, where another job holds it.
    """
    if process:
        yield
        return
    made = not os.path.isdir(workdir)
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, FILE)
    descriptor = _take(path, workdir)
    try:
        _clear(workdir)
        yield
    finally:
        # Before the lock ends: a file removed after that could be the next owner's.
        with contextlib.suppress(OSError):
            os.remove(path)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(workdir)  # where the job was refused before it wrote anything


def _take(path: str, workdir: str) -> int:
    """The descriptor of the locked file. Raises UserError if it is locked already."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise UserError(
                f"{workdir} is in use by {_describe(owner)}; stop that job first, or use another "
                "--workdir"
            ) from None
        except OSError as error:
            if error.errno not in _UNABLE:
                os.close(descriptor)
                raise
            logging.warning("%s cannot be locked (%s): start one job only", workdir, error.strerror)
        # The owner before may have removed the file between our open and our lock.
        if _is_at(descriptor, path):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def _clear(workdir: str) -> None:
    """Removes what an owner that was killed had half written, beside the file it was to become."""
    for folder in (workdir, *(entry.path for entry in os.scandir(workdir) if entry.is_dir())):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if re.search(r"\.\d+\.tmp$", name) and os.path.isfile(path):
                os.remove(path)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _describe(text: str) -> str:
    """What a lock file says of its owner, for people."""
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # between its lock and its writing
        return "another job"
