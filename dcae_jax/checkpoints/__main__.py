# SPDX-License-Identifier: Apache-2.0
"""Checks and copies checkpoints of training runs.

    python -m dcae_jax.checkpoints check WORKDIR       whether each checkpoint is undamaged
    python -m dcae_jax.checkpoints copy SOURCE WORKDIR

SOURCE is a workdir, all of whose undamaged checkpoints are copied, or one WORKDIR/checkpoints/STEP.
"""

import argparse
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


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 something is damaged, 2 user error.

    Ctrl-C: 130."""
    parser = argparse.ArgumentParser(
        "python -m dcae_jax.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("workdir")
    copying = commands.add_parser("copy")
    copying.add_argument("source")
    copying.add_argument("workdir")
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _check(flags.workdir) if flags.command == "check" else _copy(flags)
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)


def _copy(flags: argparse.Namespace) -> int:
    try:
        steps = copy(flags.source, flags.workdir)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise MachineError(f"not copied ({reason}); see to it and run the same again") from error
    sys.stdout.write(f"copied and compared: {', '.join(map(str, steps))}\n")
    return 0


def _check(workdir: str) -> int:
    worst, workdir = 0, os.path.expanduser(workdir)
    steps = checkpoints.saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir!r} holds no finished checkpoint; name a workdir")
    for step in steps:
        wrong = integrity.damage(checkpoints.step_folder(workdir, step))
        worst = max(worst, bool(wrong))
        sys.stdout.write(f"{step}: {wrong or 'whole'}\n")
    return worst


if __name__ == "__main__":
    sys.exit(main())
