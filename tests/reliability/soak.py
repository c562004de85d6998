# SPDX-License-Identifier: Apache-2.0
"""Kills training runs until `--kills` are reached, and compares each with one that was not killed.

    python tests/reliability/soak.py [--kills=200] [--seed=0]

Prints what was killed where, and ends with status 1 at the first bit that differs.
"""

import argparse
import collections
import logging
import pathlib
import random
import shutil
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent)]
import conftest  # noqa: E402, F401  sets the environment of the processes
import killing  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    rng = random.Random(flags.seed)
    hit, began, runs = collections.Counter(), time.time(), 0
    forks = killing.Forks()
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        data = killing.pictures(folder / "pictures")
        whole = folder / "whole"
        status, _, said = forks(killing.arguments(whole, data), stderr=folder / "whole.log")
        assert status == 0, said
        killed = 0
        while killed < flags.kills:
            workdir = folder / f"run{runs}"
            argv = killing.arguments(workdir, data)
            found = killing.survive(forks, argv, workdir, min(5, flags.kills - killed), rng)
            killing.assert_same(whole, workdir)
            shutil.rmtree(workdir)
            hit.update(found)
            runs += 1
            aside = ("finished before", "left half a checkpoint")
            killed = sum(count for place, count in hit.items() if place not in aside)
            sys.stdout.write(f"{killed} kills, {runs} runs, all equal: {dict(hit)}\n")
            sys.stdout.flush()
    forks.close()
    sys.stdout.write(f"{time.time() - began:.0f} s\n")


if __name__ == "__main__":
    main()
