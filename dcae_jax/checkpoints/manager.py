# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: state and data position together, never half of one.

WORKDIR/checkpoints/<step>/ holds three Orbax items: `weights` (parameters, statistics, averages),
`optimizer` (moments, counters, the running means of the metrics) and `data` (the global index of
the next example). Weights stand apart so that readers need not know the optimizer.

    python -m dcae_jax.checkpoints check WORKDIR       whether each checkpoint is whole
    python -m dcae_jax.checkpoints copy SOURCE WORKDIR

SOURCE is a workdir, all of whose whole checkpoints are copied, or one WORKDIR/checkpoints/<step>.
"""

import dataclasses
import functools
import glob
import logging
import mmap
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax.checkpoints import integrity
from dcae_jax.errors import MachineError
from dcae_jax.training.state import TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


CONFIG = "config.json"
FOLDER = "checkpoints"
DAMAGED = "damaged"  # where a run that resumes moves checkpoints that are not whole
_WEIGHTS = ("params", "stats", "ema")


def open_manager(workdir: str, keep: int) -> "ocp.CheckpointManager":
    """The manager of WORKDIR/checkpoints: asynchronous saves, the newest `keep` kept."""
    import orbax.checkpoint as ocp

    folder = os.path.join(os.path.abspath(workdir), FOLDER)
    # Called when the items of a checkpoint are complete and its folder has not yet its name.
    finish = functools.partial(_write_manifest, folder)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            # What a killed process left; the workdir's lock keeps out any other writer.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=finish),
        ),
        item_names=("weights", "optimizer", "data"),
    )


def _write_manifest(folder: str) -> None:
    if jax.process_index() == 0:
        # A folder that an earlier process left unfinished is older.
        unfinished = glob.glob(os.path.join(glob.escape(folder), "*.orbax-checkpoint-tmp*"))
        integrity.write(max(unfinished, key=os.path.getmtime))


def save(
    manager: "ocp.CheckpointManager", state: TrainState, totals: Any, step: int, index: int
) -> None:
    """Saves in the background; returns when the arrays may be changed again.

    totals: running means of the metrics since the last row. index: the next example's.
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
    manager: "ocp.CheckpointManager", step: int, state: TrainState, totals: Any
) -> tuple[TrainState, Any, int]:
    """(state, totals, index) of checkpoint `step`, on the devices that the abstract trees name."""
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
    fields = {**restored["weights"], **restored["optimizer"]["state"]}
    return TrainState(**fields), restored["optimizer"]["totals"], restored["data"]["index"]


def _divide(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state's fields as (weights, everything else)."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    weights = {name: fields.pop(name) for name in _WEIGHTS}
    return weights, fields


def _in_pages(value: np.ndarray) -> np.ndarray:
    """A copy in pages of its own, which go back to the system when it is freed.

    Orbax decodes arrays in threads, each with a heap of its own, of which the C library returns
    little. Left there until they are placed, the weights would take twice their size.
    """
    pages = mmap.mmap(-1, max(value.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, value.dtype, value.size).reshape(value.shape)
    copy[...] = value
    return copy


def saved_steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints of `workdir`, rising. Unfinished ones have other names."""
    folder = os.path.join(workdir, FOLDER)
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def resume_step(workdir: str) -> int | None:
    """The step to resume from: the newest whole checkpoint; None where nothing was saved yet.

    Damaged checkpoints after it are named in the log and moved to WORKDIR/damaged, out of the way
    of those that will be saved again. Every process of a run gets the first one's answer. Raises
    MachineError if there are checkpoints and none is whole.
    """
    found, wrong = -1, {}
    if jax.process_index() == 0:
        for step in reversed(saved_steps(workdir)):
            why = integrity.damage(os.path.join(workdir, FOLDER, str(step)))
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
            f"no checkpoint in {os.path.join(workdir, FOLDER)} is whole ({what}); put a copy of "
            "one there, or start anew in another --workdir"
        )
    for step, why in wrong.items():
        aside = _move_aside(workdir, step)
        logging.warning(
            "checkpoint %d is damaged (%s): moved to %s, going on from step %d",
            step,
            why,
            aside,
            found,
        )
    return None if found == -1 else found


def _move_aside(workdir: str, step: int) -> str:
    folder = os.path.join(workdir, DAMAGED)
    os.makedirs(folder, exist_ok=True)
    aside, number = os.path.join(folder, str(step)), 1
    while os.path.exists(aside):
        aside, number = os.path.join(folder, f"{step}-{number}"), number + 1
    os.rename(os.path.join(workdir, FOLDER, str(step)), aside)
    return aside
