# SPDX-License-Identifier: Apache-2.0
"""The jobs `encode` and `sample`, killed anywhere: the same command ends with the same files."""

import os
import random
import signal
import sys

import killing
import pytest

sys.path.insert(0, str(killing.HERE.parent))
import small_models

from dcae_jax import train

# Places of a kill: each file that a job writes whole; the moment when a file is complete and has
# not its name yet; the result of `sample`, begun and not complete.
WATCHED = [
    ("dcae_jax.report", "write_file", "file"),
    ("os", "replace", "rename"),
    ("numpy.lib.format", "write_array_header_1_0", "result"),
]


@pytest.fixture(scope="module")
def forks():
    server = killing.Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{job: its command line without the workdir}, and how many files it writes."""
    folder = tmp_path_factory.mktemp("jobs")
    autoencoder = small_models.export_autoencoder(str(folder / "autoencoder"))
    pictures, latents = str(folder / "pictures"), str(folder / "latents")
    small_models.write_latents(latents, autoencoder, pictures)
    config = small_models.diffusion_config(latents)
    config.steps, config.batch_size = 1, 8
    assert train.run(config, str(folder / "uvit")) == train.DONE
    settings = {
        "encode": {
            "init_from": autoencoder,
            "resolution": 32,
            "data.source": "folder",
            "data.path": pictures,
            "encode.shard_size": 2,
            "encode.batch_size": 2,
        },
        "sample": {
            "init_from": str(folder / "uvit"),
            "sample.count": 12,
            "sample.steps": 2,
            "sample.batch_size": 2,
            "sample.format": "npz",
        },
    }
    return {
        job: [f"--config={os.path.join(small_models.CONFIGS, job)}.py"]
        + [f"--config.{key}={value}" for key, value in keys.items()]
        for job, keys in settings.items()
    }


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.xdist_group("killed")
@pytest.mark.parametrize("job", ["encode", "sample"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_a_job_killed_anywhere_ends_with_the_same_files(forks, commands, tmp_path, job, seed):
    """Catches a shard or a batch that is kept half, made twice or left out, and rubbish left."""
    rng = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, said = forks([*commands[job], f"--workdir={whole}"], stderr=tmp_path / "log")
    assert status == 0, said[-3000:]
    argv = [*commands[job], f"--workdir={killed}"]
    # A delay at the first file only: after the others so small a job could end meanwhile.
    count, delay = rng.choice([(1, 0.0), (1, rng.uniform(0, 0.05)), (2, 0.0), (3, 0.0)])
    kills = [("file", count, delay), ("rename", 2, 0.0), ("rename", 2, 0.0)]
    kills += [("result", 1, 0.0)] if job == "sample" else []
    for kill in kills:
        signals = [(*kill, signal.SIGKILL)]
        status, _, said = forks(argv, signals, stderr=tmp_path / "log", more=WATCHED)
        assert status == -signal.SIGKILL, (kill, status, said[-3000:])
    print(job, "killed at", kills)
    status, _, said = forks(argv, stderr=tmp_path / "log")
    assert status == 0, said[-3000:]
    assert _files(killed) == _files(whole)
