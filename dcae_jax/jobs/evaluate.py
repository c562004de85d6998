# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: scores reconstructions of a data set or one image, or samples."""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files, models
from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config import Config
from dcae_jax.data import huggingface, sources, transforms
from dcae_jax.errors import MachineError, UserError
from dcae_jax.evaluation import metrics, networks, reconstruction
from dcae_jax.evaluation import samples as samples_lib
from dcae_jax.evaluation.networks import MetricNetworks
from dcae_jax.evaluation.reconstruction import Summary
from dcae_jax.models import lpips
from dcae_jax.runtime import lease
from dcae_jax.runtime import mesh as mesh_lib

RESULTS = "evaluate.json"  # in the workdir
PROTOCOLS = {"imagenet-256": 256, "imagenet-512": 512}  # name -> pixels per side
PROTOCOL_COUNT = 50_000  # images of ImageNet's validation set, and samples of a published FID


def run(config: Config, workdir: str) -> int:
    """Evaluates a trained model on a data set or one image, or samples."""
    config = resolve(config)
    with lease.hold(workdir, jax.process_index()):
        _check_workdir(config.init_from, workdir)
        if config.evaluate.samples:
            _evaluate_samples(config, workdir)
        else:
            _evaluate_model(config, workdir)
    return 0


def _check_workdir(init_from: str, workdir: str) -> None:
    """Raises UserError for the workdir of a run other than init_from's: its rows would be mixed."""
    own, _ = checkpoints.split_path(files.absolute(init_from))
    other = not init_from or files.real(own) != files.real(workdir)
    if other and files.exists(os.path.join(workdir, checkpoints.CONFIG)):
        raise UserError(
            f"{workdir} holds a run, but not that of init_from={init_from!r}: its {files.METRICS} "
            "would mix the two; use another --workdir"
        )


def _evaluate_model(config: Config, workdir: str) -> None:
    """Scores a model's reconstructions of one image or a data set."""
    settings, data = config.evaluate, config.data
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to a workdir or checkpoint")
    mesh = mesh_lib.make_mesh(config.mesh)
    metric_networks = networks.load_networks(settings, mesh)
    model = autoencoder.load_autoencoder(
        config.init_from, config.dtype, mesh, config.weights, config.model.variant
    )
    missing = networks.missing_files(metric_networks)
    if jax.process_index() == 0 and missing:
        logging.info("%s", missing)
    models.check_channels(model.architecture, settings.channels, "evaluate.channels")
    if data.source == "folder" and files.isfile(data.path):
        if settings.channels:
            raise UserError(
                f"evaluate.channels={settings.channels} is for a data set, and data.path="
                f"{data.path!r} is one image; leave it out, or name the image's folder"
            )
        _evaluate_image(data.path, model, metric_networks, workdir)
        return
    for size in settings.resolutions:
        config_lib.check_resolution(size, model.compression, "evaluate.resolutions")
        mesh_lib.check_height(size, mesh, key="evaluate.resolutions", compression=model.compression)
        if "lpips" in metric_networks and size < lpips.MIN_SIZE["alex"]:
            raise UserError(
                f"evaluate.resolutions={size} is too small for LPIPS, which needs "
                f"{lpips.MIN_SIZE['alex']} pixels; leave evaluate.lpips_weights empty"
            )
    source = sources.evaluation_source(data)
    if settings.protocol:
        _warn_of_count(settings.protocol, len(source), "images")
    results = reconstruction.evaluate(
        settings, data, model.graphdef, model.weights, mesh, source, metric_networks
    )
    if jax.process_index() == 0:
        reconstruction.write_grids(results, workdir, "evaluate", extremes=True)
        if settings.channels:
            plot = os.path.join(workdir, "images", "evaluate_channels.png")
            files.write_file(plot, reconstruction.channel_plot(results))
        _write(config, workdir, step_of(config.init_from), results)


def resolve(config: Config) -> Config:
    """`config` with the protocol's settings. Raises UserError if keys contradict them.

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
            f"evaluate.samples={settings.samples!r} and init_from={config.init_from!r} exclude "
            "each other; give one of them"
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
    has_splits = config.data.source == "tfds" or (
        config.data.source == "huggingface" and bool(huggingface.splits_of(config.data.path))
    )
    if not settings.samples and has_splits:
        needed["data.split"] = (config.data.split, "validation")
    if not settings.samples:
        dtype = "float32" if config.dtype == "auto" else config.dtype
        config = config_lib.replace(config, dtype=dtype)
        needed["dtype"] = (dtype, "float32")  # as the authors' evaluator computes
    for key, (found, value) in needed.items():
        if found != value:
            raise UserError(
                f"{key}={found!r} contradicts evaluate.protocol={name!r}, which has {value!r}; "
                "leave one of the two out"
            )
    if not settings.samples and config.data.source not in (*sources.FILES, "tfds"):
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


def _evaluate_samples(config: Config, workdir: str) -> None:
    """Scores samples, against a reference if one is given."""
    settings, data = config.evaluate, config.data
    settings = dataclasses.replace(
        settings,
        samples=files.local(settings.samples),
        reference=files.local(settings.reference),
    )
    if not settings.inception_weights:
        file = networks.FILES["inception"]
        raise UserError(
            f"evaluate.samples needs evaluate.inception_weights: fetch {file.source} "
            f"({file.host}), {file.conversion}"
        )
    mesh = mesh_lib.make_mesh(config.mesh)
    source = samples_lib.image_source(settings.samples, "evaluate.samples")
    width, height = source[0][0].size
    size = width
    if width != height or tuple(settings.resolutions) not in ((), (size,)):
        raise UserError(
            f"evaluate.samples={settings.samples!r} has images of {width}x{height}, not of "
            f"evaluate.resolutions={settings.resolutions or '() (square)'}; evaluate them at the "
            "size they were sampled at"
        )
    if settings.reference:
        samples_lib.array_names(settings.reference, "evaluate.reference")
    metric_networks = networks.load_networks(settings, mesh)
    if settings.protocol:
        _warn_of_count(settings.protocol, len(source), "samples")
    reference = None
    if settings.reference:
        reference = samples_lib.reference_statistics(
            settings, data, mesh, metric_networks, size, workdir
        )
    else:
        logging.info("evaluate.reference is empty: computing only the Inception score")
    samples = samples_lib.statistics(settings, data, mesh, metric_networks, source, size)
    if jax.process_index() == 0:
        scores = samples_lib.sample_scores(samples, reference)
        counts = (samples.count, reference.count) if reference else ()
        biased = any(metrics.biased(count) for count in counts if count)
        _write(config, workdir, 0, {f"{size}": Summary(scores, samples.count, biased)})


def _write(config: Config, workdir: str, step: int, results: Mapping[str, Summary]) -> None:
    """Writes WORKDIR/evaluate.json and the row of `step` in metrics.jsonl."""
    scores = {
        where: {**r.scores, "images": r.count} | ({"biased": True} if r.biased else {})
        for where, r in results.items()
    }
    summary = {"config": config_lib.to_json(config), "step": step, "results": scores}
    files.write_json(os.path.join(workdir, RESULTS), summary)
    files.merge_row(workdir, step, reconstruction.row_values(results))
    logging.info("%s\nwritten to %s", reconstruction.score_table(results), workdir)


def _warn_of_count(protocol: str, count: int, what: str) -> None:
    if count != PROTOCOL_COUNT:
        logging.warning(
            "%s needs %s %s, but got %s: the scores are not comparable with published ones",
            protocol,
            f"{PROTOCOL_COUNT:,}",
            what,
            f"{count:,}",
        )


def step_of(path: str) -> int:
    """The step of the checkpoint in `path` (init_from); 0 if there is none."""
    path = files.absolute(path)
    match = re.search(rf"/{checkpoints.FOLDER}/(\d+)$", path)
    return int(match[1]) if match else max(checkpoints.saved_steps(path), default=0)


def _evaluate_image(
    path: str, model: autoencoder.Autoencoder, metric_networks: MetricNetworks, workdir: str
) -> None:
    """Scores one image at its own size: padded by reflection to a multiple of f, then cropped."""
    pixels = read_image(path)
    height, width = pixels.shape[:2]
    pad = [(0, -size % model.compression) for size in (height, width)]
    padded = transforms.to_float(np.pad(pixels, (*pad, (0, 0)), mode="symmetric"))
    output = np.asarray(model.decode(model.encode(padded[None])))[:, :height, :width]
    levels = transforms.to_levels(output)
    target = pixels[None].astype(np.float32)
    scores = {
        "psnr": float(jax.jit(metrics.psnr)(levels, target)[0]),
        "ssim": float(jax.jit(metrics.ssim)(levels, target)[0]),
    }
    if "lpips" in metric_networks and min(height, width) >= lpips.MIN_SIZE["alex"]:
        distance = jax.jit(networks.lpips_distance)(metric_networks["lpips"], target, levels)
        scores["lpips"] = float(distance[0])
    result = levels[0].astype(np.uint8)
    images = {
        "input": pixels,
        "reconstruction": result,
        "difference": files.difference(pixels, result),
    }
    for name, image in images.items():
        files.write_png(os.path.join(workdir, "images", f"{name}.png"), image)
    files.write_json(os.path.join(workdir, RESULTS), {"results": {path: scores}})
    logging.info(
        "%s: %s; images in %s/images",
        path,
        ", ".join(f"{name.upper()} {value:.4f}" for name, value in scores.items()),
        workdir,
    )


def read_image(path: str) -> np.ndarray:
    """The image file `path` as [H, W, 3] uint8. Raises UserError."""
    try:
        return np.asarray(sources.folder(path)[0][0])
    except (UserError, MachineError):
        raise
    except Exception as error:  # whatever a decoder raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.path={path!r} cannot be read ({reason}); name an image") from error
