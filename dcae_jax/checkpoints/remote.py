# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a workdir in a bucket.

Orbax writes and reads them on a local disk; finished ones are copied file by file, the manifest of
their checksums last. A checkpoint in a bucket counts once it has its manifest: that put commits it.
Each of several processes copies the files that it wrote; process 0 commits them all.
docs/storage.md says why Orbax does not write to the bucket itself.
"""

import logging
import os
import shutil
import time
from typing import Any

import jax

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.errors import MachineError
from dcae_jax.files import buckets

PART = "manifest-{}.json"  # of a process other than 0, until the checkpoint is committed
PARTS_S = 1800.0  # that process 0 waits for the others


def steps(folder: str) -> list[int]:
    """Steps of the finished checkpoints in `folder`, a URL, ascending."""
    numbers = sorted(int(name) for name in files.listdir(folder) if name.isdecimal())
    return [step for step in numbers if files.exists(f"{folder}/{step}/{integrity.FILE}")]


def fetch(folder: str) -> str:
    """Copies the checkpoint `folder`, a URL, beside those that Orbax writes; returns its path.

    Whether it is whole is for `integrity.damage` to say.
    """
    parent, step = folder.rsplit("/", 1)
    here = os.path.join(files.spool(parent), step)
    if not os.path.isdir(here):
        found = buckets.tree(folder)
        logging.info("fetching %s, %.1f MB", folder, sum(f["size"] for f in found.values()) / 1e6)
        with files.atomic_folder(here) as beside:
            buckets.get_folder(folder, beside, found)
    return here


def publish(parent: str, step: int, folder: str, keep: int) -> None:
    """Copies the local checkpoint `folder` to PARENT/<step> and commits it; keeps the newest.

    All processes call this with what they wrote; process 0 commits when the others are done.
    """
    url, manifest = f"{parent}/{step}", os.path.join(folder, integrity.FILE)
    names = [name for name in files.walk(folder) if name != integrity.FILE]
    if jax.process_index():
        buckets.put_folder(url, folder, names)
        buckets.put_file(f"{url}/{PART.format(jax.process_index())}", manifest)
        return
    parts = [f"{url}/{PART.format(process)}" for process in range(1, jax.process_count())]
    others = _await_all(parts)
    buckets.put_folder(url, folder, names)  # its copy of a file that several wrote is the last
    own = files.read_json(manifest)
    for other in others:
        own["files"] = other["files"] | own["files"]
    found = files.sizes(url)
    for name, entry in own["files"].items():
        if found.get(name) != entry["bytes"]:
            what = f"{found.get(name, 0)} of {entry['bytes']} bytes after its upload"
            raise buckets.StoreError(f"{url}/{name} has {what}; rerun the command")
    files.write_json(f"{url}/{integrity.FILE}", own)
    for part in parts:
        buckets.remove(part)
    for old in steps(parent)[:-keep]:
        buckets.remove_folder(f"{parent}/{old}", first=integrity.FILE)


def _await_all(parts: list[str]) -> list[dict[str, Any]]:
    """The manifests of the other processes, when all are there. Raises MachineError."""
    ends = time.monotonic() + PARTS_S
    found: dict[str, Any] = {}
    while missing := [part for part in parts if part not in found]:
        found |= {part: data for part in missing if (data := files.read_json(part)) is not None}
        if len(found) < len(parts):
            if time.monotonic() > ends:
                raise MachineError(f"{missing[0]} did not come; see the log of that process")
            time.sleep(0.5)
    return [found[part] for part in parts]


def clear(parent: str) -> None:
    """Removes unfinished checkpoints that a killed process left in PARENT."""
    for name in set(files.listdir(parent)) - {str(step) for step in steps(parent)}:
        buckets.remove_folder(f"{parent}/{name}")


def move_aside(folder: str, aside: str) -> None:
    """Moves a damaged checkpoint from one URL to another, and forgets its local copy."""
    buckets.move_folder(folder, aside, first=integrity.FILE)
    parent, step = folder.rsplit("/", 1)
    shutil.rmtree(os.path.join(files.spool(parent), step), ignore_errors=True)
