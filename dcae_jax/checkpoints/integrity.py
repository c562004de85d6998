# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is still what was written: sizes and checksums of its files, kept in it.

Orbax notices a file that is missing or cut, but reads a flipped bit in an array as if nothing had
happened. A manifest is written into each checkpoint before it gets its name, and is compared
before anything is restored.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

from dcae_jax import files as files_lib

FILE = "manifest.json"
# Orbax writes these after the manifest, and reads nothing from them that matters.
_LATER = ("commit_success.txt", "_CHECKPOINT_METADATA", FILE)
_CHUNK = 2**22


def write(folder: str) -> None:
    """Writes the manifest of the files below `folder` into it; they are on the disk before."""
    files = {name: _measure(os.path.join(folder, name), sync=True) for name in _names(folder)}
    files_lib.write_json(os.path.join(folder, FILE), {"checksum": "crc32", "files": files})


def damage(folder: str, part: str = "") -> str:
    """What is wrong with the files of `folder`, in a few words; '' if they are as written.

    part: a folder inside, which is looked at alone.
    """
    try:
        with open(os.path.join(folder, FILE), encoding="utf-8") as file:
            files = json.load(file)["files"]
        wanted = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FILE} is unreadable"
    for name, (size, checksum) in sorted(wanted.items()):
        if part and not name.startswith(f"{part}/"):
            continue
        path = os.path.join(folder, *name.split("/"))
        inside = os.path.realpath(folder)
        if os.path.commonpath((inside, os.path.realpath(path))) != inside:
            return f"{name[:80]} is outside of it"
        if not os.path.isfile(path):
            return f"{name} is missing"
        if os.path.getsize(path) != size:
            return f"{name} has {os.path.getsize(path)} of {size} bytes"
        try:
            found = _measure(path)["crc32"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != checksum:
            return f"{name} has another checksum than when it was written"
    return ""


def copy(source: str, target: str) -> None:
    """Copies the folder `source` to `target`, which gets its name when the copy is proved whole.

    Raises ValueError, in a few words, if the source or the copy is damaged.
    """
    with files_lib.atomic_folder(target) as beside:
        shutil.copytree(source, beside, dirs_exist_ok=True)
        for name in _names(beside):
            _measure(os.path.join(beside, name), sync=True)
        wrong = damage(source) or damage(beside)
        if wrong:
            raise ValueError(wrong)


def _names(folder: str) -> Iterator[str]:
    """Paths of all files below `folder`, relative to it, with '/'."""
    for parent, _, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        for name in sorted(names):
            if inside != "." or name not in _LATER:
                yield os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")


def _measure(path: str, sync: bool = False) -> dict[str, Any]:
    """{'bytes': size, 'crc32': checksum} of a file; with `sync` it is on the disk afterwards."""
    checksum = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": checksum}
