# SPDX-License-Identifier: Apache-2.0
"""Checks and copies checkpoints of training runs.

    python -m dcae_jax.checkpoints check WORKDIR       whether each checkpoint is undamaged
    python -m dcae_jax.checkpoints copy SOURCE WORKDIR

SOURCE is a workdir, all of whose undamaged checkpoints are copied, or one WORKDIR/checkpoints/STEP.
The target must be new or empty; a copy that was interrupted is completed by the same command.
"""

import argparse
import logging
import os
import re
import shutil
import sys

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import UserError
from dcae_jax.runtime import lease

RECORDS = (checkpoints.CONFIG, files.METRICS)


def copy(source: str, workdir: str) -> list[int]:
    """Copies the undamaged checkpoints of a workdir, or one WORKDIR/checkpoints/<step>, with its
    config.json and metrics.jsonl to `workdir`, whose lease is held meanwhile.

    `workdir` must be new or empty, or hold what an interrupted copy of the same run left, which is
    completed. Returns the steps that it then has of those asked for. Raises UserError.
    """
    source, workdir = (os.path.abspath(os.path.expanduser(path)) for path in (source, workdir))
    origin, step = checkpoints.split_path(source)
    steps = checkpoints.saved_steps(source) if step is None else [step]
    if not steps or not set(steps) <= set(checkpoints.saved_steps(origin)):
        raise UserError(f"{source!r} holds no finished checkpoint; name a workdir, or one of them")
    if os.path.realpath(workdir) == os.path.realpath(origin):
        raise UserError(f"{workdir!r} is the source itself; name another workdir")
    with lease.hold(workdir):
        if wrong := _not_a_copy(origin, workdir):
            raise UserError(f"{workdir!r} {wrong}; name a new or empty folder")
        # Read once, since the run may be writing, and after the list of checkpoints, each of which
        # has its row before it is saved.
        records = {name: _read(origin, name) for name in RECORDS}
        whole = [step for step in steps if _is_whole(checkpoints.step_folder(origin, step))]
        if not whole:
            raise UserError(f"no checkpoint of {source!r} is whole; nothing was copied")
        for name, content in records.items():
            if content:
                files.write_file(os.path.join(workdir, name), content)
        _remove_halves(os.path.join(workdir, checkpoints.FOLDER))
        return [step for step in whole if _copy_step(origin, workdir, step)]


def _not_a_copy(origin: str, workdir: str) -> str:
    """Why `workdir` is neither empty nor what an interrupted copy of `origin` left; '' if it is."""
    names = sorted(set(os.listdir(workdir)) - {lease.FILE})
    for name in names:
        if name not in (*RECORDS, checkpoints.FOLDER):
            return f"holds other files ({name})"
        if os.path.islink(os.path.join(workdir, name)):
            return f"has a link ({name})"
    if names and _read(workdir, checkpoints.CONFIG) != _read(origin, checkpoints.CONFIG):
        return f"holds another run ({checkpoints.CONFIG} differs)"
    # The source may have gone on since.
    if not _read(origin, files.METRICS).startswith(_read(workdir, files.METRICS)):
        return f"holds another run ({files.METRICS} differs)"
    for step in set(checkpoints.saved_steps(workdir)) & set(checkpoints.saved_steps(origin)):
        here, there = (checkpoints.step_folder(place, step) for place in (origin, workdir))
        if _read(here, integrity.FILE) != _read(there, integrity.FILE):
            return f"holds another run (checkpoint {step} differs)"
        if wrong := integrity.damage(there):
            return f"has a damaged checkpoint {step} ({wrong})"
    return ""


def _read(folder: str, name: str) -> bytes:
    """The content of a file, b'' if there is none."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _is_whole(folder: str) -> bool:
    wrong = integrity.damage(folder)
    if wrong:
        _report(folder, wrong)
    return not wrong


def _report(folder: str, wrong: str) -> None:
    why = f"is damaged ({wrong})" if os.path.isdir(folder) else "was removed by its run meanwhile"
    logging.warning("not copied: %s %s", folder, why)


def _remove_halves(folder: str) -> None:
    """Removes checkpoints that a killed copy had half written (STEP.PID.tmp)."""
    for name in files.listdir(folder):
        if re.fullmatch(r"\d+\.\d+\.tmp", name):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # follows no link


def _copy_step(origin: str, workdir: str, step: int) -> bool:
    """Copies a checkpoint that is not there yet; False if it is damaged, or gone meanwhile."""
    here, there = (checkpoints.step_folder(place, step) for place in (origin, workdir))
    if os.path.isdir(there):
        return True
    try:
        integrity.copy(here, there)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and os.path.isdir(here):
            raise
        _report(here, str(error))
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 something is damaged, 2 user error."""
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
    if flags.command == "copy":
        try:
            steps = copy(flags.source, flags.workdir)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            sys.stderr.write(f"error: not copied ({reason}); see to it and run the same again\n")
            return 1
        sys.stdout.write(f"copied and compared: {', '.join(map(str, steps))}\n")
        return 0
    worst, workdir = 0, os.path.expanduser(flags.workdir)
    steps = checkpoints.saved_steps(workdir)
    if not steps:
        sys.stderr.write(f"error: {workdir!r} holds no finished checkpoint; name a workdir\n")
        return 2
    for step in steps:
        wrong = integrity.damage(checkpoints.step_folder(workdir, step))
        worst = max(worst, bool(wrong))
        sys.stdout.write(f"{step}: {wrong or 'whole'}\n")
    return worst


if __name__ == "__main__":
    sys.exit(main())
