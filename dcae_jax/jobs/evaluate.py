# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import logging
import os
import re
from typing import Any

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config import Config
from dcae_jax.data import sources, transforms
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, networks, reconstruction
from dcae_jax.evaluation import samples as samples_lib
from dcae_jax.evaluation.networks import Judges, load_judges
from dcae_jax.evaluation.reconstruction import Result
from dcae_jax.models import lpips
from dcae_jax.runtime import lease
from dcae_jax.runtime import mesh as mesh_lib

PROTOCOLS = {"imagenet-256": 256, "imagenet-512": 512}  # name -> pixels a side
PROTOCOL_COUNT = 50_000  # images of ImageNet's validation set, and samples of a published FID


def _write(config: Any, workdir: str, step: int, results: dict[int, Result]) -> None:
    """WORKDIR/evaluate.json and the row of `step` in metrics.jsonl."""
    scores = {
        str(size): {**r.scores, "images": r.count} | ({"biased": True} if r.biased else {})
        for size, r in results.items()
    }
    summary = {"config": config_lib.to_json(config), "step": step, "results": scores}
    files.write_json(os.path.join(workdir, "evaluate.json"), summary)
    files.merge_row(workdir, step, reconstruction.row_values(results))
    logging.info("%s\nwritten to %s", reconstruction.score_table(results), workdir)


# --- the job --------------------------------------------------------------------------------------


def run(config: Any, workdir: str) -> int:
    """The job `evaluate`: a trained model on a data set or one picture, or samples."""
    config = resolve(config)
    with lease.hold(workdir, jax.process_index()):
        return _run(config, workdir)


def _run(config: Any, workdir: str) -> int:
    if config.evaluate.samples:
        return _run_samples(config, workdir)
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to a workdir or checkpoint")
    mesh = mesh_lib.make_mesh(config.mesh)
    judges = load_judges(config, mesh)
    model = autoencoder.load_autoencoder(config.init_from, config.dtype, mesh, config.weights)
    if jax.process_index() == 0 and networks.locked(judges):
        logging.info("%s", networks.locked(judges))
    if config.data.source == "folder" and os.path.isfile(config.data.path):
        return _run_one(config, model, judges, workdir)
    for size in config.evaluate.resolutions:
        config_lib.check_resolution(size, model.compression, "evaluate.resolutions")
        mesh_lib.check_height(size, mesh, key="evaluate.resolutions", compression=model.compression)
        if "lpips" in judges and size < lpips.MIN_SIZE["alex"]:
            raise UserError(
                f"evaluate.resolutions={size} is too small for LPIPS, which needs "
                f"{lpips.MIN_SIZE['alex']} pixels; leave evaluate.lpips_weights empty"
            )
    source = sources.evaluation_source(config.data)
    if config.evaluate.protocol:
        _warn_of_count(config.evaluate.protocol, len(source), "images")
    results = reconstruction.evaluate(config, model.graphdef, model.weights, mesh, source, judges)
    if jax.process_index() == 0:
        reconstruction.write_grids(results, workdir, "evaluate", extremes=True)
        _write(config, workdir, step_of(config.init_from), results)
    return 0


def resolve(config: Config) -> Config:
    """A copy of `config` with what the protocol fixes. Raises UserError where keys contradict it.

    Empty evaluate.resolutions become the protocol's, or config.resolution.
    """
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
        config = config_lib.replace(
            config, evaluate={"resolutions": settings.resolutions or (size,)}
        )
        settings = config.evaluate
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
        _, what, source, where, converted = networks.FILES["inception"]
        raise UserError(
            f"evaluate.samples needs evaluate.inception_weights: fetch {source} ({where}), "
            f"{networks.conversion(source, converted)}"
        )
    mesh = mesh_lib.make_mesh(config.mesh)
    source = samples_lib.image_source(settings.samples, "evaluate.samples")
    width, height = source[0][0].size
    size = width
    if width != height or tuple(settings.resolutions) not in ((), (size,)):
        raise UserError(
            f"evaluate.samples={settings.samples!r} has images of {width}x{height}, which is not "
            f"evaluate.resolutions={settings.resolutions or 'a square'}; judge them as they were "
            "sampled"
        )
    if settings.reference:
        samples_lib.array_names(settings.reference, "evaluate.reference")
    judges = load_judges(config, mesh)
    if settings.protocol:
        _warn_of_count(settings.protocol, len(source), "samples")
    reference = None
    if settings.reference:
        reference = samples_lib.reference_statistics(config, mesh, judges, size, workdir)
    else:
        logging.info("evaluate.reference is empty: the Inception score alone")
    samples = samples_lib.statistics(config, mesh, judges, source, size, settings.count)
    if jax.process_index() == 0:
        scores = samples_lib.sample_scores(samples, reference)
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
    match = re.search(rf"/{checkpoints.FOLDER}/(\d+)$", path)
    return int(match[1]) if match else max(checkpoints.saved_steps(path), default=0)


def _run_one(config: Any, model: autoencoder.Autoencoder, judges: Judges, workdir: str) -> int:
    """One picture at its own size: padded to a multiple of f by reflection, then cropped back."""
    pixels = read_picture(config.data.path)
    height, width = pixels.shape[:2]
    pad = [(0, -size % model.compression) for size in (height, width)]
    padded = transforms.to_float(np.pad(pixels, (*pad, (0, 0)), mode="symmetric"))
    output = model.decode(model.encode(padded[None]))[:, :height, :width]
    levels = np.asarray(transforms.to_levels(output))
    target = pixels[None].astype(np.float32)
    scores = {
        "psnr": float(jax.jit(metrics.psnr)(levels, target)[0]),
        "ssim": float(jax.jit(metrics.ssim)(levels, target)[0]),
    }
    if "lpips" in judges and min(height, width) >= lpips.MIN_SIZE["alex"]:
        scores["lpips"] = float(jax.jit(reconstruction._lpips)(judges["lpips"], target, levels)[0])
    result = levels[0].astype(np.uint8)
    pictures = {
        "input": pixels,
        "reconstruction": result,
        "difference": files.difference(pixels, result),
    }
    for name, picture in pictures.items():
        files.write_png(os.path.join(workdir, "images", f"{name}.png"), picture)
    files.write_json(
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
