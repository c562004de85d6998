# SPDX-License-Identifier: Apache-2.0
"""Metric networks (LPIPS, Inception) and the batches of images that are evaluated.

Both run in float32 with matrix products at the highest precision, whatever the model computes in.
Their published weights are not part of this package: config.evaluate names the files.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from dcae_jax import files
from dcae_jax.config.schema import Data, Evaluate
from dcae_jax.data import pipeline, transforms
from dcae_jax.data.sources import Source
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics
from dcae_jax.models import inception, inception_torch, lpips, lpips_torch
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import mesh as mesh_lib

T = TypeVar("T")
MetricNetworks = dict[str, Weights]  # 'lpips' and 'inception', if their files are given


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """Where the weights of a metric network come from, and what they are for."""

    key: str  # of config.evaluate
    unlocks: str  # metrics
    source: str  # file to download
    host: str  # who publishes it
    converted: str  # file to convert it to

    @property
    def conversion(self) -> str:
        return (
            f"run `dcae-jax convert {self.source} --out={self.converted}` and name {self.converted}"
        )


FILES = {
    "lpips": WeightsFile(
        "lpips_weights",
        "LPIPS",
        "alexnet-owt-7be5be79.pth",
        "torchvision",
        "lpips-alex.safetensors",
    ),
    "inception": WeightsFile(
        "inception_weights",
        "rFID, FID, Inception score, KID, precision and recall",
        "pt_inception-2015-12-05-6726825d.pth",
        "mseitzer/pytorch-fid",
        "inception.safetensors",
    ),
}


def load_networks(settings: Evaluate, mesh: Mesh) -> MetricNetworks:
    """The networks whose files `settings` names, replicated on the mesh. Raises UserError."""
    networks = {}
    paths = {"lpips": settings.lpips_weights, "inception": settings.inception_weights}
    for name, path in paths.items():
        file = FILES[name]
        if not path:
            continue
        there = files.local(path)
        if not os.path.isfile(there):
            raise UserError(f"evaluate.{file.key}={path!r} is not a file; {file.conversion}")
        try:
            weights = (
                lpips_torch.load(there, "alex") if name == "lpips" else inception_torch.load(there)
            )
        except ValueError as error:
            message = " ".join(str(error).split())
            raise UserError(f"evaluate.{file.key}={path!r}: {message}") from error
        place = mesh_lib.replicated(mesh)
        networks[name] = {k: mesh_lib.host_to_global(v, place) for k, v in weights.items()}
    return networks


def missing_files(networks: MetricNetworks) -> str:
    """One line: which missing file unlocks what, and how to convert it; '' if none is missing."""
    parts = [
        f"{file.unlocks}: {file.source} ({file.host}), {file.conversion} as evaluate.{file.key}"
        for name, file in FILES.items()
        if name not in networks
    ]
    return f"metrics that lack a weights file: {'; '.join(parts)}" if parts else ""


def lpips_distance(weights: Weights, target: jax.Array, output: jax.Array) -> jax.Array:
    """The published LPIPS of levels 0..255 [B, H, W, 3] float32: [B]."""
    x, y = transforms.to_float(target), transforms.to_float(output)
    return lpips.distance(weights, x, y, "alex", "torchmetrics")


def inception_features(
    weights: Weights, levels: jax.Array, preprocessing: str
) -> tuple[jax.Array, jax.Array]:
    """Inception's (pool3 [B, d], logits [B, classes]) of levels 0..255 [B, H, W, 3]."""
    return inception.features(weights, inception.preprocess(levels, preprocessing))


def empty_moments(networks: MetricNetworks, mesh: Mesh) -> metrics.Moments:
    """Empty moments of Inception's features, replicated on the mesh."""
    dim = networks["inception"]["fc.kernel"].shape[0]
    empty = jax.jit(lambda: metrics.moments_init(dim), out_shardings=mesh_lib.replicated(mesh))
    return empty()


def batches(
    settings: Evaluate, data: Data, source: Source, size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, pipeline.Batch]]:
    """(row numbers among all images, this process's batch), until each image was seen once."""
    mesh_lib.check_batch(settings.batch_size, mesh, key="evaluate.batch_size")
    mesh_lib.check_height(size, mesh, key="evaluate.resolutions")
    process, processes = mesh_lib.process_batch_slice(mesh)
    local_batches = pipeline.evaluation_batches(
        source,
        size=size,
        batch_size=settings.batch_size,
        count=settings.count,
        crops=settings.crops,
        threads=data.threads,
        process=process,
        processes=processes,
    )
    for i, batch in enumerate(local_batches):
        local = len(batch["mask"])
        yield (i * processes + process) * local + np.arange(local), batch


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item after the next is made: devices compute the next while the host reads this one."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
