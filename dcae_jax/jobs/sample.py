# SPDX-License-Identifier: Apache-2.0
"""The job `sample`: images from a diffusion model, as a grid, as files or as one .npz.

Sample i depends on (seed, i) alone, not on the batch size or on where an earlier run stopped.
"""

import dataclasses
import io
import json
import logging
import math
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax import files as files_lib
from dcae_jax.api import generator
from dcae_jax.api.generator import Generator
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config import Config
from dcae_jax.config.schema import Sample
from dcae_jax.errors import UserError
from dcae_jax.runtime import lease, preemption
from dcae_jax.runtime import mesh as mesh_lib

if TYPE_CHECKING:
    import tqdm

SETTINGS = "sample.json"  # written before the first sample
PARTS, IMAGES = "parts", "images"  # folders: batches drawn so far; the files of format png
PART = re.compile(r"\d{6,}-\d{6,}\.npy")  # in PARTS: first sample-first of the next batch
# Written last: the samples, or the labels of the files of format png.
RESULTS = {"grid": "samples.png", "npz": "samples.npz", "png": "labels.json"}
STREAM = 5  # random stream of the labels


def run(config: Config, workdir: str) -> int:
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
        _claim(config, model, workdir)
        return _draw_all(config.sample, config.seed, model, workdir)


def _draw_all(settings: Sample, seed: int, model: Generator, workdir: str) -> int:
    done = os.path.join(workdir, RESULTS[settings.format])
    if files_lib.exists(done):
        logging.info("%s already exists: %d samples", done, settings.count)
        return 0
    with preemption.flag(all_processes=True) as stopped, _progress_bar(settings.count) as bar:
        for numbers in _batches(settings):
            bar.update(len(numbers))
            if _is_saved(settings, workdir, numbers):
                continue
            images = draw(settings, seed, model, numbers)
            if jax.process_index() == 0:
                _save(settings, workdir, numbers, images)
            if stopped.is_set() and numbers[-1] + 1 < settings.count:
                logging.info("stopped by a signal; rerun the same command to resume")
                return preemption.STATUS
    if jax.process_index() == 0:
        _finish(settings, labels_of(settings, seed, model, range(settings.count)), workdir)
        logging.info("%d samples of %d pixels: %s", settings.count, model.resolution, done)
    return 0


def _batches(settings: Sample) -> list[range]:
    """The numbers of the samples in each batch."""
    starts = range(0, settings.count, settings.batch_size)
    return [range(first, min(first + settings.batch_size, settings.count)) for first in starts]


def draw(settings: Sample, seed: int, model: Generator, numbers: Sequence[int]) -> np.ndarray:
    """The samples with these consecutive numbers: [B, H, W, 3] uint8."""
    return model.sample(
        labels_of(settings, seed, model, numbers),
        settings.guidance,
        settings.steps,
        seed,
        sampler=settings.sampler,
        interval=settings.guidance_interval,
        first=numbers[0],
    )


def labels_of(settings: Sample, seed: int, model: Generator, numbers: Sequence[int]) -> np.ndarray:
    """Labels [B] of samples: those of config.sample in turn, or drawn from (seed, number)."""
    if settings.labels:
        return np.array([settings.labels[i % len(settings.labels)] for i in numbers])
    rngs = (np.random.default_rng((seed, STREAM, i)) for i in numbers)
    return np.array([rng.integers(model.num_classes) for rng in rngs])


def grid(images: np.ndarray) -> np.ndarray:
    """Tiles images [N, H, W, 3] uint8, row by row, into one roughly square image."""
    columns = math.ceil(math.sqrt(len(images)))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    rows = np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:])
    return files_lib.image_grid([rows[:, i] for i in range(columns)])


# --- on disk --------------------------------------------------------------------------------------


def _claim(config: Config, model: Generator, workdir: str) -> None:
    """Writes sample.json. Raises UserError if the workdir holds samples of other settings."""
    sample = dataclasses.asdict(config.sample)
    settings = {
        "sample": {key: value for key, value in sample.items() if key != "batch_size"},
        "seed": config.seed,
        "resolution": model.resolution,  # not stored with every model's weights
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
            f"{workdir} holds other samples: {', '.join(differ)} differ from {SETTINGS}; "
            "use another --workdir"
        )


def _files(settings: Sample, workdir: str, numbers: Sequence[int]) -> list[str]:
    """Files of a batch of samples: one per image for format png, else one for the batch."""
    if settings.format == "png":
        return [os.path.join(workdir, IMAGES, f"{number:06d}.png") for number in numbers]
    return [os.path.join(workdir, PARTS, f"{numbers[0]:06d}-{numbers[-1] + 1:06d}.npy")]


def _is_saved(settings: Sample, workdir: str, numbers: Sequence[int]) -> bool:
    """Whether these samples are on disk; all processes get the answer of process 0."""
    saved = all(files_lib.exists(file) for file in _files(settings, workdir, numbers))
    if jax.process_count() == 1:
        return saved
    return bool(multihost_utils.broadcast_one_to_all(np.int32(saved)))


def _save(settings: Sample, workdir: str, numbers: Sequence[int], images: np.ndarray) -> None:
    files = _files(settings, workdir, numbers)
    if settings.format == "png":
        for file, image in zip(files, images, strict=True):
            files_lib.write_png(file, image)
        return
    buffer = io.BytesIO()
    np.save(buffer, images)
    files_lib.write_file(files[0], buffer.getvalue())


def _finish(settings: Sample, labels: np.ndarray, workdir: str) -> None:
    """Writes the result from the batches on disk, then removes them."""
    path = os.path.join(workdir, RESULTS[settings.format])
    if settings.format == "png":
        files_lib.write_json(path, {f"{i:06d}.png": int(label) for i, label in enumerate(labels)})
        return
    parts = [
        np.load(files_lib.local(_files(settings, workdir, numbers)[0]), mmap_mode="r")
        for numbers in _batches(settings)
    ]
    if settings.format == "grid":
        files_lib.write_png(path, grid(np.concatenate(parts)))
    else:
        _write_npz(path, parts, labels)
    _remove_parts(os.path.join(workdir, PARTS))


def _remove_parts(folder: str) -> None:
    """Removes only the batch files, including those of an earlier batch size."""
    for name in files_lib.listdir(folder):
        if PART.fullmatch(name):
            files_lib.remove(os.path.join(folder, name))
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def _write_npz(path: str, parts: Sequence[np.ndarray], labels: np.ndarray) -> None:
    """Writes arr_0 (images) and arr_1 (labels), as in ADM's sample files, a batch at a time.

    Not compressed, so that a reader can map the images.
    """
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files_lib.atomic(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        # A ZipInfo has a fixed date: the same samples make the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, labels.astype(np.int64))


def _progress_bar(total: int) -> "tqdm.tqdm":
    """On process 0, if stderr is a terminal."""
    from tqdm.auto import tqdm

    interactive = sys.stderr.isatty() and jax.process_index() == 0
    return tqdm(total=total, disable=not interactive, unit="image", dynamic_ncols=True)
