# SPDX-License-Identifier: Apache-2.0
"""The job `sample`: pictures from a diffusion model, as a grid, as files or as one .npz.

Sample i depends on (seed, i) alone: not on the batch, nor on where an earlier call stopped.
"""

import dataclasses
import io
import json
import logging
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax import files as files_lib
from dcae_jax.api import generator
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.runtime import lease, preemption
from dcae_jax.runtime import mesh as mesh_lib

SETTINGS = "sample.json"  # of the samples in a workdir, there before the first
PARTS, IMAGES = "parts", "images"  # folders: what is done so far, and the files of format png
# What is there when all is done: the samples, or beside the files of format png their labels.
RESULTS = {"grid": "samples.png", "npz": "samples.npz", "png": "labels.json"}
STREAM = 5  # of the random numbers that draw labels


def run(config: Any, workdir: str) -> int:
    """The job `sample`. Returns 0 when done, 75 when stopped by SIGTERM, to be resumed."""
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to a diffusion model's workdir")
    mesh = mesh_lib.make_mesh(config.mesh)
    model = generator.load_generator(
        config.init_from,
        autoencoder=config.autoencoder,
        dtype=config.dtype,
        mesh=mesh,
        weights=config.weights,
        variant=config.model.variant,
        resolution=config.resolution,
    )
    mesh_lib.check_batch(config.sample.batch_size, mesh, key="sample.batch_size")
    with lease.hold(workdir, jax.process_index()):
        return _run(config, workdir, model)


def _run(config: Any, workdir: str, model: generator.Generator) -> int:
    _claim(config, model, workdir)
    done = os.path.join(workdir, RESULTS[config.sample.format])
    if os.path.exists(done):
        logging.info("%s is there already: %d samples", done, config.sample.count)
        return 0
    count, size = config.sample.count, config.sample.batch_size
    with preemption.flag(all_processes=True) as stopped, _progress(count) as bar:
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            bar.update(len(numbers))
            if _is_there(config, workdir, numbers):
                continue
            images = pictures(config, model, numbers)
            if jax.process_index() == 0:
                _keep(config, workdir, numbers, images)
            if stopped.is_set() and numbers[-1] + 1 < count:
                logging.info("stopped by a signal; the same command goes on")
                return preemption.STATUS
    if jax.process_index() == 0:
        _finish(config, model, workdir)
        logging.info("%d samples of %d pixels: %s", count, model.resolution, done)
    return 0


def pictures(config: Any, model: generator.Generator, numbers: Sequence[int]) -> np.ndarray:
    """Samples `numbers` of config.sample: [B, H, W, 3] uint8."""
    s = config.sample
    return model.sample(
        labels_of(config, model.num_classes, numbers),
        s.guidance,
        s.steps,
        config.seed,
        sampler=s.sampler,
        interval=tuple(s.guidance_interval),
        first=numbers[0],
    )


def labels_of(config: Any, num_classes: int, numbers: Sequence[int]) -> np.ndarray:
    """Labels [B] of samples: config.sample.labels in turn, or drawn from (seed, number)."""
    given = config.sample.labels
    if given:
        return np.array([given[i % len(given)] for i in numbers])
    seed = config.seed
    return np.array(
        [np.random.default_rng((seed, STREAM, i)).integers(num_classes) for i in numbers]
    )


def grid(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, 3] uint8, row by row, as one picture that is about a square."""
    columns = math.ceil(math.sqrt(len(images)))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    rows = np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:])
    return files_lib.image_grid([rows[:, i] for i in range(columns)])


# --- what is on the disk --------------------------------------------------------------------------


def _claim(config: Any, model: generator.Generator, workdir: str) -> None:
    """Writes what the samples are of. Raises UserError where the workdir holds others."""
    settings = {
        "sample": {k: v for k, v in dataclasses.asdict(config.sample).items() if k != "batch_size"},
        "seed": config.seed,
        "resolution": model.resolution,  # which the weights of some models leave open
        "weights": checkpoint_weights.checksum(model.weights),
        "autoencoder": checkpoint_weights.checksum(model.autoencoder.weights),
        "scaling_factor_multiplies_latent": model.scaling_factor,
        "objective": model.objective,
        "dtype": mesh_lib.compute_dtype(config.dtype, model.mesh),
        "source": config.init_from,
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists
    path = os.path.join(workdir, SETTINGS)
    before = files_lib.read_json(path)
    if before is None:
        if jax.process_index() == 0:
            files_lib.write_json(path, settings)
        return
    moved = settings | {"source": before.get("source")}  # the same weights in another place
    if moved != before:
        differ = [key for key in moved if moved[key] != before.get(key)]
        raise UserError(
            f"{workdir} holds other samples: {', '.join(differ)} differ from those of {SETTINGS}; "
            "use another --workdir"
        )


def _files(config: Any, workdir: str, numbers: Sequence[int]) -> list[str]:
    """Where these samples are kept until all are there: a file an image, or one for the batch."""
    if config.sample.format == "png":
        return [os.path.join(workdir, IMAGES, f"{number:06d}.png") for number in numbers]
    return [os.path.join(workdir, PARTS, f"{numbers[0]:06d}-{numbers[-1] + 1:06d}.npy")]


def _is_there(config: Any, workdir: str, numbers: Sequence[int]) -> bool:
    """Whether these samples are kept; all processes get the answer of process 0's disk."""
    there = all(os.path.exists(file) for file in _files(config, workdir, numbers))
    if jax.process_count() == 1:
        return there
    return bool(multihost_utils.broadcast_one_to_all(np.int32(there)))


def _keep(config: Any, workdir: str, numbers: Sequence[int], images: np.ndarray) -> None:
    files = _files(config, workdir, numbers)
    if config.sample.format == "png":
        for file, image in zip(files, images, strict=True):
            files_lib.write_png(file, image)
        return
    buffer = io.BytesIO()
    np.save(buffer, images)
    files_lib.write_file(files[0], buffer.getvalue())


def _finish(config: Any, model: generator.Generator, workdir: str) -> None:
    """Makes the result of what is kept, and then gives the parts up."""
    count, size = config.sample.count, config.sample.batch_size
    path = os.path.join(workdir, RESULTS[config.sample.format])
    labels = labels_of(config, model.num_classes, range(count))
    if config.sample.format == "png":
        files_lib.write_json(path, {f"{i:06d}.png": int(label) for i, label in enumerate(labels)})
        return
    parts = [
        np.load(_files(config, workdir, range(first, min(first + size, count)))[0], mmap_mode="r")
        for first in range(0, count, size)
    ]
    if config.sample.format == "grid":
        files_lib.write_png(path, grid(np.concatenate(parts)))
    else:
        _write_npz(path, parts, labels)
    shutil.rmtree(os.path.join(workdir, PARTS))


def _write_npz(path: str, parts: Sequence[np.ndarray], labels: np.ndarray) -> None:
    """arr_0 (images) and arr_1 (labels) as ADM's samples are kept, never whole in memory.

    Not compressed, so that a reader can map the images.
    """
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files_lib.atomic(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        # By ZipInfo, whose date is fixed: the same samples make the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, labels.astype(np.int64))


def _progress(total: int) -> Any:
    """A bar when a person watches."""
    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() and jax.process_index() == 0
    return tqdm(total=total, disable=not watched, unit="image", dynamic_ncols=True)
