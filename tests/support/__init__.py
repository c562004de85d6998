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
