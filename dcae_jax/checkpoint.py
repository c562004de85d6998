# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: state and data position together, never half of one.

WORKDIR/checkpoints/<step>/ holds three Orbax items: `weights` (parameters, statistics, averages),
`optimizer` (moments, counters, the running means of the metrics) and `data` (the global index of
the next example). Weights stand apart so that readers need not know the optimizer.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dcae_jax import published, report
from dcae_jax.config import UserError
from dcae_jax.models.layers import Weights
from dcae_jax.state import TrainState

CONFIG = "config.json"
FOLDER = "checkpoints"
EXPORT = "model.json"  # of an export
AUTOENCODER = "autoencoder"  # folder of a generator's export: the export of its autoencoder
# What an export says of a diffusion model; `latents` holds the checksum of the encoder.
GENERATOR_KEYS = ("model", "objective", "patch_size", "latents")
_WEIGHTS = ("params", "stats", "ema")

# Of glibc's mallopt, <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MIB = 2**20


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


def load_weights(
    path: str, which: str = "ema", variant: str = "", kind: str = "autoencoder"
) -> tuple[Weights, dict[str, Any]]:
    """(weights by path, configuration) of a workdir or checkpoint, an export, or published weights.

    path: a workdir or one of its checkpoints/<step>, an export of ours, a folder or file of
    PyTorch weights, or their name on the hub. kind: 'autoencoder', or 'generator', a diffusion
    model. The configuration has at least the key `model`, a generator's also `objective`,
    `patch_size` and `autoencoder`; that of a run its `latents`, the manifest without its shards,
    of an export the manifest's `autoencoder` and `encoder_checksum`. which: 'ema', a run's averages
    where something was trained, or 'raw'. variant: what published weights are of, where they do not
    say. Arrays are NumPy, float32, parameters and statistics together. Raises UserError when there
    is nothing to load.
    """
    given, path = path, os.path.abspath(os.path.expanduser(path))
    if os.path.exists(os.path.join(path, EXPORT)):
        return _load_export(path, kind)
    match = re.fullmatch(rf"(.*)/{FOLDER}/(\d+)", path)
    workdir, step = (match[1], int(match[2])) if match else (path, None)
    config = published.read_object(os.path.join(workdir, CONFIG))
    if config is None or "config" not in config:
        if match:
            raise UserError(f"init_from={path!r} is of no workdir: {workdir} has no {CONFIG}")
        there = path if os.path.exists(path) else given
        if kind == "generator":
            return published.read_generator(there, variant)
        weights, model = published.read(there, variant)
        return weights, {"model": model}
    if kind != (saved := "generator" if config["config"]["objective"] else "autoencoder"):
        raise UserError(f"init_from={path!r} holds a run of the kind {saved}; name one of {kind}s")
    steps = saved_steps(workdir)
    if step is None and not steps:
        raise UserError(f"init_from={path!r} has no finished checkpoint yet; let it train first")
    if step is not None and step not in steps:
        raise UserError(f"init_from={path!r} is no finished checkpoint; there are {steps}")
    step = steps[-1] if step is None else step
    weights = _read_numpy(os.path.join(workdir, FOLDER, str(step), "weights"), which)
    logging.info("read %s weights of step %d from %s", which, step, workdir)
    return weights, config["config"] | {"latents": config.get("latents")}


def kind_of(path: str) -> str:
    """'autoencoder' or 'generator': what `load_weights` would find at `path`.

    Of an export the kind that it states, whatever that is. Raises UserError.
    """
    full = os.path.abspath(os.path.expanduser(path))
    export = published.read_object(os.path.join(full, EXPORT))
    if export is not None:
        return str(export.get("kind"))
    workdir = re.sub(rf"/{FOLDER}/\d+$", "", full)
    run = published.read_object(os.path.join(workdir, CONFIG)) or {}
    if "config" in run:
        return "generator" if run["config"]["objective"] else "autoencoder"
    return published.kind_of(full if os.path.exists(full) else path)


def _read_numpy(path: str, which: str) -> Weights:
    """Weights of an Orbax tree as NumPy arrays, whatever devices it was saved from.

    Of a weight and its average only the one that is wanted is read.
    """
    with _little_memory(), _without_warning(), ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        tree = {name: tree.get(name) or {} for name in _WEIGHTS}
        if which != "ema":
            tree["ema"] = {}
        wanted = {
            part: {name: 0 for name in tree[part] if part == "ema" or name not in tree["ema"]}
            for part in _WEIGHTS
        }
        wanted = {part: names for part, names in wanted.items() if names}
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type="np.ndarray"), wanted)
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        restored = reader.restore(path, args=request)
    return {name: value for part in restored.values() for name, value in part.items()}


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Large blocks that are freed meanwhile, or allocated meanwhile and freed later, go back to
    the system at once.

    Orbax decodes arrays in threads. glibc would keep what each frees for that thread's next
    blocks, up to half the size of the weights. With other C libraries nothing is changed.
    """
    allocator = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(allocator, "mallopt"):
        yield
        return
    allocator.mallopt(_MMAP_THRESHOLD, _MIB // 4)
    try:
        yield
    finally:
        # What glibc's own adjustment reaches in a program with arrays as large as weights.
        allocator.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        allocator.mallopt(_TRIM_THRESHOLD, 64 * _MIB)


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Orbax warns that items of a checkpoint have no _CHECKPOINT_METADATA, which none ever has."""
    logger = logging.getLogger("absl")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Metadata file does not exist")

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def save_export(folder: str, weights: Weights, meta: dict[str, Any]) -> None:
    """Writes an export into `folder`, which exists: params/ (Orbax), then model.json."""
    params = os.path.join(os.path.abspath(folder), "params")
    with ocp.StandardCheckpointer() as writer:
        writer.save(params, {"params": dict(weights)})
    report.write_json(os.path.join(folder, EXPORT), meta)


def _load_export(folder: str, kind: str) -> tuple[Weights, dict[str, Any]]:
    """(weights by path, configuration) of an export of ours."""
    meta = published.read_object(os.path.join(folder, EXPORT)) or {}
    if meta.get("kind") != kind:
        found = meta.get("kind")
        raise UserError(f"init_from={folder!r} is no {kind}: {EXPORT} has kind={found!r}")
    params = os.path.join(folder, "params")
    if not os.path.isdir(params):
        raise UserError(f"init_from={folder!r} is an incomplete export: it has no params/")
    weights = _read_numpy(params, "raw")
    logging.info("read the export %s", folder)
    if kind == "generator":
        inner = os.path.join(folder, AUTOENCODER)
        return weights, {k: meta.get(k) for k in GENERATOR_KEYS} | {"autoencoder": inner}
    return weights, {"model": meta["model"]}


def checksum(weights: Weights, parts: tuple[str, ...] = ("",)) -> str:
    """sha256 of the names, shapes and float32 values of weights, in the order of their names.

    parts: only weights whose names begin with one of these. The arrays are ones that this process
    has whole.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name.startswith(parts):
            value = np.asarray(weights[name], np.float32, order="C")
            digest.update(f"{name} {value.shape}\n".encode())
            digest.update(value.data)
    return digest.hexdigest()


def encoder_checksum(weights: Weights) -> str:
    """The checksum of what latents depend on; training of a decoder alone leaves it as it was."""
    return checksum(weights, ("encoder.", "quant_conv."))


def saved_steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints of `workdir`, rising. Unfinished ones have other names."""
    folder = os.path.join(workdir, FOLDER)
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
