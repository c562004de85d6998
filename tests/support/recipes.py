# SPDX-License-Identifier: Apache-2.0
"""Narrow runs of the shipped phases with LPIPS, as commands."""

import os
import subprocess
import sys

import numpy as np

from support import CONFIGS, NARROW, ROOT, flags

TRAIN = {
    **NARROW,
    "resolutions": (),
    "optimizer.warmup_steps": 1,
    "loss.lpips_weight": 1.0,
    "log_every": 1,
    "evaluate_every": 0,
    "evaluate_first": False,
    "evaluate.batch_size": 8,
    "evaluate.count": 6,
    "evaluate.grid": 2,
}


def lpips_weights(path):
    """Writes LPIPS' file with random weights; returns its name."""
    from safetensors.numpy import save_file

    from dcae_jax.models import lpips

    random = np.random.default_rng(0)
    weights = {
        name: np.abs(random.standard_normal(shape) * 0.05).astype(np.float32)
        for name, shape in lpips.shapes("vgg").items()
    }
    save_file(weights, path, metadata={"network": "lpips-vgg"})
    return str(path)


def arguments(phase, workdir, lpips, **settings):
    """The command line, without the program, of a phase with the model `tiny`."""
    settings = {**TRAIN, "loss.lpips_weights": lpips, **settings}
    if phase == 3:
        settings = {"loss.gan_weight": 0.5, "loss.gan_warmup_steps": 1, **settings}
    config = f"--config={os.path.join(CONFIGS, f'phase{phase}.py')}:tiny"
    return [config, f"--workdir={workdir}", *flags(settings)]


def run(command, **environment):
    """(status, stderr) of the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax.main", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, *sys.path]), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr
