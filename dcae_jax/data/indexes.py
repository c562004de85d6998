# SPDX-License-Identifier: Apache-2.0
"""Index files: what a folder or a tar holds, written once, so that the next start need not list it.

An index is an .npz of arrays. It is a cache: one that is damaged, or cannot be written, is made
anew. Who reads it checks that what it describes is unchanged.
"""

import hashlib
import io
import os
import time
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from dcae_jax import files as files_lib

FORMAT = 1
# A file system's clock is coarse: what changed this recently may change again at the same time.
SETTLED = 2 * 10**9  # ns

Arrays = dict[str, np.ndarray]


def cached(path: str) -> str:
    """Where the index of `path` is in this user's cache."""
    name = hashlib.sha256(files_lib.real(path).encode(errors="surrogateescape")).hexdigest()[:32]
    return os.path.join(files_lib.cache_folder("indexes"), f"{name}.npz")


def read(path: str, *names: str) -> Arrays | None:
    """The arrays `names` of the index `path`; None if there is none, or it is damaged."""
    try:
        data = files_lib.read_file(path)
        if data is None:
            return None
        with np.load(io.BytesIO(data)) as stored:
            known = stored["format"] == FORMAT
            return {name: stored[name] for name in names} if known else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def write(path: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Writes an index, whole or not at all; False where that is impossible, as in a read-only
    folder or bucket, or when another host is writing the same one."""
    buffer = io.BytesIO()
    np.savez(buffer, format=np.int64(FORMAT), **arrays)  # pyright: ignore[reportArgumentType]
    try:
        files_lib.write_file(path, buffer.getvalue())
    except OSError:
        return False
    return True


def settled(times: Sequence[int | None]) -> bool:
    """Whether things last modified at `times` (ns) may be indexed: none was just now."""
    return all(when is not None and when < time.time_ns() - SETTLED for when in times)


def pack(names: Sequence[str]) -> np.ndarray:
    """File names as one array of bytes."""
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), np.uint8)


def unpack(names: np.ndarray) -> tuple[str, ...]:
    """The file names in the array of `pack`."""
    text = os.fsdecode(names.tobytes())
    return tuple(text.split("\0")) if text else ()
