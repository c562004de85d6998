# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: state and data position together, never half of one.

WORKDIR/checkpoints/<step>/ holds three Orbax items: `weights` (parameters, statistics, averages),
`optimizer` (moments, counters, the running means of the metrics) and `data` (the global index of
the next example). Weights stand apart so that readers need not know the optimizer.
"""

import dataclasses
import logging
import os
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from dcae_jax import report
from dcae_jax.config import UserError
from dcae_jax.models.layers import Weights
from dcae_jax.state import TrainState

CONFIG = "config.json"
FOLDER = "checkpoints"
_WEIGHTS = ("params", "stats", "ema")


def open_manager(workdir: str, keep: int) -> ocp.CheckpointManager:
    """The manager of WORKDIR/checkpoints: asynchronous saves, the newest `keep` kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(
        os.path.join(os.path.abspath(workdir), FOLDER),
        options=options,
        item_names=("weights", "optimizer", "data"),
    )


def save(
    manager: ocp.CheckpointManager, state: TrainState, totals: Any, step: int, index: int
) -> None:
    """Saves in the background; returns when the arrays may be changed again.

    totals: running means of the metrics since the last row. index: the next example's.
    """
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
    manager: ocp.CheckpointManager, step: int, state: TrainState, totals: Any
) -> tuple[TrainState, Any, int]:
    """(state, totals, index) of checkpoint `step`, on the devices that the abstract trees name."""
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


def load_weights(path: str, which: str = "ema") -> tuple[Weights, dict[str, Any]]:
    """(weights by path, configuration) of a workdir, or of one of its checkpoints/<step>.

    which: 'ema', the averages where something was trained, or 'raw'. Arrays are NumPy, float32,
    parameters and statistics together. Raises UserError when there is nothing to load.
    """
    path = os.path.abspath(path)
    match = re.fullmatch(rf"(.*)/{FOLDER}/(\d+)", path)
    workdir, step = (match[1], int(match[2])) if match else (path, None)
    config = report.read_json(os.path.join(workdir, CONFIG))
    if config is None:
        raise UserError(f"init_from={path!r} is no workdir: it has no {CONFIG}")
    steps = saved_steps(workdir)
    if step is None and not steps:
        raise UserError(f"init_from={path!r} has no finished checkpoint yet; let it train first")
    if step is not None and step not in steps:
        raise UserError(f"init_from={path!r} is no finished checkpoint; there are {steps}")
    step = steps[-1] if step is None else step
    items = _read_numpy(os.path.join(workdir, FOLDER, str(step), "weights"))
    weights = {**items["params"], **items["stats"]}
    if which == "ema":
        weights |= items["ema"]
    logging.info("read %s weights of step %d from %s", which, step, workdir)
    return weights, config["config"]


def _read_numpy(path: str) -> dict[str, Any]:
    """An Orbax tree as NumPy arrays, whatever devices it was saved from."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type="np.ndarray"), tree)
        restored = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    return {name: restored.get(name) or {} for name in _WEIGHTS}


def saved_steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints of `workdir`, rising. Unfinished ones have other names."""
    folder = os.path.join(workdir, FOLDER)
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
