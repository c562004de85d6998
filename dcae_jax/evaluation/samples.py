# SPDX-License-Identifier: Apache-2.0
"""Sample quality: FID, Inception score, KID, precision and recall, against a reference.

The FID uses pytorch-fid's preprocessing, the other scores torch-fidelity's. A set of images is a
folder or arr_0 of an .npz; a reference may also be mu and sigma of an .npz.
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
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from dcae_jax import files
from dcae_jax.config.schema import Data, Evaluate
from dcae_jax.data import sources
from dcae_jax.data.sources import Source
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, networks
from dcae_jax.evaluation.networks import MetricNetworks
from dcae_jax.models import inception
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import mesh as mesh_lib

KID_SUBSET = 1000  # rows, torch-fidelity's default; smaller sets use all rows
SCORE_SPLITS = 10  # of the Inception score
REFERENCE_ROWS = 50_000  # reference features stored for KID, precision and recall


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Inception's features of a set of images, and their moments."""

    mu: np.ndarray  # [d] float64, pytorch-fid's preprocessing
    sigma: np.ndarray  # [d, d]
    count: int  # 0: unknown
    features: np.ndarray | None  # [n, d] float32, torch-fidelity's preprocessing; None if
    logits: np.ndarray | None  # [n, classes]; None like features: unknown, or not on process 0


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The images of an .npz, as a data source."""

    images: np.ndarray  # [N, H, W, 3] uint8, memory-mapped where the file allows it
    path: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.images[i])), 0

    def name(self, i: int) -> str:
        return f"{self.path}, image {i}"


def sample_scores(samples: Statistics, reference: Statistics | None) -> dict[str, float]:
    """FID, Inception score, KID, precision and recall, as far as the reference allows."""
    if samples.features is None or samples.logits is None:
        raise ValueError("only process 0 has the samples' features; compute the scores there")
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
def feature_step(mesh: Mesh) -> Callable:
    """A jitted function from a batch of images to Inception's features.

    (inception, moments, images [B, H, W, 3] uint8, mask [B]) -> (moments, features [B, d], logits
    [B, classes], mask), replicated: moments with pytorch-fid's preprocessing, features and logits
    with torch-fidelity's. The moments passed in are donated.
    """
    rows = NamedSharding(mesh, P(mesh_lib.BATCH_AXES))

    def step(
        weights: Weights, moments: metrics.Moments, images: jax.Array, mask: jax.Array
    ) -> tuple[metrics.Moments, jax.Array, jax.Array, jax.Array]:
        images = jax.lax.with_sharding_constraint(images, rows)
        features, _ = networks.inception_features(weights, images, "pytorch-fid")
        moments = metrics.moments_update(moments, features, mask)
        return moments, *networks.inception_features(weights, images, "torch-fidelity"), mask

    return jax.jit(step, donate_argnums=1, out_shardings=mesh_lib.replicated(mesh))


def statistics(
    settings: Evaluate,
    data: Data,
    mesh: Mesh,
    metric_networks: MetricNetworks,
    source: Source,
    size: int,
    keep: int = 0,
) -> Statistics:
    """Statistics of the images of `source`, cropped to `size` pixels.

    settings.count: use at most this many; keep: return the features of at most this many, evenly
    spread. 0: all. Raises UserError if fewer than two images can be read.
    """
    settings = dataclasses.replace(settings, crops=1)
    step = feature_step(mesh)
    moments = networks.empty_moments(metric_networks, mesh)
    total = min(len(source), settings.count or len(source))
    stride = math.ceil(total / keep) if keep else 1

    def batches() -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        nonlocal moments
        for _, batch in networks.batches(settings, data, source, size, mesh):
            placed = mesh_lib.put_batch(batch, mesh)
            moments, *found = step(
                metric_networks["inception"], moments, placed["image"], placed["mask"]
            )
            yield tuple(found)

    features, logits, read = [], [], 0
    for batch_features, batch_logits, mask in networks.one_behind(batches()):
        mask = np.asarray(mask) > 0
        # Every process has all rows, so all count the same.
        numbers = read + np.cumsum(mask) - 1
        read += int(mask.sum())
        if jax.process_index() == 0:
            chosen = mask & (numbers % stride == 0)
            features.append(np.asarray(batch_features)[chosen])
            logits.append(np.asarray(batch_logits)[chosen])
    if read < 2:
        raise UserError(f"only {read} images could be read; give at least 2 (papers use 50000)")
    mu, sigma = metrics.moments_finalize(moments)
    if jax.process_index():
        return Statistics(mu, sigma, read, None, None)
    return Statistics(mu, sigma, read, np.concatenate(features), np.concatenate(logits))


def reference_statistics(
    settings: Evaluate,
    data: Data,
    mesh: Mesh,
    metric_networks: MetricNetworks,
    size: int,
    workdir: str,
) -> Statistics | None:
    """Statistics of settings.reference: from the file, from WORKDIR/reference, or computed.

    Computed ones are cached there under a fingerprint of the images, their size, the preprocessings
    and the network's weights. Complete only on process 0; others may get None. Raises UserError.
    """
    path, key = settings.reference, "evaluate.reference"
    names = array_names(path, key)
    given = _given_moments(path, metric_networks) if {"mu", "sigma"} <= names else None
    if given and "arr_0" not in names:
        return Statistics(*given, 0, None, None)
    source = image_source(path, key)
    name = _fingerprint(path, source, size, settings.inception_weights)
    cached = os.path.join(workdir, "reference", f"{name}.npz")
    found = jax.process_index() == 0 and files.exists(cached)
    if jax.process_count() > 1:  # another process may not see process 0's disk
        found = bool(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found:
        logging.info("reference statistics read from %s", cached)
        stats = _read_statistics(files.local(cached)) if jax.process_index() == 0 else None
    else:
        every = dataclasses.replace(settings, count=0)
        stats = statistics(every, data, mesh, metric_networks, source, size, REFERENCE_ROWS)
        if jax.process_index() == 0:
            _write_statistics(cached, stats)
            logging.info("reference statistics of %d images stored in %s", stats.count, cached)
    if given and stats:  # such a file's mu and sigma cover many more images than it holds
        stats = dataclasses.replace(stats, mu=given[0], sigma=given[1], count=0)
    return stats


def array_names(path: str, key: str) -> set[str]:
    """The names of the arrays in the .npz `path`; empty for a folder. Raises UserError."""
    if os.path.isdir(path):
        return set()
    if not os.path.isfile(path):
        raise UserError(f"{key}={path!r} does not exist; name a folder of images or an .npz")
    try:
        with np.load(path) as file:
            return set(file.files)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{key}={path!r} is not an .npz; give an image folder or an .npz"
        ) from error


def _given_moments(path: str, metric_networks: MetricNetworks) -> tuple[np.ndarray, np.ndarray]:
    """mu and sigma of the .npz `path`. Raises UserError."""
    try:
        with np.load(path) as arrays:
            mu, sigma = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
    except (OSError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"evaluate.reference={path!r}: mu or sigma cannot be read ({error}); fetch it again"
        ) from error
    dim = metric_networks["inception"]["fc.kernel"].shape[0]
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise UserError(
            f"evaluate.reference={path!r}: mu is {mu.shape} and sigma {sigma.shape}, but "
            f"FID's Inception has {dim} pool3 features; use statistics of that network"
        )
    return mu, sigma


def image_source(path: str, key: str) -> Source:
    """A folder of images, or arr_0 of an .npz, as a data source. Raises UserError."""
    if os.path.isdir(path):
        try:
            return sources.folder(path)
        except UserError as error:
            raise UserError(str(error).replace("data.path", key)) from error
    names = array_names(path, key)
    if "arr_0" not in names:
        raise UserError(
            f"{key}={path!r} holds {', '.join(sorted(names)[:4])}; images must be in arr_0 "
            "(uint8 [N, H, W, 3])"
        )
    try:
        images = _map_array(path, "arr_0")
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}={path!r}: arr_0 is damaged ({reason}); fetch it again") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(
            f"{key}={path!r}: arr_0 is {images.dtype} {images.shape}; give uint8 [N, H, W, 3]"
        )
    return Pixels(images, path)


def _map_array(path: str, name: str) -> np.ndarray:
    """An array of an .npz, memory-mapped unless it is compressed: 50,000 samples are 10 GB."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(entry.header_offset)  # of a ZIP header, then the .npy itself
            head = file.read(2**12)
            file.seek(entry.header_offset + head.index(np.lib.format.MAGIC_PREFIX))
            if np.lib.format.read_magic(file) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if not fortran and not dtype.hasobject and math.prod(shape):
                    return np.memmap(file, dtype, "r", file.tell(), shape)
    with np.load(path) as arrays:
        return arrays[name]


def _fingerprint(path: str, source: Source, size: int, weights: str) -> str:
    """A digest of a set of images, their size and the network: the name of cached statistics."""
    if isinstance(source, sources.Folder):
        paths = [os.path.join(source.root, file) for file in source.files]
    else:
        paths = [path]
    stats = [os.stat(file) for file in paths]
    parts = {
        "files": [
            (os.path.abspath(file), stat.st_size, stat.st_mtime_ns)
            for file, stat in zip(paths, stats, strict=True)
        ],
        "size": size,
        "preprocessings": inception.PREPROCESSINGS,
        "rows": REFERENCE_ROWS,
    }
    digest = hashlib.sha256(json.dumps(parts).encode())
    with open(files.local(weights), "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _write_statistics(path: str, stats: Statistics) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: getattr(stats, key) for key in ("mu", "sigma", "count", "features")})
    files.write_file(path, buffer.getvalue())


def _read_statistics(path: str) -> Statistics:
    with np.load(path) as arrays:
        mu, sigma, count = arrays["mu"], arrays["sigma"], int(arrays["count"])
        return Statistics(mu, sigma, count, arrays["features"], None)
