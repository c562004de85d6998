# SPDX-License-Identifier: Apache-2.0
"""Killed or preempted anywhere, the same command ends with the same bits on disk."""

import random
import signal

import numpy as np
import pytest
from support import data as packing
from support import killing

from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.runtime import preemption, process


@pytest.fixture(scope="module")
def whole(forks, data, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, _, said = forks(killing.arguments(workdir, data), stderr=f"{workdir}.log")
    assert status == 0, said[-3000:]
    return workdir


@pytest.mark.xdist_group("killed")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_five_times_ends_bit_equal(forks, data, whole, tmp_path, seed):
    """Catches anything that a checkpoint or a workdir forgets, or keeps twice, after kill -9."""
    workdir = tmp_path / "run"
    argv = killing.arguments(workdir, data)
    hit = killing.survive(forks, argv, workdir, 5, random.Random(seed))
    print("killed at", hit)
    killing.assert_same(whole, workdir)


@pytest.mark.xdist_group("killed")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "arrow", "parquet"])
def test_packed_images_killed_twice_end_with_the_bits_of_their_folder(
    forks, data, whole, tmp_path, kind
):
    """Catches a source whose order, split or position changes with a kill, or with the packing."""
    packed = packing.pack(data, kind, tmp_path / "packed")
    path, workdir = packed.pop("data__path"), tmp_path / "run"
    argv = killing.arguments(workdir, path, **packed)
    print("killed at", killing.survive(forks, argv, workdir, 2, random.Random(kind)))
    steps = checkpoints.saved_steps(str(whole))
    assert steps == checkpoints.saved_steps(str(workdir))
    for step in steps:
        left, right = (killing.everything(folder, step) for folder in (whole, workdir))
        assert left.keys() == right.keys() and len(left) > 100
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name], err_msg=f"{step} {name}")
    assert killing.rows(whole) == killing.rows(workdir)


@pytest.mark.xdist_group("killed")
@pytest.mark.slow
@pytest.mark.parametrize("place, count", [("step", 10), ("save", 2), ("evaluate", 2)])
def test_sigterm_saves_at_once_and_a_second_one_corrupts_nothing(
    forks, data, whole, tmp_path, place, count
):
    """Catches steps lost, an evaluation that is waited for or forgotten, and a cut save."""
    workdir = tmp_path / "run"
    argv = killing.arguments(workdir, data)
    signals = [(place, count, delay, signal.SIGTERM) for delay in (0.0, 0.02, 0.05, 0.2)]
    status, begun, said = forks(argv, signals, stderr=f"{workdir}.log")
    assert status == preemption.STATUS, said[-3000:]
    assert "rerun the same command to resume" in said
    (*_, saved) = checkpoints.saved_steps(str(workdir))
    assert begun <= saved <= begun + 1
    status, _, said = forks(argv, stderr=f"{workdir}.log")
    assert status == 0 and f"at step {saved}" in said
    killing.assert_same(whole, workdir)


@pytest.mark.xdist_group("killed")
def test_sigterm_before_the_first_step_is_resumable(forks, data, tmp_path):
    """Catches a job in its start-up that dies of the signal, as if it had failed for good."""
    workdir = tmp_path / "run"
    argv = killing.arguments(workdir, data)
    more = [("dcae_jax.setup.tables", "parameters", "table")]
    signals = [("table", 1, 0.0, signal.SIGTERM)]
    status, _, said = forks(argv, signals, stderr=f"{workdir}.log", more=more)
    assert status == preemption.STATUS and "the same command" in said, said[-2000:]
    assert checkpoints.saved_steps(str(workdir)) == []


@pytest.mark.xdist_group("killed")
def test_a_second_ctrl_c_ends_at_once(forks, data, tmp_path):
    """Catches a person who is made to wait for a save that was not wanted."""
    workdir = tmp_path / "run"
    argv = killing.arguments(workdir, data, save_every=100)
    signals = [("step", 10, 0.0, signal.SIGINT)] * 2
    status, _, said = forks(argv, signals, stderr=f"{workdir}.log")
    assert status == process.INTERRUPTED and "press it again" in said, said[-2000:]
    assert "Traceback" not in said and checkpoints.saved_steps(str(workdir)) == []
