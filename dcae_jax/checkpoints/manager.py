# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: saves and restores training state and data position together.

WORKDIR/checkpoints/<step>/ has three Orbax items: `weights` (parameters, statistics, averages),
`optimizer` (moments, counters, the running means of the metrics) and `data` (the global index of
the next example). Weights are a separate item so that readers need not know the optimizer.
"""

import dataclasses
import functools
import glob
import logging
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax import files
from dcae_jax.checkpoints import integrity, remote
from dcae_jax.config.loading import PHASES
from dcae_jax.errors import MachineError, UserError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")  # training.state.TrainState
Totals = TypeVar("Totals")  # a pytree

CONFIG = "config.json"
FOLDER = "checkpoints"
DAMAGED = "damaged"  # where a resuming run moves damaged checkpoints
SAVE_S, SAVE_AND_COPY_S = 600, 7200  # after which an unfinished save is an error
WEIGHTS = ("params", "stats", "ema")  # the fields of the state in the item `weights`


def open_manager(workdir: str, keep: int) -> "ocp.CheckpointManager":
    """The manager of WORKDIR/checkpoints: asynchronous saves, keeps the newest `keep`."""
    import orbax.checkpoint as ocp

    url = os.path.join(files.absolute(workdir), FOLDER)
    folder = files.spool(url)
    if url != folder and jax.process_index() == 0:
        remote.clear(url)
    for name in files.listdir(folder):  # Orbax deletes old checkpoints
        if os.path.islink(os.path.join(folder, name)):
            raise UserError(f"{os.path.join(folder, name)} is a link; replace it with its target")
    several = url != folder and jax.process_count() > 1
    # Called when the items of a checkpoint are complete, before its folder is renamed.
    finish = functools.partial(_finish, folder, url, keep)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep if url == folder else 1,
            create=not several,  # it is there
            # Left by a killed process; the workdir's lease keeps out any other writer.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_S if url == folder else SAVE_AND_COPY_S,
                post_finalization_callback=finish,
            ),
            multiprocessing_options=_multiprocessing(several),
        ),
        item_names=("weights", "optimizer", "data"),
        item_handlers=_own_disk_handlers() if several else None,
    )


def _multiprocessing(several: bool) -> "ocp.options.MultiprocessingOptions":
    import orbax.checkpoint as ocp

    return ocp.options.MultiprocessingOptions(primary_host=None if several else 0)


def _own_disk_handlers() -> dict[str, Any]:
    """Handlers for processes that each write on a disk of their own.

    Without OCDBT, which has a database per process and merges them on one disk, an array's shards
    are files, so that the files of all processes together are the checkpoint.
    """
    import orbax.checkpoint as ocp

    options = _multiprocessing(several=True)
    arrays = {
        name: ocp.StandardCheckpointHandler(multiprocessing_options=options, use_ocdbt=False)
        for name in ("weights", "optimizer")
    }
    return {**arrays, "data": ocp.JsonCheckpointHandler(multiprocessing_options=options)}


def _finish(folder: str, url: str, keep: int) -> None:
    if jax.process_index() == 0 or url != folder:
        # The newest: an earlier process may have left an unfinished one.
        unfinished = glob.glob(os.path.join(glob.escape(folder), "*.orbax-checkpoint-tmp*"))
        newest = max(unfinished, key=os.path.getmtime)
        integrity.write(newest)
        if url != folder:
            remote.publish(url, int(os.path.basename(newest).split(".")[0]), newest, keep)


def save(
    manager: "ocp.CheckpointManager", state: "DataclassInstance", totals: Any, step: int, index: int
) -> None:
    """Saves in the background; returns when the arrays may be donated again.

    state: a dataclass of arrays, with the fields WEIGHTS among others. totals: running means of the
    metrics since the last row. index: that of the next example.
    """
    import orbax.checkpoint as ocp

    weights, rest = _divide(state)
    manager.save(
        step,
        args=ocp.args.Composite(
            weights=ocp.args.StandardSave(weights),
            optimizer=ocp.args.StandardSave({"state": rest, "totals": totals}),
            data=ocp.args.JsonSave({"index": index}),
        ),
    )


def restore(
    manager: "ocp.CheckpointManager", step: int, state: State, totals: Totals
) -> tuple[State, Totals, int]:
    """(state, totals, index) of checkpoint `step`, with the shardings of the abstract trees."""
    import orbax.checkpoint as ocp

    weights, rest = _divide(state)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            weights=ocp.args.StandardRestore(weights),
            optimizer=ocp.args.StandardRestore({"state": rest, "totals": totals}),
            data=ocp.args.JsonRestore(),
        ),
    )
    optimizer = restored["optimizer"]
    state = dataclasses.replace(state, **restored["weights"], **optimizer["state"])
    return state, optimizer["totals"], restored["data"]["index"]


def _divide(state: "DataclassInstance") -> tuple[dict[str, Any], dict[str, Any]]:
    """The state's fields as (weights, everything else)."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    weights = {name: fields.pop(name) for name in WEIGHTS}
    return weights, fields


def step_folder(workdir: str, step: int) -> str:
    return os.path.join(workdir, FOLDER, str(step))


def local_step(workdir: str, step: int, part: str = "") -> str:
    """The folder of a checkpoint; of one in a bucket, a copy in the cache. part: of that one alone.

    For readers of weights: a resuming run fetches its checkpoint by `resume_step`.
    """
    wanted = (f"{part}/", integrity.FILE) if part else ("",)
    return files.local(step_folder(workdir, step), lambda name: name.startswith(wanted))


def split_path(path: str) -> tuple[str, int | None]:
    """(WORKDIR, step) of the path of a checkpoint; (path, None) of any other."""
    match = re.fullmatch(rf"(.*)/{FOLDER}/(\d+)", path)
    return (match[1], int(match[2])) if match else (path, None)


def phase_workdirs(path: str) -> list[str]:
    """The workdirs of the phases in the workdir of a chain; [] if `path` is not one."""
    phases = [os.path.join(path, phase) for phase in PHASES]
    return [phase for phase in phases if files.exists(os.path.join(phase, CONFIG))]


def saved_steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints of `workdir`, ascending.

    Unfinished ones have non-numeric names, or in a bucket no manifest.
    """
    if files.is_url(workdir):
        return remote.steps(f"{workdir}/{FOLDER}")
    names = files.listdir(os.path.join(workdir, FOLDER))
    return sorted(int(name) for name in names if name.isdecimal())


def resume_step(workdir: str) -> int | None:
    """The step to resume from: the newest undamaged checkpoint; None if nothing was saved yet.

    Newer, damaged ones are logged and moved to WORKDIR/damaged, since the run will save their steps
    again. Process 0 decides for all processes. Raises MachineError if all checkpoints are damaged.
    From a bucket, the checkpoint is fetched.
    """
    found, wrong = -1, {}
    if jax.process_index() == 0:
        for step in reversed(saved_steps(workdir)):
            why = integrity.damage(_fetched(workdir, step))
            if not why:
                found = step
                break
            wrong[step] = why
        if found < 0 and wrong:
            found = -2
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        what = "; ".join(f"{step}: {why}" for step, why in wrong.items()) or "see process 0"
        raise MachineError(
            f"no checkpoint in {os.path.join(workdir, FOLDER)} is undamaged ({what}); restore "
            "one from a copy, or start over in another --workdir"
        )
    for step, why in wrong.items():
        aside = _move_aside(workdir, step)
        logging.warning(
            "checkpoint %d is damaged (%s): moved to %s, resuming from step %d",
            step,
            why,
            aside,
            found,
        )
    if found >= 0 and files.is_url(workdir):
        _fetched(workdir, found)  # on every process
        if jax.process_count() > 1:  # no other wait has a minute's limit then
            multihost_utils.sync_global_devices("checkpoint fetched")
    return None if found == -1 else found


def _fetched(workdir: str, step: int) -> str:
    folder = step_folder(workdir, step)
    return remote.fetch(folder) if files.is_url(folder) else folder


def _move_aside(workdir: str, step: int) -> str:
    folder = os.path.join(workdir, DAMAGED)
    names, name, number = files.listdir(folder), str(step), 1
    while name in names:
        name, number = f"{step}-{number}", number + 1
    aside = os.path.join(folder, name)
    if files.is_url(workdir):
        remote.move_aside(step_folder(workdir, step), aside)
    else:
        os.makedirs(folder, exist_ok=True)
        os.rename(step_folder(workdir, step), aside)
    return aside
