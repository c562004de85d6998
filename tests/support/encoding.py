# SPDX-License-Identifier: Apache-2.0
"""A small job `encode`: its configuration, its command line, its files."""

import filecmp
import os
import sys

from dcae_jax import config as config_lib
from support import CONFIGS

COUNT, SIZE = 23, 32  # images of the fixture, and pixels per side of a crop


def config(image_folder, model, **changes):
    c = config_lib.load_file(os.path.join(CONFIGS, "encode.py"))
    c.init_from, c.resolution = model, SIZE
    c.data.source, c.data.path = "folder", image_folder
    c.encode.shard_size, c.encode.batch_size = 5, 4
    c.encode.update(changes)
    return c


def command(workdir, config):
    values = {key: config[key] for key in ("init_from", "resolution")}
    values |= {f"data.{key}": config.data[key] for key in ("source", "path")}
    values |= {f"encode.{key}": config.encode[key] for key in ("crops", "shard_size", "batch_size")}
    file = os.path.join(CONFIGS, "encode.py")
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [
        sys.executable,
        "-m",
        "dcae_jax.main",
        f"--config={file}",
        f"--workdir={workdir}",
    ] + flags


def assert_same_files(left, right):
    names = sorted(os.listdir(left))
    assert names == sorted(os.listdir(right))
    _, different, broken = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not different and not broken, different
