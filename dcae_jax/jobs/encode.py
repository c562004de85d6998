# SPDX-License-Identifier: Apache-2.0
"""The job `encode`: images -> shards of latents, their statistics and a manifest.

Shard s holds shard_size crops, from number s * shard_size on. One process encodes it on its own
devices and renames it when it is complete; a JSON file beside it holds its sums. The manifest is
computed from those files alone, so an interrupted run ends with the same bytes. docs/latents.md
describes the format.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax import config as config_lib
from dcae_jax import files, models
from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config import Config
from dcae_jax.config.schema import MeshSizes
from dcae_jax.data import contents, latents, pipeline, sources, transforms
from dcae_jax.data.latents import Shard, ShardSums
from dcae_jax.errors import UserError
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import distributed, lease, precision, preemption
from dcae_jax.runtime import mesh as mesh_lib

DONE = 0
RMS_RANGE = (0.5, 2.0)  # of scaled latents; outside it, the scaling factor looks wrong


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of the job."""

    config: Config
    workdir: str
    model: autoencoder.Autoencoder
    source: sources.ImageSource
    shards: list[Shard]
    identity: dict[str, Any]

    @property
    def channels(self) -> int:
        """Channels of the stored latents."""
        return self.config.encode.channels or self.model.latent_channels

    def image(self, number: int) -> str:
        """Name of the image of crop `number`."""
        return self.source.name(number % len(self.source))


class _Stopped(Exception):
    """SIGTERM arrived: the current shard is abandoned."""


def run(config: Config, workdir: str) -> int:
    """The job `encode`. Returns 0 when done, 75 when stopped by SIGTERM, to be resumed."""
    if not config.init_from:
        raise UserError(
            "init_from is empty; set --config.init_from to the autoencoder: a workdir, an export "
            "or published weights"
        )
    # Each process encodes its own shards, so a batch is never sharded over several processes.
    sizes = MeshSizes()
    if config.mesh != sizes:
        raise UserError(
            f"mesh={dataclasses.asdict(config.mesh)} is not for the job encode, which splits each "
            "batch over all devices of its process; leave mesh.* out"
        )
    settings = config.encode
    mesh_lib.check_batch(settings.batch_size, mesh_lib.make_mesh(sizes), key="encode.batch_size")
    mesh = mesh_lib.make_mesh(sizes, jax.local_devices())
    source = sources.encoding_source(config.data)
    model = autoencoder.load_autoencoder(
        config.init_from, config.dtype, mesh, config.weights, config.model.variant
    )
    config_lib.check_resolution(config.resolution, model.compression, "resolution")
    if settings.channels:
        models.check_channels(model.architecture, [settings.channels], "encode.channels")
    crops = pipeline.evaluated(source, settings.count, settings.crops)
    shards = latents.plan_shards(crops, settings.shard_size)
    job = Job(config, workdir, model, source, shards, identify(config, model, source))
    with lease.hold(workdir, jax.process_index()):
        claim(workdir, job.identity)
        with preemption.flag() as stopped:
            with contextlib.suppress(_Stopped):
                encode_shards(job, stopped.is_set)
            interrupted = distributed.any_process(stopped.is_set())
        if interrupted:
            logging.info("stopped by a signal; rerun the same command to resume")
            return preemption.STATUS
        if jax.process_index() == 0:
            finish(job)
        distributed.barrier("manifest written")
    return DONE


def identify(
    config: Config, model: autoencoder.Autoencoder, source: sources.ImageSource
) -> dict[str, Any]:
    """Everything the latents depend on, by key; shards of different identities are never mixed."""
    values = {
        "format": latents.FORMAT,
        "weights": checkpoint_weights.checksum(model.weights),
        "resolution": config.resolution,
        "dtype": mesh_lib.compute_dtype(config.dtype, model.mesh),
        **contents.identity(config.data, source),
    }
    for key in ("flip", "crops", "count", "channels", "dtype", "shard_size"):
        values[f"encode.{key}"] = getattr(config.encode, key)
    values |= {f"model.{k}": v for k, v in dataclasses.asdict(model.model_config).items()}
    return json.loads(json.dumps(values))


def claim(workdir: str, identity: dict[str, Any]) -> None:
    """Claims `workdir` for this job. Raises UserError if another job wrote shards there."""
    if not latents.check_identity(workdir, identity) and jax.process_index() == 0:
        files.write_json(os.path.join(workdir, latents.IDENTITY), identity)
    distributed.barrier("workdir claimed")
    if not latents.check_identity(workdir, identity):
        raise UserError(
            f"process {jax.process_index()} does not see in {workdir} what process 0 wrote; use a "
            "folder that all processes share"
        )


def encode_shards(job: Job, stopped: Callable[[], bool]) -> None:
    """Writes the missing shards of this process. Raises UserError and _Stopped."""
    tally = pipeline.Unreadable(job.source.name)
    mine = job.shards[jax.process_index() :: jax.process_count()]
    todo = []
    for shard in mine:
        if sums := latents.read_sums(job.workdir, shard):
            tally.read += shard.last - shard.first
            tally.failed += len(sums.unreadable)
        else:
            todo.append(shard)
    if not todo:
        return
    if len(todo) < len(mine):
        logging.info("resuming: %d of %d shards are complete", len(mine) - len(todo), len(mine))
    local = job.config.encode.batch_size // jax.process_count()
    crops = pipeline.spread(len(job.source), job.shards[-1].last)
    numbers = [pipeline.padded(crops[s.first : s.last], local).reshape(-1, local) for s in todo]
    encoded = _encoded(job, np.concatenate(numbers), tally, stopped)
    for shard, rows in zip(todo, numbers, strict=True):
        began = time.perf_counter()
        batches = itertools.islice(encoded, len(rows))
        sums = latents.write_shard(job.workdir, shard, job.channels, batches, job.image)
        rate = sums.records / (time.perf_counter() - began)
        logging.info("%s: %d crops, %.1f crops/s", shard.file, sums.records, rate)


def encode_fn(
    model: autoencoder.Autoencoder, dtype: str, channels: int
) -> Callable[[Weights, Array], Array]:
    """A jitted (weights, images [B, H, W, 3] uint8) -> unscaled latents of `dtype`.

    They are [B, h, w, channels]: the first ones.
    """

    def encode(weights: Weights, images: Array) -> Array:
        x = transforms.to_float(images)
        with precision.of(model.dtype):
            z = weights_lib.merge(model.graphdef, weights).encode(x)
        return z[..., :channels].astype(dtype)

    return jax.jit(encode, out_shardings=NamedSharding(model.mesh, P(mesh_lib.BATCH_AXES)))


def _encoded(
    job: Job, numbers: np.ndarray, tally: pipeline.Unreadable, stopped: Callable[[], bool]
) -> Iterator[tuple[np.ndarray, pipeline.Batch, np.ndarray]]:
    """(numbers [B], batch, latents [B, flips, h, w, c]) of the crops `numbers` [batches, B].

    Fetches a batch while the devices run the next. Raises UserError, and _Stopped on `stopped()`.
    """
    config, model = job.config, job.model
    batches = pipeline.fixed_crops(
        job.source,
        numbers.ravel(),
        size=config.resolution,
        batch_size=numbers.shape[1],
        crops=config.encode.crops,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    run_model = functools.partial(
        encode_fn(model, config.encode.dtype, job.channels), model.weights
    )
    place = mesh_lib.batch_sharding(model.mesh, 4)
    waiting = None
    for wanted, batch in zip(numbers, batches, strict=True):
        if stopped():
            raise _Stopped
        failed = batch["unreadable"][batch["unreadable"] >= 0].tolist()
        tally.count(int((wanted >= 0).sum()), failed, "left out")
        variants = [batch["image"], batch["image"][:, :, ::-1]][: 1 + config.encode.flip]
        found = [run_model(jax.device_put(np.ascontiguousarray(x), place)) for x in variants]
        if waiting:
            yield *waiting[:2], np.stack(jax.device_get(waiting[2]), axis=1)
        waiting = wanted, batch, found
    if waiting:
        yield *waiting[:2], np.stack(jax.device_get(waiting[2]), axis=1)


def finish(job: Job) -> None:
    """Writes the manifest. Raises UserError if a shard or too many of the images are missing."""
    sums = latents.read_all_sums(job.workdir, job.shards)
    unreadable = [record for shard in sums for record in shard.unreadable]
    tally = pipeline.Unreadable(job.source.name, seen=set(unreadable))
    tally.count(job.shards[-1].last, unreadable, "left out")
    if not any(shard.records for shard in sums):
        raise UserError("no image could be read; see the log for their names")
    manifest = make_manifest(job, sums)
    files.write_json(os.path.join(job.workdir, latents.MANIFEST), manifest)
    rms, factor = manifest["rms"], manifest["scaling_factor_multiplies_latent"]
    shape = "{count} crops x {flips}, {latent_size}x{latent_size}x{latent_channels}"
    shape, origin = shape.format(**manifest), manifest["scaling_from"]
    logging.info("%s: %s, rms %.4f, scaling %.5f (%s)", job.workdir, shape, rms, factor, origin)
    if not RMS_RANGE[0] <= rms * factor <= RMS_RANGE[1]:
        logging.warning(
            "latents times the scaling factor %.5f have an rms of %.3g, not about 1: check that "
            "the factor is this model's, and that the images resemble its training data",
            factor,
            rms * factor,
        )


def make_manifest(job: Job, shards: list[ShardSums]) -> dict[str, Any]:
    """The manifest of all shards (docs/latents.md). Raises UserError."""
    config, model = job.config, job.model
    flips = 1 + config.encode.flip
    size = config.resolution // model.compression
    summary = latents.summary(shards, flips * size * size)
    published = model.scaling_factor is not None
    if not published and not summary["rms"]:
        raise UserError("all latents are 0: the autoencoder's weights are bad")
    unreadable = {record for shard in shards for record in shard.unreadable}
    names = job.source.class_names
    data = {k.removeprefix("data."): v for k, v in job.identity.items() if k.startswith("data.")}
    return {
        "kind": "latents",
        "format": latents.FORMAT,
        "model": config_lib.to_json(model.model_config),
        "autoencoder": files.whole_path(config.init_from),
        "weights": config.weights,
        "checksum": job.identity["weights"],
        "encoder_checksum": model.encoder_checksum,
        "resolution": config.resolution,
        "compression": model.compression,
        "latent_size": size,
        "latent_channels": job.channels,
        "dtype": config.encode.dtype,
        "flips": flips,
        "crops": config.encode.crops,
        "unreadable": [job.source.name(record) for record in sorted(unreadable)],
        "num_classes": max(len(names), 1 + max(shard.largest_label for shard in shards)),
        "class_names": list(names),
        "source": {"images": len(job.source), **data},
        **summary,
        "scaling_factor_multiplies_latent": model.scaling_factor or 1 / summary["rms"],
        "scaling_from": "published" if published else "1/rms",
    }
