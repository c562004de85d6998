# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a workdir in a bucket.

Orbax writes and reads them on a local disk; finished ones are copied file by file, the manifest of
their checksums last. A checkpoint in a bucket counts once it has its manifest: that put commits it.
docs/storage.md says why Orbax does not write to the bucket itself.
"""

import logging
import os
import shutil

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.files import buckets


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
    """Copies the local checkpoint `folder` to PARENT/<step> and commits it; keeps the newest."""
    names = [name for name in files.walk(folder) if name != integrity.FILE]
    buckets.put_folder(f"{parent}/{step}", folder, names, last=integrity.FILE)
    for old in steps(parent)[:-keep]:
        buckets.remove_folder(f"{parent}/{old}", first=integrity.FILE)


def clear(parent: str) -> None:
    """Removes unfinished checkpoints that a killed process left in PARENT."""
    for name in set(files.listdir(parent)) - {str(step) for step in steps(parent)}:
        buckets.remove_folder(f"{parent}/{name}")


def move_aside(folder: str, aside: str) -> None:
    """Moves a damaged checkpoint from one URL to another, and forgets its local copy."""
    buckets.move_folder(folder, aside, first=integrity.FILE)
    parent, step = folder.rsplit("/", 1)
    shutil.rmtree(os.path.join(files.spool(parent), step), ignore_errors=True)
