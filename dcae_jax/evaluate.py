# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: how good reconstructions or samples are, tables and picture grids.

Protocol: ADM centre crop, the model sees [-1, 1], both images are rounded to 8 bits before every
metric, means over images. docs/evaluation.md says what each number is computed on.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax import (
    api,
    checkpoint,
    data,
    judge_samples,
    judging,
    lock,
    metrics,
    report,
    sharding,
    sources,
)
from dcae_jax import config as config_lib
from dcae_jax.config import UserError
from dcae_jax.judging import Judges, load_judges
from dcae_jax.models import layers, lpips
from dcae_jax.models.layers import Array, Weights

Kept = dict[int, tuple[float, np.ndarray, np.ndarray]]  # image number -> PSNR, image, output

PROTOCOLS = {"imagenet-256": 256, "imagenet-512": 512}  # name -> pixels a side
PROTOCOL_COUNT = 50_000  # images of ImageNet's validation set, and samples of a published FID
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
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))

    def judge(weights: Weights, judges: Judges, moments: Any, images: Array, mask: Array):
        model = layers.merge(graph, sharding.replicate_weights(weights, mesh))
        target = images.astype(jnp.float32)
        # From here on levels in float32, whatever the model computes in. An image stays on one
        # device, where the judges' resizing and pooling need no neighbour's rows.
        output = metrics.to_levels(model(target / 127.5 - 1))
        target, output = (jax.lax.with_sharding_constraint(x, rows) for x in (target, output))
        scores = {"psnr": metrics.psnr(output, target), "ssim": metrics.ssim(output, target)}
        if "lpips" in judges:
            scores["lpips"] = _lpips(judges["lpips"], target, output)
        if "inception" in judges:
            moments = {
                name: metrics.moments_update(
                    moments[name],
                    judging.pool3(judges["inception"], levels, "pytorch-fid")[0],
                    mask,
                )
                for name, levels in (("image", target), ("output", output))
            }
        sums = {name: jnp.sum(jnp.where(mask > 0, score, 0)) for name, score in scores.items()}
        sums["count"] = jnp.sum(mask)
        return moments, sums, scores["psnr"], output.astype(jnp.uint8)

    everywhere = sharding.replicated(mesh)
    return jax.jit(judge, donate_argnums=2, out_shardings=(everywhere, everywhere, rows, rows))


def _lpips(weights: Weights, target: Array, output: Array) -> Array:
    """The published LPIPS of levels 0..255: [B]."""
    x, y = target / 127.5 - 1, output / 127.5 - 1
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
        moments = {name: judging.empty_moments(judges, mesh) for name in ("image", "output")}
    every_sum, first, kept, waiting = [], None, {}, None

    def look(batch, numbers, psnr, output):
        nonlocal first
        if first is None:
            shown = int(min(settings.grid, batch["mask"].sum()))
            first = batch["image"][:shown], _local_rows(output)[:shown]
        _keep_extremes(kept, batch, numbers, psnr, output, settings.grid)

    for numbers, batch in judging.batches(config, source, size, mesh):
        if stopped():
            raise Stopped
        placed = sharding.put_batch(batch, mesh)
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
    kept: Kept, batch: data.Batch, numbers: np.ndarray, psnr: Array, output: Array, size: int
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
    return report.table([head, *rows])


def write_grids(
    results: dict[int, Result], workdir: str, name: str, extremes: bool = False
) -> None:
    """WORKDIR/images/NAME_<resolution>.png for each result; `extremes` adds _best and _worst."""
    for size, result in results.items():
        path = os.path.join(workdir, "images", f"{name}_{size}")
        report.write_png(f"{path}.png", result.grid())
        for which, pair in result.extremes.items() if extremes else ():
            report.write_png(f"{path}_{which}.png", _grid(*pair))


def _grid(images: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return report.image_grid((images, outputs, report.difference(images, outputs)))


def _write(config: Any, workdir: str, step: int, results: dict[int, Result]) -> None:
    """WORKDIR/evaluate.json and the row of `step` in metrics.jsonl."""
    scores = {
        str(size): {**r.scores, "images": r.count} | ({"biased": True} if r.biased else {})
        for size, r in results.items()
    }
    summary = {"config": config_lib.to_json(config), "step": step, "results": scores}
    report.write_json(os.path.join(workdir, "evaluate.json"), summary)
    report.merge_row(workdir, step, row_values(results))
    logging.info("%s\nwritten to %s", score_table(results), workdir)


# --- the job --------------------------------------------------------------------------------------


def run(config: Any, workdir: str) -> int:
    """The job `evaluate`: a trained model on a data set or one picture, or samples."""
    config_lib.check(config)
    config = resolve(config)
    with lock.hold(workdir, jax.process_index()):
        return _run(config, workdir)


def _run(config: Any, workdir: str) -> int:
    if config.evaluate.samples:
        return _run_samples(config, workdir)
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to a workdir or checkpoint")
    mesh = sharding.make_mesh(config.mesh)
    judges = load_judges(config, mesh)
    model = api.load_autoencoder(config.init_from, config.dtype, mesh, config.weights)
    if jax.process_index() == 0 and judging.locked(judges):
        logging.info("%s", judging.locked(judges))
    if config.data.source == "folder" and os.path.isfile(config.data.path):
        return _run_one(config, model, judges, workdir)
    for size in config.evaluate.resolutions:
        check_resolution(size, model.compression, "evaluate.resolutions")
        sharding.check_height(size, mesh, key="evaluate.resolutions", compression=model.compression)
        if "lpips" in judges and size < lpips.MIN_SIZE["alex"]:
            raise UserError(
                f"evaluate.resolutions={size} is too small for LPIPS, which needs "
                f"{lpips.MIN_SIZE['alex']} pixels; leave evaluate.lpips_weights empty"
            )
    source = sources.evaluation_source(config.data)
    if config.evaluate.protocol:
        _warn_of_count(config.evaluate.protocol, len(source), "images")
    results = evaluate(config, model.graph, model.weights, mesh, source, judges)
    if jax.process_index() == 0:
        write_grids(results, workdir, "evaluate", extremes=True)
        _write(config, workdir, step_of(config.init_from), results)
    return 0


def resolve(config: Any) -> Any:
    """A copy of `config` with what the protocol fixes. Raises UserError where keys contradict it.

    Empty evaluate.resolutions become the protocol's, or config.resolution.
    """
    config = config.copy_and_resolve_references()
    settings, name = config.evaluate, config.evaluate.protocol
    size = PROTOCOLS.get(name, config.resolution)
    if settings.reference and not settings.samples:
        raise UserError(
            f"evaluate.reference={settings.reference!r} is for evaluate.samples; leave it empty: "
            "the rFID of reconstructions is against the images themselves"
        )
    if settings.samples and config.init_from:
        raise UserError(
            f"evaluate.samples={settings.samples!r} and init_from={config.init_from!r} are two "
            "jobs; give one of them"
        )
    if name or not settings.samples:  # samples have a size of their own
        settings.resolutions = tuple(settings.resolutions) or (size,)
    if not name:
        return config
    needed = {
        "evaluate.resolutions": (settings.resolutions, (size,)),
        "evaluate.crops": (settings.crops, 1),
        "evaluate.count": (settings.count, 0),
    }
    if not settings.samples and config.data.source == "tfds":
        needed["data.split"] = (config.data.split, "validation")
    for key, (found, value) in needed.items():
        if found != value:
            raise UserError(
                f"{key}={found!r} contradicts evaluate.protocol={name!r}, which has {value!r}; "
                "leave one of the two out"
            )
    if not settings.samples and config.data.source not in ("folder", "tfds"):
        raise UserError(
            f"data.source={config.data.source!r} contradicts evaluate.protocol={name!r}; name "
            "ImageNet's validation images with data.source=folder and data.path, or with tfds"
        )
    if settings.samples and not settings.reference:
        raise UserError(
            f"evaluate.protocol={name!r} needs evaluate.reference: ImageNet's training images, or "
            "an .npz of their mu and sigma"
        )
    return config


def _run_samples(config: Any, workdir: str) -> int:
    """Scores of samples by themselves, and against a reference."""
    settings = config.evaluate
    if not settings.inception_weights:
        _, what, source, where, converted = judging.FILES["inception"]
        raise UserError(
            f"evaluate.samples needs evaluate.inception_weights: fetch {source} ({where}), "
            f"{judging.conversion(source, converted)}"
        )
    mesh = sharding.make_mesh(config.mesh)
    source = judge_samples.image_source(settings.samples, "evaluate.samples")
    width, height = source[0][0].size
    size = width
    if width != height or tuple(settings.resolutions) not in ((), (size,)):
        raise UserError(
            f"evaluate.samples={settings.samples!r} has images of {width}x{height}, which is not "
            f"evaluate.resolutions={settings.resolutions or 'a square'}; judge them as they were "
            "sampled"
        )
    if settings.reference:
        judge_samples.array_names(settings.reference, "evaluate.reference")
    judges = load_judges(config, mesh)
    if settings.protocol:
        _warn_of_count(settings.protocol, len(source), "samples")
    reference = None
    if settings.reference:
        reference = judge_samples.reference_statistics(config, mesh, judges, size, workdir)
    else:
        logging.info("evaluate.reference is empty: the Inception score alone")
    samples = judge_samples.statistics(config, mesh, judges, source, size, settings.count)
    if jax.process_index() == 0:
        scores = judge_samples.sample_scores(samples, reference)
        biased = "fid" in scores and metrics.biased(samples.count)
        if "fid" in scores and reference.count and not biased:
            biased = metrics.biased(reference.count)
        empty = np.zeros((0, size, size, 3), np.uint8)
        _write(config, workdir, 0, {size: Result(scores, samples.count, empty, empty, {}, biased)})
    return 0


def _warn_of_count(protocol: str, count: int, what: str) -> None:
    if count != PROTOCOL_COUNT:
        logging.warning(
            "%s has %s %s, there are %s: no published figure compares with this",
            protocol,
            f"{PROTOCOL_COUNT:,}",
            what,
            f"{count:,}",
        )


def step_of(path: str) -> int:
    """The step of the checkpoint that `init_from` = path stands for; 0 where it has none."""
    path = os.path.abspath(os.path.expanduser(path))
    match = re.search(rf"/{checkpoint.FOLDER}/(\d+)$", path)
    return int(match[1]) if match else max(checkpoint.saved_steps(path), default=0)


def _run_one(config: Any, model: api.Autoencoder, judges: Judges, workdir: str) -> int:
    """One picture at its own size: padded to a multiple of f by reflection, then cropped back."""
    pixels = read_picture(config.data.path)
    height, width = pixels.shape[:2]
    pad = [(0, -size % model.compression) for size in (height, width)]
    padded = np.pad(pixels, (*pad, (0, 0)), mode="symmetric").astype(np.float32) / 127.5 - 1
    output = model.decode(model.encode(padded[None]))[:, :height, :width]
    levels = np.asarray(metrics.to_levels(output))
    target = pixels[None].astype(np.float32)
    scores = {
        "psnr": float(jax.jit(metrics.psnr)(levels, target)[0]),
        "ssim": float(jax.jit(metrics.ssim)(levels, target)[0]),
    }
    if "lpips" in judges and min(height, width) >= lpips.MIN_SIZE["alex"]:
        scores["lpips"] = float(jax.jit(_lpips)(judges["lpips"], target, levels)[0])
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
        "%s: %s; pictures in %s/images",
        config.data.path,
        ", ".join(f"{name.upper()} {value:.4f}" for name, value in scores.items()),
        workdir,
    )
    return 0


def read_picture(path: str) -> np.ndarray:
    """The image file `path` as [H, W, 3] uint8. Raises UserError."""
    try:
        return np.asarray(sources.folder(path)[0][0])
    except UserError:
        raise
    except Exception as error:  # whatever a decoder raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.path={path!r} cannot be read ({reason}); name a picture") from error


def check_resolution(size: int, compression: int, key: str) -> None:
    """Raises UserError, naming the nearest sizes, unless the model can halve `size` evenly."""
    if size < compression or size % compression:
        down, up = size // compression * compression, -(-size // compression) * compression
        nearest = f"{down} or {up}" if down else f"{up}"
        raise UserError(
            f"{key}={size} is no multiple of the model's f={compression}; try {nearest}"
        )
