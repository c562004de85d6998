# SPDX-License-Identifier: Apache-2.0
"""Quality of samples: FID, Inception score, KID, precision and recall, against a reference.

The FID is computed on features that are preprocessed as pytorch-fid does, the other scores as
torch-fidelity does. Sets of images are folders, or arr_0 of an .npz; a reference may also be the
mu and sigma of one.
"""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from dcae_jax import files as files_lib
from dcae_jax.data import sources
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, networks
from dcae_jax.models import inception
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib

KID_SUBSET = 1000  # rows, torch-fidelity's default; of smaller sets all rows
SCORE_SPLITS = 10  # of the Inception score
REFERENCE_ROWS = 50_000  # features of the reference that are kept for KID, precision and recall


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What Inception makes of a set of images."""

    mu: np.ndarray  # [d] float64, preprocessed as pytorch-fid does
    sigma: np.ndarray  # [d, d]
    count: int  # 0: not known
    features: np.ndarray | None  # [n, d] float32, preprocessed as torch-fidelity does; None where
    logits: np.ndarray | None  # [n, classes] they are not known, and on processes other than 0


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The images of an .npz, as a source of `data`."""

    images: np.ndarray  # [N, H, W, 3] uint8, left on disk where the file allows it
    path: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.images[i])), 0

    def name(self, i: int) -> str:
        return f"{self.path}, image {i}"


def sample_scores(samples: Statistics, reference: Statistics | None) -> dict[str, float]:
    """FID, Inception score, KID, precision and recall, as far as the reference allows them."""
    if samples.features is None or samples.logits is None:
        raise ValueError("process 0 alone has the features of the samples; compute scores there")
    scores = {}
    if reference is not None:
        found = samples.mu, samples.sigma
        scores["fid"] = metrics.frechet_distance(*found, reference.mu, reference.sigma)
    splits = min(SCORE_SPLITS, samples.count)
    scores["is"], scores["is_std"] = metrics.inception_score(samples.logits, splits)
    if reference is not None and reference.features is not None:
        pair = samples.features, reference.features
        fewest = min(map(len, pair))
        subset = min(KID_SUBSET, fewest)
        scores["kid"], scores["kid_std"] = metrics.kernel_distance(*pair, subset_size=subset)
        if fewest > 3:
            scores["precision"], scores["recall"] = metrics.precision_recall(*pair)
    return scores


@functools.lru_cache(maxsize=2)
def features_fn(mesh: Mesh) -> Callable:
    """A jitted (inception, moments, images [B, H, W, 3] uint8, mask [B]) -> (moments, pool3 [B, d],
    logits [B, classes], mask): the moments as pytorch-fid, the others as torch-fidelity."""
    rows = NamedSharding(mesh, P(mesh_lib.BATCH_AXES))

    def features(
        weights: Weights, moments: metrics.Moments, images: Array, mask: Array
    ) -> tuple[Any, ...]:
        images = jax.lax.with_sharding_constraint(images, rows)
        moments = metrics.moments_update(
            moments, networks.pool3(weights, images, "pytorch-fid")[0], mask
        )
        return moments, *networks.pool3(weights, images, "torch-fidelity"), mask

    return jax.jit(features, donate_argnums=1, out_shardings=mesh_lib.replicated(mesh))


def statistics(
    config: Any,
    mesh: Mesh,
    judges: networks.Judges,
    source: Any,
    size: int,
    count: int,
    keep: int = 0,
) -> Statistics:
    """Statistics of all images of `source`, cut to `size` pixels, `count` > 0 at most.

    keep: features of so many images at most are returned, evenly spread; 0: of all.
    """
    run = features_fn(mesh)
    moments = networks.empty_moments(judges, mesh)
    total = min(len(source), count or len(source))
    stride = math.ceil(total / keep) if keep else 1
    features, logits, read, waiting = [], [], 0, None

    def look(pool3: Array, unnormalised: Array, mask_of: Array) -> None:
        nonlocal read
        mask = np.asarray(mask_of) > 0
        # Every process has all rows: it counts them alike.
        numbers = read + np.cumsum(mask) - 1
        read += int(mask.sum())
        if jax.process_index() == 0:
            chosen = mask & (numbers % stride == 0)
            features.append(np.asarray(pool3)[chosen])
            logits.append(np.asarray(unnormalised)[chosen])

    for _, batch in networks.batches(config, source, size, mesh, count, crops=1):
        placed = mesh_lib.put_batch(batch, mesh)
        moments, *found = run(judges["inception"], moments, placed["image"], placed["mask"])
        if waiting:  # one batch late, when the devices have the next to work on
            look(*waiting)
        waiting = found
    if waiting:
        look(*waiting)
    if read < 2:
        raise UserError(f"{read} images could be read; statistics need 2 at least, papers 50000")
    mu, sigma = metrics.moments_finalize(moments)
    if jax.process_index():
        return Statistics(mu, sigma, read, None, None)
    return Statistics(mu, sigma, read, np.concatenate(features), np.concatenate(logits))


def reference_statistics(
    config: Any, mesh: Mesh, judges: networks.Judges, size: int, workdir: str
) -> Statistics | None:
    """Statistics of evaluate.reference: from the file, from WORKDIR/reference, or computed.

    What is computed is kept there under a name that is made of the images, their size, the
    preprocessings and the network's weights. Whole on process 0 alone; others may get None. Raises
    UserError.
    """
    path, key = config.evaluate.reference, "evaluate.reference"
    names = array_names(path, key)
    given = _given_moments(path, judges) if {"mu", "sigma"} <= names else None
    if given and "arr_0" not in names:
        return Statistics(*given, 0, None, None)
    source = image_source(path, key)
    name = _fingerprint(path, source, size, config.evaluate.inception_weights)
    cached = os.path.join(workdir, "reference", f"{name}.npz")
    found = jax.process_index() == 0 and os.path.exists(cached)
    if jax.process_count() > 1:  # another process may not see process 0's disk
        found = bool(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found:
        logging.info("reference statistics read from %s", cached)
        stats = _read_statistics(cached) if jax.process_index() == 0 else None
    else:
        stats = statistics(config, mesh, judges, source, size, 0, keep=REFERENCE_ROWS)
        if jax.process_index() == 0:
            _write_statistics(cached, stats)
            logging.info("reference statistics of %d images kept in %s", stats.count, cached)
    if given and stats:  # such a file's mu and sigma are of many more images than it holds
        stats = dataclasses.replace(stats, mu=given[0], sigma=given[1], count=0)
    return stats


def array_names(path: str, key: str) -> set[str]:
    """The arrays of the .npz `path`; none of a folder. Raises UserError."""
    if os.path.isdir(path):
        return set()
    if not os.path.isfile(path):
        raise UserError(f"{key}={path!r} does not exist; name a folder of images or an .npz")
    try:
        with np.load(path) as file:
            return set(file.files)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}={path!r} is no .npz; name a folder of images or an .npz") from error


def _given_moments(path: str, judges: networks.Judges) -> tuple[np.ndarray, np.ndarray]:
    """mu and sigma of the .npz `path`. Raises UserError."""
    try:
        with np.load(path) as arrays:
            mu, sigma = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"evaluate.reference={path!r}: mu or sigma cannot be read ({error}); fetch it again"
        ) from error
    dim = judges["inception"]["fc.kernel"].shape[0]
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise UserError(
            f"evaluate.reference={path!r}: mu is {mu.shape} and sigma {sigma.shape}, pool3 of "
            f"the Inception of FID has {dim} features; take statistics of that network"
        )
    return mu, sigma


def image_source(path: str, key: str) -> Any:
    """A folder of images or the arr_0 of an .npz, as a source of `data`. Raises UserError."""
    if os.path.isdir(path):
        try:
            return sources.folder(path)
        except UserError as error:
            raise UserError(str(error).replace("data.path", key)) from error
    names = array_names(path, key)
    if "arr_0" not in names:
        raise UserError(
            f"{key}={path!r} holds {', '.join(sorted(names)[:4])}; images are called arr_0 "
            "(uint8 [N, H, W, 3])"
        )
    images = _map_array(path, "arr_0")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(
            f"{key}={path!r}: arr_0 is {images.dtype} {images.shape}; give uint8 [N, H, W, 3]"
        )
    return Pixels(images, path)


def _map_array(path: str, name: str) -> np.ndarray:
    """An array of an .npz, left on disk unless it is compressed: 50,000 samples are 10 GB."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(entry.header_offset)  # of a ZIP header of some length, then the .npy itself
            head = file.read(2**12)
            file.seek(entry.header_offset + head.index(np.lib.format.MAGIC_PREFIX))
            if np.lib.format.read_magic(file) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if not fortran and not dtype.hasobject and math.prod(shape):
                    return np.memmap(file, dtype, "r", file.tell(), shape)
    with np.load(path) as arrays:
        return arrays[name]


def _fingerprint(path: str, source: Any, size: int, weights: str) -> str:
    """Names the statistics of a set of images: another set, size or network has another name."""
    if isinstance(source, sources.Folder):
        files = [os.path.join(source.root, file) for file in source.files]
    else:
        files = [path]
    stats = [os.stat(file) for file in files]
    parts = {
        "files": [
            (os.path.abspath(file), stat.st_size, stat.st_mtime_ns)
            for file, stat in zip(files, stats, strict=True)
        ],
        "size": size,
        "preprocessings": inception.PREPROCESSINGS,
        "rows": REFERENCE_ROWS,
    }
    digest = hashlib.sha256(json.dumps(parts).encode())
    with open(weights, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _write_statistics(path: str, stats: Statistics) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: getattr(stats, key) for key in ("mu", "sigma", "count", "features")})
    files_lib.write_file(path, buffer.getvalue())


def _read_statistics(path: str) -> Statistics:
    with np.load(path) as arrays:
        mu, sigma, count = arrays["mu"], arrays["sigma"], int(arrays["count"])
        return Statistics(mu, sigma, count, arrays["features"], None)
