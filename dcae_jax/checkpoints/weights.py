# SPDX-License-Identifier: Apache-2.0
"""Reads weights from anywhere (a run, an export, published files); writes exports."""

import contextlib
import dataclasses
import hashlib
import logging
import math
import mmap
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import UserError
from dcae_jax.models.protocol import Arrays
from dcae_jax.models.weights import AnyWeights
from dcae_jax.pretrained import published
from dcae_jax.pretrained.published import Saved
from dcae_jax.runtime import host_memory

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


EXPORT = "model.json"  # of an export
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "shipped")  # with this package
# Bytes of arrays decoded in one request. Orbax reads a whole request at once, and holds the stored
# bytes of each array beside the decoded ones.
READ_AT_ONCE = 2**25
MOST_EXPANSION = 1000  # zstd's ratio for constant weights
ENCODER = ("encoder.", "quant_conv.")  # prefixes of the weights that latents depend on
AUTOENCODER = "autoencoder"  # subfolder of a generator's export: the export of its autoencoder


def load_weights(
    path: str,
    which: str = "ema",
    variant: str = "",
    kind: str = "autoencoder",
    *,
    quantized: bool = False,
) -> tuple[Arrays, Saved]:
    """(weights by path, their model) of a workdir or checkpoint, an export, or published weights.

    path: a workdir or one of its checkpoints/<step>, an export of ours, a folder or file of
    PyTorch weights, their name on the hub, or that of a shipped model. which: 'ema', the EMA of
    what a run trained, or 'raw'. variant: for published weights that do not state it. kind:
    'autoencoder' or 'generator', a diffusion model. quantized: an export may also hold quantised
    weights. Arrays are NumPy, float32, parameters and statistics together.
    Raises UserError if there is nothing to load or the weights are not of the variant.
    """
    files.check(path, "path")
    path = located(path)
    full = files.absolute(path)
    if files.exists(os.path.join(full, EXPORT)):
        weights, saved = _load_export(files.local(full), kind)
        if saved.quantize and not quantized:
            raise UserError(
                f"init_from={path!r} is {saved.quantize}, which only encodes and decodes; give the "
                "weights that it was made from"
            )
        return weights, _named(path, saved, variant)
    if saved := _run_at(full):
        return _load_run(full, which, kind, saved), _named(path, saved, variant)
    workdir, step = checkpoints.split_path(full)
    if step is not None:
        raise UserError(
            f"init_from={full!r} is not in a workdir: {workdir} has no {checkpoints.CONFIG}"
        )
    read = published.read_generator if kind == "generator" else published.read
    return read(_of_others(path), variant)


def _named(path: str, saved: Saved, variant: str) -> Saved:
    try:
        return published.named(saved, variant)
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error


def shipped() -> tuple[str, ...]:
    """The names of the models that this package ships."""
    return tuple(n for n in files.listdir(SHIPPED) if files.exists(f"{SHIPPED}/{n}/{EXPORT}"))


def located(path: str) -> str:
    """The folder of the shipped model `path`; files and folders of that name come first."""
    if path not in shipped() or files.exists(files.absolute(path)):
        return path
    logging.info("%s: the model of this package", path)
    return os.path.join(SHIPPED, path)


def kind_of(path: str) -> str:
    """'autoencoder' or 'generator': what `load_weights` would find at `path`.

    For an export, the kind that it states, whatever that is. Raises UserError.
    """
    full = files.absolute(located(path))
    export = files.read_object(os.path.join(full, EXPORT))
    if export is not None:
        return str(export.get("kind"))
    if run := _run_at(full):
        return run.kind
    return published.kind_of(_of_others(path))


def _of_others(path: str) -> str:
    """The file, folder or hub name of published weights. Raises UserError for a chain's workdir."""
    full = files.absolute(path)
    if phases := checkpoints.phase_workdirs(full):
        raise UserError(
            f"init_from={path!r} is the workdir of several phases; choose one: {', '.join(phases)}"
        )
    return files.local(full) if files.exists(full) else path


def _run_at(path: str) -> Saved | None:
    """The model of the run whose workdir or checkpoint `path` is; None if it is neither."""
    file = files.inside(checkpoints.split_path(path)[0], checkpoints.CONFIG)
    record = files.read_object(file) or {}
    if "config" not in record:
        return None
    config, factor = record["config"], record.get("scaling_factor")
    if factor and isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = {**config, "model": {**config["model"], "scaling_factor": factor}}
    return dataclasses.replace(_saved_in(file, config), latents=record.get("latents"))


def _saved_in(path: str, config: Any) -> Saved:
    """The model that `config`, from the JSON file `path`, describes. Raises UserError."""
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(f"{path} has no model section; it is not that of a run or an export")
    try:
        return Saved(
            config_lib.model_section(config["model"]), config_lib.diffusion_section(config)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _load_run(path: str, which: str, kind: str, saved: Saved) -> Arrays:
    """The weights of a workdir's newest undamaged checkpoint, or of the one that `path` names."""
    if kind != saved.kind:
        raise UserError(
            f"init_from={path!r} is a run of kind {saved.kind!r}; give one of kind {kind!r}"
        )
    workdir, step = checkpoints.split_path(path)
    steps = checkpoints.saved_steps(workdir)
    if step is None and not steps:
        raise UserError(f"init_from={path!r} has no finished checkpoint yet; let it train first")
    if step is None:
        step = _whole_step(workdir, steps)
    elif step not in steps:
        raise UserError(f"init_from={path!r} is not a finished checkpoint; the workdir has {steps}")
    elif wrong := _damage(checkpoints.local_step(workdir, step, "weights"), "weights"):
        raise UserError(f"init_from={path!r} is damaged: {wrong}; use another checkpoint")
    folder = checkpoints.local_step(workdir, step, "weights")
    weights = _read_numpy(os.path.join(folder, "weights"), which)
    logging.info("read %s weights of step %d from %s", which, step, workdir)
    return weights


def _whole_step(workdir: str, steps: list[int]) -> int:
    """The newest of `steps` whose weights are undamaged. Raises UserError if none is."""
    wrong = {}
    for step in reversed(steps):
        wrong[step] = _damage(checkpoints.local_step(workdir, step, "weights"), "weights")
        if not wrong[step]:
            return step
        logging.warning("checkpoint %d of %s is damaged: %s", step, workdir, wrong[step])
    what = "; ".join(f"{step}: {text}" for step, text in wrong.items())
    raise UserError(f"init_from={workdir!r} has no undamaged checkpoint ({what}); use a copy of it")


def _damage(folder: str, part: str = "") -> str:
    """As integrity.damage, but weights without a manifest pass, with a warning."""
    if not files.exists(os.path.join(folder, integrity.FILE)):
        logging.warning("%s has no %s: reading its weights without a check", folder, integrity.FILE)
        return ""
    return integrity.damage(folder, part)


# --- Orbax trees of weights -----------------------------------------------------------------------


def _read_numpy(path: str, which: str) -> Arrays:
    """Weights of an Orbax tree as NumPy arrays, whatever devices it was saved from.

    Reads only the wanted one of a weight and its average. Raises UserError.
    """
    import orbax.checkpoint as ocp

    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            return _read_tree(reader, path, which)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} is not a readable checkpoint ({reason}); use a copy of it"
        ) from error


def _read_tree(reader: "ocp.PyTreeCheckpointHandler", path: str, which: str) -> Arrays:
    import orbax.checkpoint as ocp
    from etils import epath

    folder = epath.Path(path)
    tree = reader.metadata(folder).tree
    tree = {part: tree.get(part) or {} for part in checkpoints.WEIGHTS}
    # A few bytes of JSON can claim any shape; Orbax would fill it with zeros.
    claimed = sum(math.prod(leaf.shape) for part in tree.values() for leaf in part.values()) * 4
    stored = sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
    if claimed > MOST_EXPANSION * stored + 2**30:
        raise UserError(f"{path} has {stored} bytes but claims arrays of {claimed}; do not use it")
    averaged = tree["ema"] if which == "ema" else {}
    wanted = [
        (part, name, math.prod(leaf.shape) * 4)
        for part, leaves in tree.items()
        for name, leaf in leaves.items()
        if (part == "ema") == (name in averaged)
    ]
    found: Arrays = {}
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
    """A copy in its own mapped pages, which return to the system when it is freed.

    Orbax decodes arrays in threads, each with its own malloc arena, which glibc rarely trims. Left
    there until they are on the device, arrays would take twice their size.
    """
    pages = mmap.mmap(-1, max(value.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, value.dtype, value.size).reshape(value.shape)
    copy[...] = value
    return copy


# --- exports --------------------------------------------------------------------------------------


def save_export(folder: str, weights: AnyWeights, meta: dict[str, Any]) -> None:
    """Writes an export into the existing `folder`: params/ (Orbax), then model.json."""
    import orbax.checkpoint as ocp

    params = os.path.join(os.path.abspath(folder), "params")
    with ocp.StandardCheckpointer() as writer:
        writer.save(params, {"params": dict(weights)})
    integrity.write(params)
    files.write_json(os.path.join(folder, EXPORT), meta)


def _load_export(folder: str, kind: str) -> tuple[Arrays, Saved]:
    """(weights by path, their model) of an export of ours."""
    meta = files.read_object(files.inside(folder, EXPORT)) or {}
    if meta.get("kind") != kind:
        found = meta.get("kind")
        raise UserError(
            f"init_from={folder!r}: {EXPORT} has kind={found!r}; give one with kind={kind!r}"
        )
    params = os.path.join(folder, "params")
    if not os.path.isdir(params):
        raise UserError(
            f"init_from={folder!r} is an incomplete export without params/; export it again"
        )
    wrong = _damage(params)
    if wrong:
        raise UserError(f"init_from={folder!r} is a damaged export: {wrong}; export it again")
    if kind == "generator":
        meta["autoencoder"] = files.inside(folder, AUTOENCODER)
    saved = _saved_in(os.path.join(folder, EXPORT), meta)
    weights = {k: v.astype(np.float32, copy=False) for k, v in _read_numpy(params, "raw").items()}
    logging.info("read the export %s", folder)
    return weights, dataclasses.replace(
        saved,
        latents=meta.get("latents"),
        quantize=str(meta.get("quantize") or ""),
        float_encoder=str(meta.get("encoder_checksum") or ""),
    )


def checksum(weights: AnyWeights, parts: tuple[str, ...] = ("",)) -> str:
    """sha256 of the names, shapes and float32 values of weights, in the order of their names.

    parts: only weights whose names begin with one of these. The arrays must be fully addressable by
    this process.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name.startswith(parts):
            value = np.asarray(weights[name], np.float32, order="C")
            digest.update(f"{name} {value.shape}\n".encode())
            digest.update(value.data)
    return digest.hexdigest()


def encoder_checksum(weights: AnyWeights) -> str:
    """The checksum of the weights that latents depend on; training a decoder alone keeps it."""
    return checksum(weights, ENCODER)
