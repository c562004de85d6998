# SPDX-License-Identifier: Apache-2.0
"""Integrity of checkpoints: a manifest with the size and checksum of every file.

Orbax detects missing and truncated files, but not a flipped bit in an array. The manifest is
written into each checkpoint before the rename that finishes it, and verified before a restore.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator

from dcae_jax import files as files_lib

FILE = "manifest.json"
# Orbax writes these after the manifest; restoring does not depend on them.
_LATER = ("commit_success.txt", "_CHECKPOINT_METADATA", FILE)
_CHUNK = 2**22


def write(folder: str) -> None:
    """Flushes the files below `folder` to disk, then writes their manifest into it."""
    files = {name: _measure(os.path.join(folder, name), sync=True) for name in _names(folder)}
    files_lib.write_json(os.path.join(folder, FILE), {"checksum": "crc32", "files": files})


def damage(folder: str, part: str = "") -> str:
    """What is wrong with the files of `folder`, in a few words; '' if they match the manifest.

    part: a subfolder to check alone; '' checks them all. Of a URL, sizes are compared and nothing
    is read but the manifest.
    """
    try:
        data = files_lib.read_file(os.path.join(folder, FILE))
        if data is None:
            return f"{FILE} is missing"
        files = json.loads(data)["files"]
        wanted = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FILE} is unreadable"
    found = files_lib.sizes(folder) if files_lib.is_url(folder) else {}
    for name, (size, checksum) in sorted(wanted.items()):
        if part and not name.startswith(f"{part}/"):
            continue
        if files_lib.is_url(folder):
            if found.get(name) != size:
                return f"{name} has {found.get(name, 0)} of {size} bytes"
            continue
        path = os.path.join(folder, *name.split("/"))
        inside = os.path.realpath(folder)
        if os.path.commonpath((inside, os.path.realpath(path))) != inside:
            return f"{name[:80]} is outside the checkpoint"
        if not os.path.isfile(path):
            return f"{name} is missing"
        if os.path.getsize(path) != size:
            return f"{name} has {os.path.getsize(path)} of {size} bytes"
        try:
            actual = _measure(path)["crc32"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != checksum:
            return f"{name} does not match its checksum"
    return ""


def copy(source: str, target: str) -> None:
    """Copies the folder `source` to `target`; `target` appears only once the copy is verified.

    Raises ValueError with a short reason if the copy is damaged, e.g. because the source is, or if
    the source has links, which are not followed.
    """
    with files_lib.atomic_folder(target) as beside:
        shutil.copytree(source, beside, symlinks=True, dirs_exist_ok=True)
        for parent, folders, names in os.walk(beside):
            if links := [n for n in (*folders, *names) if os.path.islink(os.path.join(parent, n))]:
                raise ValueError(f"{links[0][:80]} is a link")
        for name in _names(beside):
            _measure(os.path.join(beside, name), sync=True)
        if wrong := damage(beside):
            raise ValueError(wrong)


def _names(folder: str) -> Iterator[str]:
    """Paths of all files below `folder`, relative to it, with '/'."""
    for parent, _, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        for name in sorted(names):
            if inside != "." or name not in _LATER:
                yield os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")


def _measure(path: str, sync: bool = False) -> dict[str, int]:
    """{'bytes': size, 'crc32': checksum} of a file, flushed to disk first with `sync`."""
    checksum = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": checksum}
