# SPDX-License-Identifier: Apache-2.0
"""Reconstruction quality: PSNR, SSIM, LPIPS and rFID of an autoencoder, tables and image grids.

Protocol: ADM centre crop, the model sees [-1, 1], both images are rounded to 8 bits before every
metric, means over images. docs/evaluation.md says what each number is computed on.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax import files
from dcae_jax.config.schema import Data, Evaluate
from dcae_jax.data import pipeline, transforms
from dcae_jax.data.sources import Source
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, networks
from dcae_jax.evaluation.networks import MetricNetworks
from dcae_jax.models import layers
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import precision, sharding

Pair = tuple[np.ndarray, np.ndarray]  # images and their reconstructions, uint8
Extremes = dict[int, tuple[float, np.ndarray, np.ndarray]]  # row number -> PSNR, image, output
SCORES = ("psnr", "ssim", "lpips")  # of each image, in the order of tables
CUT = "_c"  # in a result's name, between the resolution and the number of latent channels


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores of a set of images at one resolution."""

    scores: dict[str, float]  # metric -> value; PSNR, SSIM and LPIPS are means over images
    count: int
    biased: bool  # too few images for a comparable Frechet distance


@dataclasses.dataclass(frozen=True)
class Result(Summary):
    """Scores, and some of the reconstructions."""

    images: np.ndarray  # [grid, size, size, 3] uint8, spread over all
    outputs: np.ndarray  # [grid, size, size, 3] uint8
    extremes: dict[str, Pair]  # 'best', 'worst' by PSNR: images and outputs

    def grid(self) -> np.ndarray:
        """Columns: image, reconstruction, difference."""
        return _grid(self.images, self.outputs)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over images at one resolution; sums over other images can be added."""

    sums: dict[str, float]  # 'count', and metric -> sum over images
    moments: dict[str, metrics.Moments]  # 'image', 'output': of Inception's features, on devices
    preview: Pair  # [grid, size, size, 3] uint8, some of this process's images
    extremes: Extremes  # this process's best and worst


@functools.lru_cache(maxsize=4)  # a training run evaluates many times but compiles once
def eval_step(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable:
    """A jitted function that reconstructs a batch and scores it.

    (weights, networks, channels, moments, images [B, H, W, 3] uint8, mask [B]) -> (moments, sums
    of the scores, PSNR [B], reconstructions [B, H, W, 3] uint8). The moments passed in are donated.
    channels: how many of the latent's to keep, a scalar; None: all.
    """
    rows = NamedSharding(mesh, P(mesh_lib.BATCH_AXES))

    def step(
        weights: Weights,
        metric_networks: MetricNetworks,
        channels: jax.Array | None,
        moments: dict[str, metrics.Moments],
        images: jax.Array,
        mask: jax.Array,
    ) -> tuple[dict[str, metrics.Moments], dict[str, jax.Array], jax.Array, jax.Array]:
        model = weights_lib.merge(graphdef, sharding.replicate_weights(weights, mesh))
        with precision.of("float32"):  # also for a bfloat16 model's float32 sums
            output = transforms.to_float(images)
            if channels is None:
                output = model(output)
            else:
                output = model.decode(layers.first_channels(model.encode(output), channels))
        # From here on, levels in float32, whatever the model's dtype. Each image stays on one
        # device, so the networks' resizing and pooling need no rows from another device.
        output = transforms.to_levels(output)
        target = images.astype(jnp.float32)
        target, output = (jax.lax.with_sharding_constraint(x, rows) for x in (target, output))
        scores = {"psnr": metrics.psnr(output, target), "ssim": metrics.ssim(output, target)}
        if "lpips" in metric_networks:
            scores["lpips"] = networks.lpips_distance(metric_networks["lpips"], target, output)
        if "inception" in metric_networks:
            inception = metric_networks["inception"]
            for name, levels in (("image", target), ("output", output)):
                features, _ = networks.inception_features(inception, levels, "pytorch-fid")
                moments = moments | {name: metrics.moments_update(moments[name], features, mask)}
        sums = {name: jnp.sum(jnp.where(mask > 0, score, 0)) for name, score in scores.items()}
        sums["count"] = jnp.sum(mask)
        return moments, sums, scores["psnr"], output.astype(jnp.uint8)

    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(step, donate_argnums=3, out_shardings=(everywhere, everywhere, rows, rows))


class Stopped(Exception):
    """The evaluation stopped because its caller asked for it."""


def evaluate(
    settings: Evaluate,
    data: Data,
    graphdef: nnx.GraphDef,
    weights: Weights,
    mesh: Mesh,
    source: Source,
    metric_networks: MetricNetworks,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Result]:
    """Scores at each of settings.resolutions, counting every image of `source` once.

    The keys are resolutions, as in '256'; with settings.channels, '256_c16' for each number of
    latent channels. The model's latents must then be cuttable.

    stopped: called before each batch; if true, raises Stopped. Raises UserError.
    """
    step = eval_step(graphdef, mesh)
    results = {}
    count = pipeline.evaluated(source, settings.count, settings.crops)
    shown = pipeline.spread(min(count, len(source)), min(count, settings.grid))
    for name, (size, channels) in result_names(settings).items():
        moments: dict[str, metrics.Moments] = {}
        if "inception" in metric_networks:
            for side in ("image", "output"):
                moments[side] = networks.empty_moments(metric_networks, mesh)
        batches = networks.batches(settings, data, source, size, mesh)
        kept = None if channels is None else np.int32(channels)
        run = functools.partial(step, weights, metric_networks, kept)
        totals = accumulate(run, moments, batches, mesh, shown, settings.grid, stopped)
        results[name] = finalize(totals, size, settings.grid)
    return results


def result_names(settings: Evaluate) -> dict[str, tuple[int, int | None]]:
    """{name of a result: (resolution, latent channels; None: all)}, in the order of tables."""
    cuts = [("", None), *((f"{CUT}{count}", count) for count in settings.channels)]
    return {
        f"{size}{suffix}": (size, count)
        for size in settings.resolutions
        for suffix, count in cuts[bool(settings.channels) :]
    }


def accumulate(
    step: Callable,
    moments: dict[str, metrics.Moments],
    batches: Iterable[tuple[np.ndarray, pipeline.Batch]],
    mesh: Mesh,
    shown: Sequence[int] | np.ndarray,
    grid: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Totals:
    """Sums over the images of `batches`. Raises UserError, and Stopped.

    step: an `eval_step` with its first three arguments bound; moments: empty ones, donated. shown:
    ascending row numbers for the preview; a row that is another process's or unreadable is replaced
    by the next one.
    """
    all_sums: list[dict[str, jax.Array]] = []

    def reconstructed() -> Iterator[tuple[np.ndarray, pipeline.Batch, jax.Array, jax.Array]]:
        nonlocal moments
        for numbers, batch in batches:
            if stopped():
                raise Stopped
            placed = mesh_lib.put_batch(batch, mesh)
            moments, sums, psnr, output = step(moments, placed["image"], placed["mask"])
            all_sums.append(sums)
            yield numbers, batch, psnr, output

    images, outputs, extremes = [], [], {}
    waiting = list(shown)
    for numbers, batch, psnr, output in networks.one_behind(reconstructed()):
        rows = []
        for row in np.flatnonzero(batch["mask"] > 0):
            if waiting and numbers[row] >= waiting[0]:
                del waiting[0]
                rows.append(int(row))
        if rows or not images:
            images.append(batch["image"][np.array(rows, int)])
            outputs.append(_local_rows(output)[rows] if rows else images[-1])
        _keep_extremes(extremes, batch, numbers, psnr, output, grid)
    if not images:
        raise _no_image()
    fetched = jax.device_get(all_sums)
    names = [name for name in (*SCORES, "count") if name in fetched[0]]  # JAX sorts keys
    sums = {name: math.fsum(float(batch[name]) for batch in fetched) for name in names}
    preview = np.concatenate(images), np.concatenate(outputs)
    return Totals(sums, moments, preview, extremes)


def finalize(totals: Totals, size: int, grid: int) -> Result:
    """The means and the rFID. Raises UserError if no image was read."""
    count = round(totals.sums["count"])
    if not count:
        raise _no_image()
    scores = {name: total / count for name, total in totals.sums.items() if name != "count"}
    biased = False
    if totals.moments and count > 1:
        image, output = (metrics.moments_finalize(totals.moments[k]) for k in ("image", "output"))
        scores["rfid"] = metrics.frechet_distance(*output, *image)
        biased = metrics.biased(count)
    found = _gather(totals.extremes, size, grid)
    order = sorted(found, key=lambda number: (found[number][0], number))
    extremes = {}
    for name, chosen in (("worst", order[:grid]), ("best", order[::-1][:grid])):
        images, outputs = (np.stack([found[number][i] for number in chosen]) for i in (1, 2))
        extremes[name] = images, outputs
    return Result(scores, count, biased, *totals.preview, extremes)


def _no_image() -> UserError:
    return UserError("no image could be read for evaluation; the log names the files")


def _local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a batch that may be sharded over other processes too."""
    if array.is_fully_addressable:
        return np.asarray(array)
    rows = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])


def _keep_extremes(
    extremes: Extremes,
    batch: pipeline.Batch,
    numbers: np.ndarray,
    psnr: jax.Array,
    output: jax.Array,
    grid: int,
) -> None:
    """Updates `extremes` to the `grid` best and worst images so far, this batch included."""
    local = np.nan_to_num(_local_rows(psnr), nan=-math.inf).tolist()
    rows = {int(number): row for row, number in enumerate(numbers) if batch["mask"][row] > 0}
    ranks = [(value[0], number) for number, value in extremes.items()]
    ranks = sorted(ranks + [(local[row], number) for number, row in rows.items()])
    wanted = {number for _, number in ranks[:grid] + ranks[-grid:]}
    new = wanted & rows.keys()
    if new:  # otherwise nothing is fetched from the devices
        outputs = _local_rows(output)
        for number in new:
            row = rows[number]
            extremes[number] = local[row], batch["image"][row].copy(), outputs[row].copy()
    for number in extremes.keys() - wanted:
        del extremes[number]


def _gather(extremes: Extremes, size: int, grid: int) -> Extremes:
    """The extremes of all processes."""
    if jax.process_count() == 1:
        return extremes
    slots = 2 * grid
    numbers, psnr = np.full(slots, -1, np.int32), np.zeros(slots, np.float32)
    pairs = np.zeros((slots, 2, size, size, 3), np.uint8)
    for slot, (number, value) in enumerate(extremes.items()):
        numbers[slot], psnr[slot], pairs[slot] = number, value[0], np.stack(value[1:])
    everywhere = multihost_utils.process_allgather((numbers, psnr, pairs))
    numbers, psnr, pairs = (np.concatenate(part) for part in everywhere)
    return {
        int(number): (float(value), *pair)
        for number, value, pair in zip(numbers, psnr, pairs, strict=True)
        if number >= 0
    }


# --- reports --------------------------------------------------------------------------------------


def flat_scores(results: Mapping[str, Summary]) -> dict[str, float]:
    """{'psnr_256': ...} or {'psnr_256_c16': ...}, as in metrics.jsonl."""
    return {
        f"{name}_{where}": score
        for where, result in results.items()
        for name, score in result.scores.items()
    }


def row_values(results: Mapping[str, Summary]) -> dict[str, float | bool]:
    """The flat scores, and 'biased_256' where there were too few images for the rFID."""
    return flat_scores(results) | {
        f"biased_{where}": True for where, r in results.items() if r.biased
    }


def score_table(results: Mapping[str, Summary]) -> str:
    """The results as aligned text."""
    names = list(next(iter(results.values())).scores)
    cut = any(CUT in where for where in results)
    head = ["resolution", *["channels"] * cut, "images", *(name.upper() for name in names)]
    rows = [
        [*where.split(CUT), r.count, *(r.scores[n] for n in names)] for where, r in results.items()
    ]
    if any(r.biased for r in results.values()):
        head.append("")
        for row, result in zip(rows, results.values(), strict=True):
            row.append("biased" if result.biased else "")
    return files.table([head, *rows])


def channel_plot(results: Mapping[str, Summary]) -> bytes:
    """PSNR over the number of latent channels, a curve per resolution, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained", dpi=150)
    axes = figure.add_subplot(xlabel="latent channels", ylabel="PSNR (dB)")
    curves: dict[str, list[tuple[int, float]]] = {}
    for where, result in results.items():
        size, _, count = where.partition(CUT)
        curves.setdefault(size, []).append((int(count), result.scores["psnr"]))
    for size, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{size} pixels")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def write_grids(
    results: Mapping[str, Result], workdir: str, name: str, extremes: bool = False
) -> None:
    """`WORKDIR/images/NAME_<resolution>.png` for each result; `extremes` adds _best and _worst."""
    for where, result in results.items():
        path = os.path.join(workdir, "images", f"{name}_{where}")
        files.write_png(f"{path}.png", result.grid())
        for which, pair in result.extremes.items() if extremes else ():
            files.write_png(f"{path}_{which}.png", _grid(*pair))


def _grid(images: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return files.image_grid((images, outputs, files.difference(images, outputs)))
