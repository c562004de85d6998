# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import contextlib
import hashlib
import logging
import math
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models.weights import Weights
from dcae_jax.pretrained import published
from dcae_jax.runtime import host_memory

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


EXPORT = "model.json"  # of an export
# Bytes of arrays decoded together. Orbax reads at once whatever it is asked for, and holds what is
# stored of each array beside what it becomes.
READ_AT_ONCE = 2**25
MOST_EXPANSION = 1000  # what zstd makes of weights that are all equal
AUTOENCODER = "autoencoder"  # folder of a generator's export: the export of its autoencoder
# What an export says of a diffusion model; `latents` holds the checksum of the encoder.
GENERATOR_KEYS = ("model", "objective", "patch_size", "latents")


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
    match = re.fullmatch(rf"(.*)/{checkpoints.FOLDER}/(\d+)", path)
    workdir, step = (match[1], int(match[2])) if match else (path, None)
    config = files.read_object(files.inside(workdir, checkpoints.CONFIG))
    if config is None or "config" not in config:
        if match:
            raise UserError(
                f"init_from={path!r} is of no workdir: {workdir} has no {checkpoints.CONFIG}"
            )
        there = path if os.path.exists(path) else given
        if kind == "generator":
            return published.read_generator(there, variant)
        weights, model = published.read(there, variant)
        return weights, {"model": model}
    model = _model_in(os.path.join(workdir, checkpoints.CONFIG), config["config"])
    if kind != (saved := "generator" if config["config"].get("objective") else "autoencoder"):
        raise UserError(f"init_from={path!r} holds a run of the kind {saved}; name one of {kind}s")
    steps = checkpoints.saved_steps(workdir)
    if step is None and not steps:
        raise UserError(f"init_from={path!r} has no finished checkpoint yet; let it train first")
    if step is not None and step not in steps:
        raise UserError(f"init_from={path!r} is no finished checkpoint; there are {steps}")
    step = _whole_step(workdir, steps) if step is None else step
    wrong = _damage(os.path.join(workdir, checkpoints.FOLDER, str(step)), "weights")
    if wrong:
        raise UserError(f"init_from={path!r} is damaged: {wrong}; name another checkpoint")
    weights = _read_numpy(os.path.join(workdir, checkpoints.FOLDER, str(step), "weights"), which)
    logging.info("read %s weights of step %d from %s", which, step, workdir)
    return weights, config["config"] | {"model": model, "latents": config.get("latents")}


def _whole_step(workdir: str, steps: list[int]) -> int:
    """The newest of `steps` whose weights are whole. Raises UserError if none is."""
    wrong = {}
    for step in reversed(steps):
        wrong[step] = _damage(os.path.join(workdir, checkpoints.FOLDER, str(step)), "weights")
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
    export = files.read_object(os.path.join(full, EXPORT))
    if export is not None:
        return str(export.get("kind"))
    workdir = re.sub(rf"/{checkpoints.FOLDER}/\d+$", "", full)
    run = files.read_object(os.path.join(workdir, checkpoints.CONFIG)) or {}
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
    tree = {name: tree.get(name) or {} for name in checkpoints._WEIGHTS}
    # A few bytes of JSON can claim any shape, which would be filled with zeros.
    claimed = sum(math.prod(leaf.shape) for part in tree.values() for leaf in part.values()) * 4
    stored = sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
    if claimed > MOST_EXPANSION * stored + 2**30:
        raise UserError(f"{path} has {stored} bytes and claims arrays of {claimed}; do not use it")
    if which != "ema":
        tree["ema"] = {}
    wanted = [
        (part, name, math.prod(leaf.shape) * 4)
        for part in checkpoints._WEIGHTS
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
                found[name] = checkpoints._in_pages(values.pop(name))
                host_memory.trim()
    return found


def save_export(folder: str, weights: Weights, meta: dict[str, Any]) -> None:
    """Writes an export into `folder`, which exists: params/ (Orbax), then model.json."""
    import orbax.checkpoint as ocp

    params = os.path.join(os.path.abspath(folder), "params")
    with ocp.StandardCheckpointer() as writer:
        writer.save(params, {"params": dict(weights)})
    integrity.write(params)
    files.write_json(os.path.join(folder, EXPORT), meta)


def _load_export(folder: str, kind: str) -> tuple[Weights, dict[str, Any]]:
    """(weights by path, configuration) of an export of ours."""
    meta = files.read_object(files.inside(folder, EXPORT)) or {}
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
        inner = files.inside(folder, AUTOENCODER)
        kept = {k: meta.get(k) for k in GENERATOR_KEYS}
        return weights, kept | {"autoencoder": inner, "model": model}
    return weights, {"model": model}


def _model_in(path: str, config: Any) -> Model:
    """config.model of the JSON file `path`, which has `config`. Raises UserError."""
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(f"{path} names no model; it is of no run or export")
    try:
        return config_lib.model_section(config["model"])
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
