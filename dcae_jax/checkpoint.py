# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: state and data position together, never half of one.

WORKDIR/checkpoints/<step>/ holds three Orbax items: `weights` (parameters, statistics, averages),
`optimizer` (moments, counters, the running means of the metrics) and `data` (the global index of
the next example). Weights stand apart so that readers need not know the optimizer.

    python -m dcae_jax.checkpoint check WORKDIR       whether each checkpoint is whole
    python -m dcae_jax.checkpoint copy SOURCE WORKDIR

SOURCE is a workdir, all of whose whole checkpoints are copied, or one WORKDIR/checkpoints/<step>.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import logging
import math
import mmap
import os
import pathlib
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax import config as config_lib
from dcae_jax import host_memory, integrity, published, report
from dcae_jax.config import MachineError, UserError
from dcae_jax.models.layers import Weights
from dcae_jax.state import TrainState

if TYPE_CHECKING:  # a tenth of a second, which readers of other formats need not wait for
    import orbax.checkpoint as ocp

CONFIG = "config.json"
FOLDER = "checkpoints"
DAMAGED = "damaged"  # where a run that resumes moves checkpoints that are not whole
EXPORT = "model.json"  # of an export
# Bytes of arrays decoded together. Orbax reads at once whatever it is asked for, and holds what is
# stored of each array beside what it becomes.
READ_AT_ONCE = 2**25
MOST_EXPANSION = 1000  # what zstd makes of weights that are all equal
AUTOENCODER = "autoencoder"  # folder of a generator's export: the export of its autoencoder
# What an export says of a diffusion model; `latents` holds the checksum of the encoder.
GENERATOR_KEYS = ("model", "objective", "patch_size", "latents")
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
    config = report.read_object(report.inside(workdir, CONFIG))
    if config is None or "config" not in config:
        if match:
            raise UserError(f"init_from={path!r} is of no workdir: {workdir} has no {CONFIG}")
        there = path if os.path.exists(path) else given
        if kind == "generator":
            return published.read_generator(there, variant)
        weights, model = published.read(there, variant)
        return weights, {"model": model}
    model = _model_in(os.path.join(workdir, CONFIG), config["config"])
    if kind != (saved := "generator" if config["config"].get("objective") else "autoencoder"):
        raise UserError(f"init_from={path!r} holds a run of the kind {saved}; name one of {kind}s")
    steps = saved_steps(workdir)
    if step is None and not steps:
        raise UserError(f"init_from={path!r} has no finished checkpoint yet; let it train first")
    if step is not None and step not in steps:
        raise UserError(f"init_from={path!r} is no finished checkpoint; there are {steps}")
    step = _whole_step(workdir, steps) if step is None else step
    wrong = _damage(os.path.join(workdir, FOLDER, str(step)), "weights")
    if wrong:
        raise UserError(f"init_from={path!r} is damaged: {wrong}; name another checkpoint")
    weights = _read_numpy(os.path.join(workdir, FOLDER, str(step), "weights"), which)
    logging.info("read %s weights of step %d from %s", which, step, workdir)
    return weights, config["config"] | {"model": model, "latents": config.get("latents")}


def _whole_step(workdir: str, steps: list[int]) -> int:
    """The newest of `steps` whose weights are whole. Raises UserError if none is."""
    wrong = {}
    for step in reversed(steps):
        wrong[step] = _damage(os.path.join(workdir, FOLDER, str(step)), "weights")
        if not wrong[step]:
            return step
        logging.warning("checkpoint %d of %s is damaged: %s", step, workdir, wrong[step])
    what = "; ".join(f"{step}: {text}" for step, text in wrong.items())
    raise UserError(f"init_from={workdir!r} has no whole checkpoint ({what}); use a copy of it")


def _damage(folder: str, part: str = "") -> str:
    """As integrity.damage, of weights; those that older versions wrote are let pass."""
    if not os.path.exists(os.path.join(folder, integrity.FILE)):
        logging.warning("%s has no %s: its weights are read unchecked", folder, integrity.FILE)
        return ""
    return integrity.damage(folder, part)


def kind_of(path: str) -> str:
    """'autoencoder' or 'generator': what `load_weights` would find at `path`.

    Of an export the kind that it states, whatever that is. Raises UserError.
    """
    full = os.path.abspath(os.path.expanduser(path))
    export = report.read_object(os.path.join(full, EXPORT))
    if export is not None:
        return str(export.get("kind"))
    workdir = re.sub(rf"/{FOLDER}/\d+$", "", full)
    run = report.read_object(os.path.join(workdir, CONFIG)) or {}
    if "config" in run:
        return "generator" if run["config"].get("objective") else "autoencoder"
    return published.kind_of(full if os.path.exists(full) else path)


def _read_numpy(path: str, which: str) -> Weights:
    """Weights of an Orbax tree as NumPy arrays, whatever devices it was saved from.

    Of a weight and its average only the one that is wanted is read. Raises UserError.
    """
    import orbax.checkpoint as ocp

    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            return _read_tree(reader, path, which)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no readable checkpoint ({reason}); use a copy of it") from error


def _read_tree(reader: "ocp.PyTreeCheckpointHandler", path: str, which: str) -> Weights:
    import orbax.checkpoint as ocp
    from etils import epath

    folder = epath.Path(path)
    tree = reader.metadata(folder).tree
    tree = {name: tree.get(name) or {} for name in _WEIGHTS}
    # A few bytes of JSON can claim any shape, which would be filled with zeros.
    claimed = sum(math.prod(leaf.shape) for part in tree.values() for leaf in part.values()) * 4
    stored = sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
    if claimed > MOST_EXPANSION * stored + 2**30:
        raise UserError(f"{path} has {stored} bytes and claims arrays of {claimed}; do not use it")
    if which != "ema":
        tree["ema"] = {}
    wanted = [
        (part, name, math.prod(leaf.shape) * 4)
        for part in _WEIGHTS
        for name, leaf in tree[part].items()
        if part == "ema" or name not in tree["ema"]
    ]
    found: Weights = {}
    while wanted:
        now: dict[str, dict[str, int]] = {}
        size = 0
        while wanted and (not now or size + wanted[-1][2] <= READ_AT_ONCE):
            part, name, more = wanted.pop()
            now.setdefault(part, {})[name] = 0
            size += more
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type="np.ndarray"), now)
        request = ocp.args.PyTreeRestore(item=now, restore_args=args, partial_restore=True)
        restored = reader.restore(folder, args=request)
        for values in restored.values():
            for name in list(values):
                found[name] = _in_pages(values.pop(name))
                host_memory.trim()
    return found


def _in_pages(value: np.ndarray) -> np.ndarray:
    """A copy in pages of its own, which go back to the system when it is freed.

    Orbax decodes arrays in threads, each with a heap of its own, of which the C library returns
    little. Left there until they are placed, the weights would take twice their size.
    """
    pages = mmap.mmap(-1, max(value.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, value.dtype, value.size).reshape(value.shape)
    copy[...] = value
    return copy


def save_export(folder: str, weights: Weights, meta: dict[str, Any]) -> None:
    """Writes an export into `folder`, which exists: params/ (Orbax), then model.json."""
    import orbax.checkpoint as ocp

    params = os.path.join(os.path.abspath(folder), "params")
    with ocp.StandardCheckpointer() as writer:
        writer.save(params, {"params": dict(weights)})
    integrity.write(params)
    report.write_json(os.path.join(folder, EXPORT), meta)


def _load_export(folder: str, kind: str) -> tuple[Weights, dict[str, Any]]:
    """(weights by path, configuration) of an export of ours."""
    meta = report.read_object(report.inside(folder, EXPORT)) or {}
    if meta.get("kind") != kind:
        found = meta.get("kind")
        raise UserError(f"init_from={folder!r} is no {kind}: {EXPORT} has kind={found!r}")
    params = os.path.join(folder, "params")
    if not os.path.isdir(params):
        raise UserError(f"init_from={folder!r} is an incomplete export: it has no params/")
    wrong = _damage(params)
    if wrong:
        raise UserError(f"init_from={folder!r} is a damaged export: {wrong}; export it again")
    model = _model_in(os.path.join(folder, EXPORT), meta)
    weights = _read_numpy(params, "raw")
    logging.info("read the export %s", folder)
    if kind == "generator":
        inner = report.inside(folder, AUTOENCODER)
        kept = {k: meta.get(k) for k in GENERATOR_KEYS}
        return weights, kept | {"autoencoder": inner, "model": model}
    return weights, {"model": model}


def _model_in(path: str, config: Any) -> dict[str, Any]:
    """config.model of the JSON file `path`, which has `config`. Raises UserError."""
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(f"{path} names no model; it is of no run or export")
    try:
        return config_lib.saved_model(config["model"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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


# --- the command ----------------------------------------------------------------------------------


def copy(source: str, workdir: str) -> list[int]:
    """Copies a workdir's whole checkpoints, or one WORKDIR/checkpoints/<step>, and its config.json
    and metrics.jsonl, to `workdir`. Returns the steps copied. Raises UserError.
    """
    source, workdir = (os.path.abspath(os.path.expanduser(path)) for path in (source, workdir))
    match = re.fullmatch(rf"(.*)/{FOLDER}/(\d+)", source)
    origin = match[1] if match else source
    steps = [int(match[2])] if match else saved_steps(source)
    if not steps or not set(steps) <= set(saved_steps(origin)):
        raise UserError(f"{source!r} holds no finished checkpoint; name a workdir, or one of them")
    if workdir == origin or (set(steps) & set(saved_steps(workdir))):
        raise UserError(f"{workdir!r} has such a checkpoint already; name another workdir")
    copied = []
    for step in steps:
        here, there = (os.path.join(place, FOLDER, str(step)) for place in (origin, workdir))
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
    for name in (CONFIG, report.METRICS):
        if os.path.exists(os.path.join(origin, name)):
            shutil.copyfile(os.path.join(origin, name), os.path.join(workdir, name))
    return copied


def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit status: 0 done, 1 something is damaged, 2 a mistake, in one line."""
    parser = argparse.ArgumentParser(
        "python -m dcae_jax.checkpoint",
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
    steps = saved_steps(workdir)
    if not steps:
        sys.stderr.write(f"error: {workdir!r} holds no finished checkpoint; name a workdir\n")
        return 2
    for step in steps:
        wrong = integrity.damage(os.path.join(workdir, FOLDER, str(step)))
        worst = max(worst, bool(wrong))
        sys.stdout.write(f"{step}: {wrong or 'whole'}\n")
    return worst


if __name__ == "__main__":
    sys.exit(main())
