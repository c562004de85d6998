# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: how good reconstructions or samples are, tables and picture grids.

Protocol: ADM centre crop, the model sees [-1, 1], both images are rounded to 8 bits before every
metric, means over images. docs/evaluation.md says what each number is computed on.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax import files
from dcae_jax.data import pipeline, transforms
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, networks
from dcae_jax.evaluation.networks import Judges, load_judges
from dcae_jax.models import lpips
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding

Kept = dict[int, tuple[float, np.ndarray, np.ndarray]]  # image number -> PSNR, image, output
SCORES = ("psnr", "ssim", "lpips")  # of each image, in the order of tables


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one resolution, and some reconstructions."""

    scores: dict[str, float]  # metric -> value, of PSNR, SSIM and LPIPS the mean over images
    count: int
    images: np.ndarray  # [grid, size, size, 3] uint8, the first ones
    outputs: np.ndarray  # [grid, size, size, 3] uint8
    extremes: dict[str, tuple[np.ndarray, np.ndarray]]  # 'best', 'worst' by PSNR: likewise
    biased: bool  # too few images for the Frechet distance to be compared

    def grid(self) -> np.ndarray:
        """Columns: image, reconstruction, difference."""
        return _grid(self.images, self.outputs)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Sums over the images of one resolution, which those of other images can be added to."""

    sums: dict[str, float]  # 'count', and metric -> sum over images
    moments: dict[str, metrics.Moments]  # 'image', 'output': Inception's, on the devices
    first: tuple[np.ndarray, np.ndarray]  # (images, outputs) [grid, size, size, 3] uint8
    kept: Kept  # the best and the worst


# --- reconstructions ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # a training run evaluates many times, and compiles once
def judge_fn(graph: nnx.GraphDef, mesh: Mesh) -> Callable:
    """A jitted function that reconstructs a batch and judges it.

    (weights, judges, moments, images [B, H, W, 3] uint8, mask [B]) -> (moments, sums of the
    scores, PSNR [B], reconstructions [B, H, W, 3] uint8). The moments passed in are given up.
    """
    rows = NamedSharding(mesh, P(mesh_lib.BATCH_AXES))

    def judge(weights: Weights, judges: Judges, moments: Any, images: Array, mask: Array):
        model = weights_lib.merge(graph, sharding.replicate_weights(weights, mesh))
        # From here on levels in float32, whatever the model computes in. An image stays on one
        # device, where the judges' resizing and pooling need no neighbour's rows.
        output = transforms.to_levels(model(transforms.to_float(images)))
        target = images.astype(jnp.float32)
        target, output = (jax.lax.with_sharding_constraint(x, rows) for x in (target, output))
        scores = {"psnr": metrics.psnr(output, target), "ssim": metrics.ssim(output, target)}
        if "lpips" in judges:
            scores["lpips"] = _lpips(judges["lpips"], target, output)
        if "inception" in judges:
            moments = {
                name: metrics.moments_update(
                    moments[name],
                    networks.pool3(judges["inception"], levels, "pytorch-fid")[0],
                    mask,
                )
                for name, levels in (("image", target), ("output", output))
            }
        sums = {name: jnp.sum(jnp.where(mask > 0, score, 0)) for name, score in scores.items()}
        sums["count"] = jnp.sum(mask)
        return moments, sums, scores["psnr"], output.astype(jnp.uint8)

    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(judge, donate_argnums=2, out_shardings=(everywhere, everywhere, rows, rows))


def _lpips(weights: Weights, target: Array, output: Array) -> Array:
    """The published LPIPS of levels 0..255: [B]."""
    x, y = transforms.to_float(target), transforms.to_float(output)
    return lpips.distance(weights, x, y, "alex", "torchmetrics")


class Stopped(Exception):
    """The evaluation was given up, as its caller asked for."""


def evaluate(
    config: Any,
    graph: nnx.GraphDef,
    weights: Weights,
    mesh: Mesh,
    source: Any,
    judges: Judges | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[int, Result]:
    """Scores at each of config.evaluate.resolutions, every image of `source` counted once.

    judges: what `load_judges` gives, which is called if None. stopped: asked before each batch.
    Raises UserError, and Stopped.
    """
    judges = load_judges(config, mesh) if judges is None else judges
    results = {}
    for size in config.evaluate.resolutions:
        measured = measure(config, graph, weights, mesh, source, judges, size, stopped)
        results[size] = finish(measured, size, config)
    return results


def measure(
    config: Any,
    graph: nnx.GraphDef,
    weights: Weights,
    mesh: Mesh,
    source: Any,
    judges: Judges,
    size: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Sums over the images of `source`, cut to `size` pixels. Raises UserError, and Stopped."""
    settings = config.evaluate
    judge = judge_fn(graph, mesh)
    moments = {}
    if "inception" in judges:
        moments = {name: networks.empty_moments(judges, mesh) for name in ("image", "output")}
    every_sum, first, kept, waiting = [], None, {}, None

    def look(batch, numbers, psnr, output):
        nonlocal first
        if first is None:
            shown = int(min(settings.grid, batch["mask"].sum()))
            first = batch["image"][:shown], _local_rows(output)[:shown]
        _keep_extremes(kept, batch, numbers, psnr, output, settings.grid)

    for numbers, batch in networks.batches(config, source, size, mesh):
        if stopped():
            raise Stopped
        placed = mesh_lib.put_batch(batch, mesh)
        moments, sums, psnr, output = judge(
            weights, judges, moments, placed["image"], placed["mask"]
        )
        every_sum.append(sums)
        if waiting:  # one batch late, when the devices have the next to work on
            look(*waiting)
        waiting = batch, numbers, psnr, output
    if waiting:
        look(*waiting)
    fetched = jax.device_get(every_sum) or [{"count": 0}]
    names = [name for name in (*SCORES, "count") if name in fetched[0]]  # JAX sorts keys
    totals = {name: math.fsum(float(sums[name]) for sums in fetched) for name in names}
    return Measurement(totals, moments, first, kept)


def finish(measured: Measurement, size: int, config: Any) -> Result:
    """The means and the rFID of a measurement. Raises UserError if no image was read."""
    count = _some(measured.sums["count"])
    scores = {name: total / count for name, total in measured.sums.items() if name != "count"}
    biased = False
    if measured.moments and count > 1:
        image, output = (metrics.moments_finalize(measured.moments[k]) for k in ("image", "output"))
        scores["rfid"] = metrics.frechet_distance(*output, *image)
        biased = metrics.biased(count)
    kept = sorted(_gather(measured.kept, size, config.evaluate.grid).items())
    order = sorted(kept, key=lambda item: (item[1][0], item[0]))
    shown = min(config.evaluate.grid, len(order))
    extremes = {}
    for name, chosen in (("worst", order[:shown]), ("best", order[::-1][:shown])):
        extremes[name] = tuple(np.stack([item[1][i] for item in chosen]) for i in (1, 2))
    return Result(scores, count, *measured.first, extremes, biased)


def _some(count: float) -> int:
    if not round(count):
        raise UserError("no image could be read for evaluation; see the log for their names")
    return round(count)


def _local_rows(array: Array) -> np.ndarray:
    """This process's rows of a batch that may be spread over other processes too."""
    if array.is_fully_addressable:
        return np.asarray(array)
    rows = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])


def _keep_extremes(
    kept: Kept, batch: pipeline.Batch, numbers: np.ndarray, psnr: Array, output: Array, size: int
) -> None:
    """Changes `kept` to hold the `size` best and worst, so far, with this batch."""
    local = np.nan_to_num(_local_rows(psnr), nan=-math.inf).tolist()
    found = {int(number): row for row, number in enumerate(numbers) if batch["mask"][row] > 0}
    ranks = [(value[0], number) for number, value in kept.items()]
    ranks = sorted(ranks + [(local[row], number) for number, row in found.items()])
    wanted = {number for _, number in ranks[:size] + ranks[-size:]}
    new = wanted & found.keys()
    if new:  # else nothing more is fetched from the devices
        outputs = _local_rows(output)
        for number in new:
            row = found[number]
            kept[number] = local[row], batch["image"][row].copy(), outputs[row].copy()
    for number in kept.keys() - wanted:
        del kept[number]


def _gather(kept: Kept, size: int, grid: int) -> Kept:
    """The kept images of all processes."""
    if jax.process_count() == 1:
        return kept
    slots = 2 * grid
    numbers, psnr = np.full(slots, -1, np.int32), np.zeros(slots, np.float32)
    pictures = np.zeros((slots, 2, size, size, 3), np.uint8)
    for slot, (number, value) in enumerate(kept.items()):
        numbers[slot], psnr[slot], pictures[slot] = number, value[0], np.stack(value[1:])
    everywhere = multihost_utils.process_allgather((numbers, psnr, pictures))
    numbers, psnr, pictures = (np.concatenate(part) for part in everywhere)
    return {
        int(number): (float(value), *pair)
        for number, value, pair in zip(numbers, psnr, pictures, strict=True)
        if number >= 0
    }


# --- what is left for people ----------------------------------------------------------------------


def flat_scores(results: dict[int, Result]) -> dict[str, float]:
    """{'psnr_256': ...}, as in metrics.jsonl."""
    return {
        f"{name}_{size}": score
        for size, result in results.items()
        for name, score in result.scores.items()
    }


def row_values(results: dict[int, Result]) -> dict[str, float | bool]:
    """The flat scores, and 'biased_256' where there were too few images for the rFID."""
    return flat_scores(results) | {
        f"biased_{size}": True for size, r in results.items() if r.biased
    }


def score_table(results: dict[int, Result]) -> str:
    """The results as aligned text."""
    names = list(next(iter(results.values())).scores)
    head = ["resolution", "images", *(name.upper() for name in names)]
    rows = [[size, r.count, *(r.scores[n] for n in names)] for size, r in results.items()]
    if any(r.biased for r in results.values()):
        head.append("")
        for row, result in zip(rows, results.values(), strict=True):
            row.append("biased" if result.biased else "")
    return files.table([head, *rows])


def write_grids(
    results: dict[int, Result], workdir: str, name: str, extremes: bool = False
) -> None:
    """WORKDIR/images/NAME_<resolution>.png for each result; `extremes` adds _best and _worst."""
    for size, result in results.items():
        path = os.path.join(workdir, "images", f"{name}_{size}")
        files.write_png(f"{path}.png", result.grid())
        for which, pair in result.extremes.items() if extremes else ():
            files.write_png(f"{path}_{which}.png", _grid(*pair))


def _grid(images: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return files.image_grid((images, outputs, files.difference(images, outputs)))
