# SPDX-License-Identifier: Apache-2.0
"""The job `encode`: images -> shards of latents, their statistics and a manifest.

Crops s * shard_size onwards form shard s, which one process encodes on its own devices and renames
when it is whole; a JSON beside it holds its sums. The manifest is made of those files alone, so
that a run that was interrupted anywhere ends with the same bytes. docs/latents.md has the format.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import MeshSizes
from dcae_jax.data import latent_shards, latents, pipeline, sources, transforms
from dcae_jax.data.latent_shards import Shard
from dcae_jax.errors import UserError
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import lease, preemption
from dcae_jax.runtime import mesh as mesh_lib

DONE = 0
SOURCE_KEYS = {  # of config.data, for each source
    "photos": (),
    "folder": ("path",),
    "tfds": ("name", "split", "data_dir"),
    "mixture": ("parts", "data_dir"),
}
RMS_RANGE = (0.5, 2.0)  # of scaled latents; outside, the scaling factor is of another model


def run(config: Any, workdir: str) -> int:
    """The job `encode`. Returns 0 when done, 75 when stopped by SIGTERM after a whole shard."""
    if not config.init_from:
        raise UserError(
            "init_from is empty; set --config.init_from to the autoencoder: a workdir, an export "
            "or published weights"
        )
    settings = config.encode
    # A process encodes its shards alone, so no batch is ever split over the devices of another.
    sizes = MeshSizes()
    if config.mesh != sizes:
        raise UserError(
            f"mesh={dataclasses.asdict(config.mesh)} is not for the job encode, which splits each batch over "
            "all devices of its process; leave mesh.* out"
        )
    mesh_lib.check_batch(settings.batch_size, mesh_lib.make_mesh(sizes), key="encode.batch_size")
    mesh = mesh_lib.make_mesh(sizes, jax.local_devices())
    source = sources.encoding_source(config.data)
    model = autoencoder.load_autoencoder(
        config.init_from, config.dtype, mesh, config.weights, config.model.variant
    )
    config_lib.check_resolution(config.resolution, model.compression, "resolution")
    shards = plan(len(source), settings)
    identity = identify(config, model, source)
    with lease.hold(workdir, jax.process_index()):
        return _run(config, workdir, model, source, shards, identity)


def _run(
    config: Any,
    workdir: str,
    model: autoencoder.Autoencoder,
    source: Any,
    shards: list[Shard],
    identity: dict[str, Any],
) -> int:
    claim(workdir, identity, shards)
    mine = shards[jax.process_index() :: jax.process_count()]
    todo = [shard for shard in mine if latent_shards.read_sums(workdir, shard) is None]
    with preemption.flag() as stopped:
        if todo:
            if len(todo) < len(mine):
                logging.info(
                    "resuming: %d of %d shards are there", len(mine) - len(todo), len(mine)
                )
            tally = pipeline.Unreadable(source)
            for shard in mine:
                if sums := latent_shards.read_sums(workdir, shard):
                    tally.read += shard.last - shard.first
                    tally.failed += len(sums["unreadable"])
            encode_shards(config, model, source, workdir, todo, tally, stopped.is_set)
        interrupted = any_process(stopped.is_set())
    if interrupted:
        logging.info("stopped after a signal; the same command resumes")
        return preemption.STATUS
    if jax.process_index() == 0:
        finish(config, model, source, workdir, shards, identity)
    wait("manifest written")
    return DONE


def plan(images: int, settings: Any) -> list[Shard]:
    """The shards of config.encode for so many images."""
    total = images * settings.crops
    total = min(total, settings.count) if settings.count else total
    count = math.ceil(total / settings.shard_size)
    return [
        Shard(
            latents.shard_name(s, count),
            s * settings.shard_size,
            min((s + 1) * settings.shard_size, total),
        )
        for s in range(count)
    ]


# --- whose workdir it is --------------------------------------------------------------------------


def identify(config: Any, model: autoencoder.Autoencoder, source: Any) -> dict[str, Any]:
    """All that the latents depend on, by key: shards of two different ones are never mixed."""
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(f"{source.name(i)}\n".encode())
    values = {
        "format": latents.FORMAT,
        "weights": checkpoint_weights.checksum(model.weights),
        "resolution": config.resolution,
        "dtype": mesh_lib.compute_dtype(config.dtype, model.mesh),
        "images": len(source),
        "names of the images": names.hexdigest(),
    }
    for key in ("flip", "crops", "count", "dtype", "shard_size"):
        values[f"encode.{key}"] = getattr(config.encode, key)
    for key in ("source", *SOURCE_KEYS[config.data.source]):
        value = getattr(config.data, key)
        values[f"data.{key}"] = os.path.abspath(value) if key == "path" else value
    for key, value in dataclasses.asdict(model.model_config).items():
        values[f"model.{key}"] = value
    return json.loads(json.dumps(values))


def claim(workdir: str, identity: dict[str, Any], shards: list[Shard]) -> None:
    """Makes `workdir` this job's. Raises UserError if another one wrote shards there."""
    path = os.path.join(workdir, latents.IDENTITY)
    before = files.read_json(path)
    begun = os.path.isdir(workdir) and any(
        name == latents.MANIFEST or name.endswith(".array_record") for name in os.listdir(workdir)
    )
    if begun and before is None:
        raise UserError(
            f"{workdir} holds latents or records, and no {latents.IDENTITY} that says which; use "
            "another --workdir"
        )
    if begun and before != identity:
        changes = [
            f"{key} was {before.get(key)!r}, is {identity.get(key)!r}"
            for key in sorted(before.keys() | identity.keys())
            if before.get(key) != identity.get(key)
        ]
        raise UserError(
            f"{workdir} holds other latents: {'; '.join(changes)}; use another --workdir"
        )
    if before != identity and jax.process_index() == 0:
        files.write_json(path, identity)
    wait("workdir claimed")
    if files.read_json(path) != identity:
        raise UserError(
            f"process {jax.process_index()} does not see in {workdir} what process 0 wrote; name a "
            "folder that all processes share"
        )


def wait(what: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encode: {what}")


def any_process(value: bool) -> bool:
    """Whether `value` holds on any process; all of them wait for the last one here."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.int32(value)).any())


# --- one shard after the other --------------------------------------------------------------------


def encode_fn(model: autoencoder.Autoencoder, dtype: str) -> Callable[[Weights, Array], Array]:
    """A jitted (weights, images [B, H, W, 3] uint8) -> unscaled latents [B, h, w, c] of `dtype`."""
    rows = NamedSharding(model.mesh, P(mesh_lib.BATCH_AXES))

    def encode(weights: Weights, images: Array) -> Array:
        x = transforms.to_float(images)
        return weights_lib.merge(model.graph, weights).encode(x).astype(dtype)

    return jax.jit(encode, out_shardings=rows)


def encode_shards(
    config: Any,
    model: autoencoder.Autoencoder,
    source: Any,
    workdir: str,
    todo: list[Shard],
    tally: pipeline.Unreadable,
    stopped: Callable[[], bool],
) -> None:
    """Writes the shards `todo`, until `stopped()`. Raises UserError."""
    settings = config.encode
    local = settings.batch_size // jax.process_count()
    numbers = [pipeline.padded(np.arange(shard.first, shard.last), local) for shard in todo]
    batches = pipeline.fixed_crops(
        source,
        np.concatenate(numbers),
        size=config.resolution,
        batch_size=local,
        crops=settings.crops,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    run_model = functools.partial(encode_fn(model, settings.dtype), model.weights)
    encoded = _encoded(run_model, batches, model.mesh, settings.flip, stopped)
    for shard, wanted in zip(todo, numbers, strict=True):
        began = time.perf_counter()
        sums = latent_shards.write_shard(
            workdir, shard, wanted.reshape(-1, local), encoded, source, tally
        )
        if sums is None:
            return
        logging.info(
            "%s: %d crops, %.1f a second",
            shard.file,
            sums["records"],
            sums["records"] / (time.perf_counter() - began),
        )


def _encoded(
    run_model: Callable[[Array], Array],
    batches: Iterator[pipeline.Batch],
    mesh: Mesh,
    flip: bool,
    stopped: Callable[[], bool],
) -> Iterator[tuple[pipeline.Batch, np.ndarray]]:
    """(batch, latents [B, flips, h, w, c]), one batch behind the devices, until `stopped()`."""
    place = mesh_lib.batch_sharding(mesh, 4)
    waiting = None
    for batch in batches:
        if stopped():
            return
        variants = [batch["image"], batch["image"][:, :, ::-1]][: 1 + flip]
        found = [run_model(jax.device_put(np.ascontiguousarray(x), place)) for x in variants]
        if waiting:
            yield waiting[0], np.stack(jax.device_get(waiting[1]), axis=1)
        waiting = batch, found
    if waiting and not stopped():
        yield waiting[0], np.stack(jax.device_get(waiting[1]), axis=1)


# --- when all shards are there --------------------------------------------------------------------


def finish(
    config: Any,
    model: autoencoder.Autoencoder,
    source: Any,
    workdir: str,
    shards: list[Shard],
    identity: dict[str, Any],
) -> None:
    """Writes the manifest. Raises UserError if a shard is missing or few images were read."""
    every = [latent_shards.read_sums(workdir, shard) for shard in shards]
    missing = [shard.file for shard, sums in zip(shards, every, strict=True) if sums is None]
    if missing:
        raise UserError(
            f"{workdir} lacks {len(missing)} shards that were written ({missing[0]}); name a "
            "folder that all processes share, and run the command again"
        )
    unreadable = [record for sums in every for record in sums["unreadable"]]
    tally = pipeline.Unreadable(source, seen=set(unreadable))
    tally.count(shards[-1].last, unreadable, "left out")
    count = sum(sums["records"] for sums in every)
    if not count:
        raise UserError("no image could be read; see the log for their names")
    names = sources.class_names(source)
    flips = 1 + config.encode.flip
    size = config.resolution // model.compression
    stats = latent_shards.statistics(every, flips * size * size)
    published = model.scaling_factor is not None
    if not published and not stats["rms"]:
        raise UserError("all latents are 0: the autoencoder's weights are bad")
    factor = model.scaling_factor if published else 1 / stats["rms"]
    manifest = {
        "kind": "latents",
        "format": latents.FORMAT,
        "model": config_lib.to_json(model.model_config),
        "autoencoder": files.whole_path(config.init_from),
        "weights": config.weights,
        "checksum": identity["weights"],
        "encoder_checksum": checkpoint_weights.encoder_checksum(model.weights),
        "resolution": config.resolution,
        "compression": model.compression,
        "latent_size": size,
        "latent_channels": model.latent_channels,
        "dtype": config.encode.dtype,
        "flips": flips,
        "crops": config.encode.crops,
        "count": count,
        "unreadable": [source.name(record) for record in sorted(set(unreadable))],
        "num_classes": max(len(names), 1 + max(sums["largest_label"] for sums in every)),
        "class_names": list(names),
        "source": {
            "images": len(source),
            **{
                key.removeprefix("data."): value
                for key, value in identity.items()
                if key.startswith("data.")
            },
        },
        **stats,
        "scaling_factor_multiplies_latent": factor,
        "scaling_from": "published" if published else "1/rms",
        "shards": [
            {key: sums[key] for key in ("file", "records", "bytes", "sha256")} for sums in every
        ],
    }
    for name in os.listdir(workdir):
        ours = name.startswith(("latents-", latents.MANIFEST, latents.IDENTITY))
        if ours and name.endswith(".tmp"):  # of a run that was killed
            os.remove(os.path.join(workdir, name))
    files.write_json(os.path.join(workdir, latents.MANIFEST), manifest)
    logging.info(
        "%s: %d crops x %d, %dx%dx%d, rms %.4f, times %.5f (%s)",
        workdir,
        count,
        flips,
        size,
        size,
        model.latent_channels,
        stats["rms"],
        factor,
        manifest["scaling_from"],
    )
    scaled = stats["rms"] * factor
    if not RMS_RANGE[0] <= scaled <= RMS_RANGE[1]:
        logging.warning(
            "latents times the scaling factor %.5f have an rms of %.3g, not about 1: is it of "
            "this model, and are these images like those it was trained on?",
            factor,
            scaled,
        )
