# SPDX-License-Identifier: Apache-2.0
"""Helpers that several tests share. Tests import from here, never from one another."""

import os

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
CONFIGS = os.path.join(ROOT, "configs")
# Of the model `tiny`: narrower, at 32 pixels, so that it trains in seconds.
NARROW = {
    "model.widths": (8, 8, 16, 32, 32),
    "model.latent_channels": 8,
    "resolution": 32,
    "batch_size": 4,
    "evaluate.resolutions": (32,),
}


def flags(settings):
    """{key: value} as arguments of the command line."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


def to_json(config):
    """A ConfigDict as JSON values: tuples become lists."""
    import json

    return json.loads(json.dumps(config.to_dict()))


def run_job(job, config, workdir):
    """The exit status of the job (a module of dcae_jax.jobs) with a ConfigDict, as in main."""
    from dcae_jax import config as config_lib

    return job.run(config_lib.validate(config), workdir)


def run_chain(config, workdir):
    """Likewise of the job `phases`."""
    from dcae_jax import config as config_lib
    from dcae_jax.jobs import train

    return train.run_phases(config_lib.validate_phases(config), workdir)


def on_latents(config):
    """(the ConfigDict of a diffusion run with what its latents determine, the latents)."""
    import dataclasses

    from ml_collections import ConfigDict

    from dcae_jax import config as config_lib
    from dcae_jax.setup import resolve

    config, latents = resolve.on_latents(config_lib.validate(config))
    return ConfigDict(dataclasses.asdict(config)), latents
