# SPDX-License-Identifier: Apache-2.0
"""Kills jobs until `--kills` are reached, and compares each with one that was not killed.

    python tests/reliability/soak.py [--kills=200] [--seed=0]

Of four jobs two, on average, are trainings, one encodes and one samples. Prints what was killed
where, and ends with status 1 at the first bit that differs.
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

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import conftest  # noqa: E402, F401  sets the environment of the processes
from support import killing  # noqa: E402

ASIDE = ("finished before", "left half a checkpoint")  # no kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    rng = random.Random(flags.seed)
    hit, began, runs, killed = collections.Counter(), time.time(), 0, 0
    forks = killing.Forks()
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        data = killing.pictures(folder / "pictures")
        commands = killing.commands(folder) | {"train": None}
        for job, command in commands.items():
            argv = _argv(command, folder / job, data)
            status, _, said = forks(argv, stderr=folder / f"{job}.log")
            assert status == 0, said
        while killed < flags.kills:
            job = rng.choice(("train", "train", "encode", "sample"))
            workdir = folder / f"run{runs}"
            argv = _argv(commands[job], workdir, data)
            if job == "train":
                found = killing.survive(forks, argv, workdir, min(5, flags.kills - killed), rng)
                killing.assert_same(folder / job, workdir)
            else:
                found = killing.survive_job(forks, job, argv, workdir, rng)
                assert killing.files(folder / job) == killing.files(workdir), job
            shutil.rmtree(workdir)
            hit.update(found)
            runs += 1
            killed = sum(count for place, count in hit.items() if place not in ASIDE)
            sys.stdout.write(
                f"{killed} kills, {runs} runs, all equal: {dict(sorted(hit.items()))}\n"
            )
            sys.stdout.flush()
    forks.close()
    sys.stdout.write(f"{time.time() - began:.0f} s\n")


def _argv(command, workdir, data):
    """The command line of a job; None stands for training."""
    if command is None:
        return killing.arguments(workdir, data)
    return [*command, f"--workdir={workdir}"]


if __name__ == "__main__":
    main()
