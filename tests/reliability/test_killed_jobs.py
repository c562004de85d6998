# SPDX-License-Identifier: Apache-2.0
"""The jobs `encode` and `sample`, killed anywhere: the same command ends with the same files."""

import random

import pytest
from support import killing


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return killing.commands(tmp_path_factory.mktemp("jobs"))


@pytest.mark.xdist_group("killed")
@pytest.mark.parametrize("job", ["encode", "sample"])
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_job_killed_anywhere_ends_with_the_same_files(forks, commands, tmp_path, job, seed):
    """Catches a shard or a batch that is kept half, made twice or left out, and rubbish left."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, said = forks([*commands[job], f"--workdir={whole}"], stderr=tmp_path / "log")
    assert status == 0, said[-3000:]
    argv = [*commands[job], f"--workdir={killed}"]
    print("killed at", killing.survive_job(forks, job, argv, killed, random.Random(seed)))
    assert killing.files(killed) == killing.files(whole)
