# SPDX-License-Identifier: Apache-2.0
"""Small jobs to plan, and the command line that plans one."""

import os

from support import CONFIGS

# The fixture `small` as overrides of phase1.py:tiny, one image a device.
SMALL = (
    "model.widths=(8,8,16,32,32)",
    "model.latent_channels=8",
    "resolution=32",
    "resolutions=()",
    "batch_size=8",
    "evaluate.batch_size=8",
    "evaluate.resolutions=(32,)",
)
PHASE1 = os.path.join(CONFIGS, "phase1.py:tiny")
SAMPLE, UVIT = os.path.join(CONFIGS, "sample.py"), os.path.join(CONFIGS, "uvit.py:tiny")
# Latents of 4 x 4, guided, one image a device.
SAMPLING = (
    "autoencoder=tiny",
    "resolution=64",
    "sample.steps=4",
    "sample.guidance=2.0",
    "sample.count=20",
    "sample.batch_size=8",
)
SAMPLES = {"config": SAMPLE, "generator": UVIT, "overrides": SAMPLING}


def arguments(workdir, **settings):
    """The command line of the job `plan`, of phase 1 on this host unless `settings` differ."""
    argv = ["main", f"--config={os.path.join(CONFIGS, 'plan.py')}", f"--workdir={workdir}"]
    given = {"config": PHASE1, "overrides": SMALL, "topologies": ("cpu",)} | settings
    return [*argv, *(f"--config.plan.{key}={value}" for key, value in given.items())]
