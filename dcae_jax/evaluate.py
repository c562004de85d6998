# SPDX-License-Identifier: Apache-2.0
"""How good are the reconstructions: PSNR and SSIM by the published protocol, and picture grids.

Protocol: ADM centre crop, the model sees [-1, 1], both images are rounded to 8 bits before every
metric, means over images.
"""

import dataclasses
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import api, data, metrics, report, sharding
from dcae_jax import config as config_lib
from dcae_jax.config import UserError
from dcae_jax.models import layers
from dcae_jax.models.layers import Array, Weights


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one resolution, and some reconstructions."""

    scores: dict[str, float]  # metric -> mean over images
    count: int
    images: np.ndarray  # [grid, size, size, 3] uint8
    outputs: np.ndarray  # [grid, size, size, 3] uint8

    def grid(self) -> np.ndarray:
        """Columns: image, reconstruction, difference."""
        columns = (self.images, self.outputs, report.difference(self.images, self.outputs))
        return report.image_grid(columns)


def reconstruct_fn(graph: nnx.GraphDef, mesh: Mesh):
    """A jitted (weights, images uint8, mask) -> (sums of the scores, reconstructions uint8)."""

    def reconstruct(weights: Weights, images: Array, mask: Array):
        model = layers.merge(graph, weights)
        output = metrics.to_levels(model(images.astype(jnp.float32) / 127.5 - 1))
        target = images.astype(jnp.float32)
        scores = {"psnr": metrics.psnr(output, target), "ssim": metrics.ssim(output, target)}
        sums = {name: jnp.sum(jnp.where(mask > 0, score, 0)) for name, score in scores.items()}
        return sums | {"count": jnp.sum(mask)}, output.astype(jnp.uint8)

    return jax.jit(
        reconstruct, out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh, 4))
    )


def evaluate(
    config: Any, graph: nnx.GraphDef, weights: Weights, mesh: Mesh, source: Any
) -> dict[int, Result]:
    """Scores at each of config.evaluate.resolutions, every image of `source` counted once."""
    settings = config.evaluate
    sharding.check_batch(settings.batch_size, mesh, key="evaluate.batch_size")
    reconstruct = reconstruct_fn(graph, mesh)
    results = {}
    for size in settings.resolutions:
        batches = data.evaluation_batches(
            source,
            size=size,
            batch_size=settings.batch_size,
            count=settings.count,
            crops=settings.crops,
            threads=config.data.threads,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        sums, images, outputs = [], None, None
        for batch in batches:
            placed = sharding.put_batch(batch, mesh)
            batch_sums, output = reconstruct(weights, placed["image"], placed["mask"])
            sums.append(batch_sums)
            if images is None:
                shown = int(min(settings.grid, batch["mask"].sum()))
                images, outputs = batch["image"][:shown], _local_rows(output)[:shown]
        totals = {
            name: float(np.sum([np.float64(s[name]) for s in jax.device_get(sums)]))
            for name in sums[0]
        }
        count = round(totals.pop("count"))
        if not count:
            raise UserError("no image could be read for evaluation; see the log for their names")
        scores = {name: total / count for name, total in totals.items()}
        results[size] = Result(scores, count, images, outputs)
    return results


def _local_rows(array: Array) -> np.ndarray:
    """This process's rows of a batch that may be spread over other processes too."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def flat_scores(results: dict[int, Result]) -> dict[str, float]:
    """{'psnr_256': ...}, as in metrics.jsonl."""
    return {
        f"{name}_{size}": score
        for size, result in results.items()
        for name, score in result.scores.items()
    }


def score_table(results: dict[int, Result]) -> str:
    """The results as aligned text."""
    names = list(next(iter(results.values())).scores)
    head = ["resolution", "images", *(name.upper() for name in names)]
    rows = [[size, r.count, *(r.scores[n] for n in names)] for size, r in results.items()]
    return report.table([head, *rows])


def write_grids(results: dict[int, Result], workdir: str, name: str) -> None:
    """WORKDIR/images/NAME_<resolution>.png for each result."""
    for size, result in results.items():
        path = os.path.join(workdir, "images", f"{name}_{size}.png")
        report.write_png(path, result.grid())


def run(config: Any, workdir: str) -> int:
    """The job `evaluate`: a data set, or one picture, through a trained model."""
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to a workdir or checkpoint")
    mesh = sharding.make_mesh(config.mesh)
    model = api.load_autoencoder(config.init_from, config.dtype, mesh, config.weights)
    if config.data.source == "folder" and os.path.isfile(config.data.path):
        return _run_one(config, model, workdir)
    for size in config.evaluate.resolutions:
        check_resolution(size, model.compression, "evaluate.resolutions")
    source = data.evaluation_source(config.data)
    results = evaluate(config, model.graph, model.weights, mesh, source)
    if jax.process_index() == 0:
        write_grids(results, workdir, "evaluate")
        scores = {str(size): {**r.scores, "images": r.count} for size, r in results.items()}
        summary = {"config": config_lib.to_json(config), "results": scores}
        report.write_json(os.path.join(workdir, "evaluate.json"), summary)
        logging.info("%s\nwritten to %s", score_table(results), workdir)
    return 0


def _run_one(config: Any, model: api.Autoencoder, workdir: str) -> int:
    """One picture at its own size: padded to a multiple of f by reflection, then cropped back."""
    image, _ = data.folder(config.data.path)[0]
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    pad = [(0, -size % model.compression) for size in (height, width)]
    padded = np.pad(pixels, (*pad, (0, 0)), mode="symmetric").astype(np.float32) / 127.5 - 1
    output = model.decode(model.encode(padded[None]))[:, :height, :width]
    levels = np.asarray(metrics.to_levels(output))
    target = pixels[None].astype(np.float32)
    scores = {
        "psnr": float(metrics.psnr(levels, target)[0]),
        "ssim": float(metrics.ssim(levels, target)[0]),
    }
    result = levels[0].astype(np.uint8)
    pictures = {
        "input": pixels,
        "reconstruction": result,
        "difference": report.difference(pixels, result),
    }
    for name, picture in pictures.items():
        report.write_png(os.path.join(workdir, "images", f"{name}.png"), picture)
    report.write_json(
        os.path.join(workdir, "evaluate.json"), {"results": {config.data.path: scores}}
    )
    logging.info(
        "%s: PSNR %.2f dB, SSIM %.4f; pictures in %s/images",
        config.data.path,
        scores["psnr"],
        scores["ssim"],
        workdir,
    )
    return 0


def check_resolution(size: int, compression: int, key: str) -> None:
    """Raises UserError, naming the nearest sizes, unless the model can halve `size` evenly."""
    if size < compression or size % compression:
        down, up = size // compression * compression, -(-size // compression) * compression
        nearest = f"{down} or {up}" if down else f"{up}"
        raise UserError(
            f"{key}={size} is no multiple of the model's f={compression}; try {nearest}"
        )
