# SPDX-License-Identifier: Apache-2.0
"""Configurations of data, and batches of them."""

import itertools

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Data
from dcae_jax.data import latents, pipeline, sources


def config(**changes):
    """A ConfigDict with batches of 4 at 16 pixels; changes: data__path=..., seed=..."""
    config = config_lib.default()
    config.batch_size, config.resolution, config.seed = 4, 16, 7
    config.data.threads = 2
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def section(config):
    """config.data of a ConfigDict, as functions take it; not validated."""
    return Data(**config.data.to_dict())


def batches(config, start=0, process=0, processes=1):
    """`training_batches` of a ConfigDict."""
    settings = section(config)
    on_latents = settings.source == "latents"
    return pipeline.training_batches(
        latents.latents(settings.path) if on_latents else sources.training_source(settings),
        settings,
        seed=config.seed,
        batch_size=config.batch_size,
        sizes=config.resolutions or (config.resolution,),
        start=start,
        process=process,
        processes=processes,
    )


def take(config, count, start=0, process=0, processes=1):
    """The first `count` of them."""
    return list(itertools.islice(batches(config, start, process, processes), count))
