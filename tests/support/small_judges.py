# SPDX-License-Identifier: Apache-2.0
"""For the tests of what judges pictures: a fast network in Inception's place, two processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from support import ROOT

DIM, CLASSES = 24, 12  # of the network that stands in for Inception


def small_features(weights, x, fc_bias=False):
    """Like `inception.features`: the means of 8x8 squares through a random layer and ReLU."""
    x = x[:, :296, :296].reshape(x.shape[0], 37, 8, 37, 8, 3).mean((2, 4)).reshape(x.shape[0], -1)
    pool3 = jax.nn.relu(jnp.matmul(x, weights["hidden"], precision="highest"))
    return pool3, jnp.matmul(pool3, weights["fc.kernel"], precision="highest")


def small_weights(path=""):
    """Weights of `small_features`."""
    random = np.random.RandomState(0)
    return {
        "hidden": random.standard_normal((37 * 37 * 3, DIM)).astype(np.float32) / 20,
        "fc.kernel": random.standard_normal((DIM, CLASSES)).astype(np.float32),
    }


def write_pictures(root, pictures):
    root.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{i:04d}.png")


def two_processes(script, settings, start=None):
    """Runs `script` in two processes of two devices; -> what the last line of each says, if any.

    start: what comes before it, instead of START, which joins them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = settings | {"address": f"127.0.0.1:{free.getsockname()[1]}"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                (start or START) + script,
                json.dumps(settings | {"process": i}),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


START = """
import json, sys
settings = json.loads(sys.argv[1])
import jax
jax.distributed.initialize(settings["address"], 2, settings["process"])
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
from support import CONFIGS, small_judges
from dcae_jax import config as config_lib
from dcae_jax.evaluation import reconstruction as evaluate
from dcae_jax.models import inception, inception_torch
"""
