# SPDX-License-Identifier: Apache-2.0
"""What judges pictures: LPIPS and Inception, and the batches of pictures that they see.

Their published weights are not part of this package: config.evaluate names the files.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dcae_jax.data import pipeline
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics
from dcae_jax.models import inception, inception_torch, lpips_torch
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib

Judges = dict[str, Weights]  # 'lpips' and 'inception', where their files were given

# Judge -> (key, what it unlocks, file to fetch, where it is, file to convert it to).
FILES = {
    "lpips": (
        "evaluate.lpips_weights",
        "LPIPS",
        "alexnet-owt-7be5be79.pth",
        "torchvision",
        "lpips-alex.safetensors",
    ),
    "inception": (
        "evaluate.inception_weights",
        "rFID, FID, Inception score, KID, precision and recall",
        "pt_inception-2015-12-05-6726825d.pth",
        "mseitzer/pytorch-fid",
        "inception.safetensors",
    ),
}


def load_judges(config: Any, mesh: Mesh) -> Judges:
    """The networks whose files config.evaluate names, on every device. Raises UserError."""
    readers = {
        "lpips": functools.partial(lpips_torch.load, net="alex"),
        "inception": inception_torch.load,
    }
    judges = {}
    for name, read in readers.items():
        key, _, source, _, converted = FILES[name]
        path = getattr(config.evaluate, key.removeprefix("evaluate."))
        if not path:
            continue
        if not os.path.isfile(path):
            raise UserError(f"{key}={path!r} is no file; {conversion(source, converted)}")
        try:
            weights = read(path)
        except ValueError as error:
            raise UserError(f"{key}={path!r}: {' '.join(str(error).split())}") from error
        place = mesh_lib.replicated(mesh)
        judges[name] = {k: mesh_lib.host_to_global(v, place) for k, v in weights.items()}
    return judges


def locked(judges: Judges) -> str:
    """One line: which file unlocks what, and the command that converts it; '' with all there."""
    parts = []
    for name, (key, what, source, where, converted) in FILES.items():
        if name not in judges:
            parts.append(f"{what}: {source} ({where}), {conversion(source, converted)} as {key}")
    return f"not computed without a file: {'; '.join(parts)}" if parts else ""


def conversion(source: str, converted: str) -> str:
    return f"run `python -m dcae_jax.pretrained.torch_io {source} --out={converted}` and name {converted}"


def pool3(weights: Weights, levels: Array, kind: str) -> tuple[Array, Array]:
    """Inception's (pool3, logits) of levels 0..255."""
    return inception.features(weights, inception.preprocess(levels, kind))


def empty_moments(judges: Judges, mesh: Mesh) -> metrics.Moments:
    dim = judges["inception"]["fc.kernel"].shape[0]
    empty = jax.jit(lambda: metrics.moments_init(dim), out_shardings=mesh_lib.replicated(mesh))
    return empty()


def batches(
    config: Any, source: Any, size: int, mesh: Mesh, count: int | None = None, crops: int = 0
) -> Iterator[tuple[np.ndarray, pipeline.Batch]]:
    """(the numbers of the rows among all images, this process's batch), every image once."""
    settings = config.evaluate
    mesh_lib.check_batch(settings.batch_size, mesh, key="evaluate.batch_size")
    mesh_lib.check_height(size, mesh, key="evaluate.resolutions")
    process, processes = mesh_lib.process_batch_slice(mesh)
    found = pipeline.evaluation_batches(
        source,
        size=size,
        batch_size=settings.batch_size,
        count=settings.count if count is None else count,
        crops=crops or settings.crops,
        threads=config.data.threads,
        process=process,
        processes=processes,
    )
    for i, batch in enumerate(found):
        local = len(batch["mask"])
        yield (i * processes + process) * local + np.arange(local), batch
