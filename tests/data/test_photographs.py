# SPDX-License-Identifier: Apache-2.0
"""The list of photographs that `configs/phase1.py:small` trains on; the pictures are not here."""

import csv
import importlib.util
import os
import pathlib

from dcae_jax.data import sources

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_photographs_are_held_out_by_the_rule_alone():
    """Catches a photograph moved between training and held out after a run, a name that two share,
    and one that models of the source `photos` have seen among the held-out ones."""
    spec = importlib.util.spec_from_file_location("photos", BENCHMARKS / "photos.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with open(BENCHMARKS / "photos.csv", encoding="utf-8", newline="") as file:
        photos = list(csv.DictReader(file))
    held = [photo for photo in photos if photo["held_out"] == "yes"]
    assert held == [photo for photo in photos if script.held_out(photo)]
    assert len({(photo["package"], photo["title"]) for photo in photos}) == len(photos)
    files = {os.path.basename(photo["file"]) for photo in held}
    assert files >= {name for _, name in sources.HELD_OUT_PHOTOS}
    assert not files & {name for _, name in sources.PHOTOS}
    assert all(photo["author"] and photo["licence"] for photo in photos)
    assert "gnome-backgrounds" not in {photo["package"] for photo in photos}
