# SPDX-License-Identifier: Apache-2.0
"""Checks and copies checkpoints of training runs.

    dcae-jax checkpoint check runs/phase1              whether each checkpoint is undamaged
    dcae-jax checkpoint copy runs/phase1 runs/again

SOURCE is a workdir, all of whose undamaged checkpoints are copied, or one WORKDIR/checkpoints/STEP.
The target must be new or empty; rerun the command to complete an interrupted copy.
"""

import logging
import os
import re
import shutil
import sys

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import MachineError, UserError
from dcae_jax.runtime import lease, process

RECORDS = (checkpoints.CONFIG, files.METRICS)


def copy(source: str, workdir: str) -> list[int]:
    """Copies the undamaged checkpoints of a workdir, or one WORKDIR/checkpoints/<step>, with its
    config.json and metrics.jsonl to `workdir`, whose lease is held meanwhile.

    `workdir` must be new or empty, or hold what an interrupted copy of the same run left, which is
    completed. Returns those of the requested steps that it then has. Raises UserError.
    """
    files.check_local(source, "source")
    files.check_local(workdir, "workdir")
    source, workdir = (files.absolute(path) for path in (source, workdir))
    origin, step = checkpoints.split_path(source)
    steps = checkpoints.saved_steps(source) if step is None else [step]
    if not steps or not set(steps) <= set(checkpoints.saved_steps(origin)):
        raise UserError(
            f"{source!r} has no finished checkpoint; give a workdir or one of its checkpoints"
            f"{_phases(source)}"
        )
    if os.path.realpath(workdir) == os.path.realpath(origin):
        raise UserError(f"{workdir!r} is the source; give another workdir")
    with lease.hold(workdir):
        if wrong := _not_a_copy(origin, workdir):
            raise UserError(f"{workdir!r} {wrong}; give a new or empty folder")
        # Read once, since the run may be writing, and after listing the checkpoints: a run writes a
        # step's row before its checkpoint.
        records = {name: _read(origin, name) for name in RECORDS}
        whole = [step for step in steps if _is_whole(checkpoints.step_folder(origin, step))]
        if not whole:
            raise UserError(f"no checkpoint of {source!r} is undamaged; nothing was copied")
        for name, content in records.items():
            if content:
                files.write_file(os.path.join(workdir, name), content)
        _remove_halves(os.path.join(workdir, checkpoints.FOLDER))
        return [step for step in whole if _copy_step(origin, workdir, step)]


def _phases(path: str) -> str:
    """The workdirs of a chain's phases, for a message; '' if `path` is not a chain's workdir."""
    found = checkpoints.phase_workdirs(path)
    return f": {', '.join(found)}" if found else ""


def _not_a_copy(origin: str, workdir: str) -> str:
    """Why `workdir` is neither empty nor an interrupted copy of `origin`; '' if it is."""
    names = sorted(set(os.listdir(workdir)) - {lease.FILE})
    for name in names:
        if name not in (*RECORDS, checkpoints.FOLDER):
            return f"holds other files ({name})"
        if os.path.islink(os.path.join(workdir, name)):
            return f"has a link ({name})"
    if names and _read(workdir, checkpoints.CONFIG) != _read(origin, checkpoints.CONFIG):
        return f"holds another run ({checkpoints.CONFIG} differs)"
    # The source may have continued since.
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
    """The content of a file, b'' if there is none. Raises UserError for a link out of `folder`."""
    try:
        with open(files.inside(folder, name), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _is_whole(folder: str) -> bool:
    wrong = integrity.damage(folder)
    if wrong:
        _report(folder, wrong)
    return not wrong


def _report(folder: str, wrong: str) -> None:
    why = (
        f"is damaged ({wrong})"
        if os.path.isdir(folder)
        else "was removed by its run during the copy"
    )
    logging.warning("not copied: %s %s", folder, why)


def _remove_halves(folder: str) -> None:
    """Removes partial checkpoints that a killed copy left (STEP.PID.tmp)."""
    for name in files.listdir(folder):
        if re.fullmatch(r"\d+\.\d+\.tmp", name):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # does not follow links


def _copy_step(origin: str, workdir: str, step: int) -> bool:
    """Copies a checkpoint unless it exists; False if it is damaged or has been removed."""
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


def _copy(source: str, workdir: str) -> list[int]:
    try:
        return copy(source, workdir)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise MachineError(f"not copied ({reason}); fix this and rerun the command") from error


def check(workdir: str) -> bool:
    """Whether all checkpoints of a workdir are undamaged; prints a line for each."""
    files.check(workdir, "workdir")
    workdir, worst = os.path.expanduser(workdir), ""
    steps = checkpoints.saved_steps(workdir)
    if not steps:
        raise UserError(
            f"{workdir!r} has no finished checkpoint; give the workdir of a run{_phases(workdir)}"
        )
    for step in steps:
        wrong = integrity.damage(checkpoints.local_step(workdir, step))
        worst = worst or wrong
        sys.stdout.write(f"{step}: {wrong or 'ok'}\n")
    return not worst


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 damage found, 2 user error."""
    parser = process.parser("dcae-jax checkpoint", __doc__)
    parser.add_argument("action", choices=("check", "copy"))
    parser.add_argument("source", help="a workdir; for copy also WORKDIR/checkpoints/STEP")
    parser.add_argument("workdir", nargs="?", help="for copy: the target")
    process.set_up_logging()
    try:
        given = parser.parse_args(arguments)
        if (given.action == "copy") != (given.workdir is not None):
            parser.error("check takes one folder, copy takes two")
        if given.action == "check":
            return process.DONE if check(given.source) else process.FAILED
        steps = _copy(given.source, given.workdir)
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)
    sys.stdout.write(f"copied and verified: {', '.join(map(str, steps))}\n")
    return process.DONE


if __name__ == "__main__":
    sys.exit(main())
