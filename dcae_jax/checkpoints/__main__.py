# SPDX-License-Identifier: Apache-2.0
"""Checks and copies checkpoints of training runs.

    dcae-jax checkpoint check runs/phase1              whether each checkpoint is undamaged
    dcae-jax checkpoint copy runs/phase1 runs/again

The source of a copy is a workdir, all of whose undamaged checkpoints are copied, or one
WORKDIR/checkpoints/STEP.
"""

import logging
import os
import shutil
import sys

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import MachineError, UserError
from dcae_jax.runtime import process


def copy(source: str, workdir: str) -> list[int]:
    """Copies the undamaged checkpoints of a workdir, or one WORKDIR/checkpoints/<step>, with its
    config.json and metrics.jsonl to `workdir`. Returns the steps copied. Raises UserError.
    """
    source, workdir = (os.path.abspath(os.path.expanduser(path)) for path in (source, workdir))
    origin, step = checkpoints.split_path(source)
    steps = checkpoints.saved_steps(source) if step is None else [step]
    if not steps or not set(steps) <= set(checkpoints.saved_steps(origin)):
        raise UserError(f"{source!r} holds no finished checkpoint; name a workdir, or one of them")
    if workdir == origin or (set(steps) & set(checkpoints.saved_steps(workdir))):
        raise UserError(f"{workdir!r} has such a checkpoint already; name another workdir")
    copied = []
    for step in steps:
        here, there = (checkpoints.step_folder(place, step) for place in (origin, workdir))
        try:
            integrity.copy(here, there)
            copied.append(step)
        except ValueError as error:
            logging.warning("not copied, it is damaged: %s (%s)", here, error)
        except OSError:
            if os.path.isdir(here):
                raise
            logging.warning("not copied, its run has removed it meanwhile: %s", here)
    if not copied:
        raise UserError(f"no checkpoint of {source!r} is whole; nothing was copied")
    for name in (checkpoints.CONFIG, files.METRICS):
        if os.path.exists(os.path.join(origin, name)):
            shutil.copyfile(os.path.join(origin, name), os.path.join(workdir, name))
    return copied


def check(workdir: str) -> bool:
    """Whether all checkpoints of a workdir are whole; prints a line for each. Raises UserError."""
    workdir, worst = os.path.expanduser(workdir), ""
    steps = checkpoints.saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir!r} holds no finished checkpoint; name a workdir")
    for step in steps:
        wrong = integrity.damage(checkpoints.step_folder(workdir, step))
        worst = worst or wrong
        sys.stdout.write(f"{step}: {wrong or 'whole'}\n")
    return not worst


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 something is damaged, 2 user error."""
    parser = process.parser("dcae-jax checkpoint", __doc__)
    parser.add_argument("action", choices=("check", "copy"))
    parser.add_argument("source", help="a workdir, or to copy also WORKDIR/checkpoints/STEP")
    parser.add_argument("workdir", nargs="?", help="of `copy`: where to")
    process.set_up_logging()
    try:
        given = parser.parse_args(arguments)
        if (given.action == "copy") != (given.workdir is not None):
            parser.error("check takes one folder, copy takes two")
        if given.action == "check":
            return process.DONE if check(given.source) else process.FAILED
        steps = copy(given.source, given.workdir)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        line = f"not copied ({reason}); see to it and run the same again"
        return process.failure(MachineError(line))
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)
    sys.stdout.write(f"copied and compared: {', '.join(map(str, steps))}\n")
    return process.DONE


if __name__ == "__main__":
    sys.exit(main())
