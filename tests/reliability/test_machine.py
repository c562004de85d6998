# SPDX-License-Identifier: Apache-2.0
"""What the machine does to a run: a full or read-only disk, missing rights, too little memory.

Each is done for real. One line, status 1, and the last good checkpoint stays what it was.
"""

import errno
import os
import shutil
import subprocess

import pytest
from support import killing

from dcae_jax import errors as errors_lib
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.runtime import process


@pytest.fixture(scope="module")
def started(forks, data, tmp_path_factory):
    """A workdir with the checkpoints 4 and 8."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    status, _, said = forks(killing.arguments(workdir, data, steps=8), stderr=f"{workdir}.log")
    assert status == 0, said[-3000:]
    return workdir


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB, that only root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _one_line(status, said, *words):
    """Asserts status 1, no traceback, and one line of error with `words`."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == process.FAILED, said[-3000:]
    assert len(errors) == 1 and "Traceback" not in said, said[-3000:]
    assert all(word in errors[0] for word in words), errors[0]


def _intact(workdir):
    """The newest checkpoint, which is undamaged and can be loaded."""
    (*_, step) = checkpoints.saved_steps(str(workdir))
    assert integrity.damage(str(workdir / "checkpoints" / str(step))) == ""
    assert checkpoint_weights.load_weights(str(workdir))[1].model.latent_channels == 8
    return step


@pytest.mark.slow
@pytest.mark.xdist_group("machine")
def test_a_full_disk(forks, data, small_disk, tmp_path):
    """Catches a traceback of fifty lines, half a checkpoint taken for whole, a run that is lost."""
    workdir = small_disk / "run"
    argv = killing.arguments(workdir, data)
    status, _, said = forks(argv, stderr=tmp_path / "log")
    _one_line(status, said, "disk is full", "free some space")
    step = _intact(workdir)
    assert step < 24
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    status, _, said = forks(argv, stderr=tmp_path / "log")
    assert status == 0 and f"at step {step}" in said, said[-3000:]
    assert [row["step"] for row in killing.rows(workdir)] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]


@pytest.mark.xdist_group("machine")
def test_a_disk_that_is_full_from_the_start(forks, data, small_disk, tmp_path):
    """Catches a run that starts, computes for an hour, and then finds that it cannot save."""
    (small_disk / "ballast").write_bytes(bytes(2**22))
    with open(small_disk / "rest", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    argv = killing.arguments(small_disk / "run", data)
    status, _, said = forks(argv, stderr=tmp_path / "log")
    _one_line(status, said, "disk is full")


@pytest.mark.xdist_group("machine")
def test_a_read_only_workdir(forks, data, started, small_disk, tmp_path):
    """Catches a traceback from whichever file happens to be written first."""
    workdir = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    shutil.copytree(started, workdir)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, _, said = forks(killing.arguments(workdir, data), stderr=tmp_path / "log")
    _one_line(status, said, "read-only", "--workdir")
    assert _intact(workdir) == 8


@pytest.mark.xdist_group("machine")
@pytest.mark.parametrize("where", [".", pytest.param("checkpoints", marks=pytest.mark.slow)])
def test_a_workdir_of_somebody_else(forks, data, started, tmp_path, where):
    """Catches a traceback where a right is missing, also if that shows at the first save only."""
    workdir = tmp_path / "run"
    shutil.copytree(started, workdir)
    os.chmod(workdir / where, 0o555)
    argv = killing.arguments(workdir, data)
    status, _, said = forks(argv, stderr=tmp_path / "log", powerless=True)
    os.chmod(workdir / where, 0o755)
    _one_line(status, said, "permission denied", "--workdir")
    assert _intact(workdir) == 8


@pytest.mark.xdist_group("machine")
def test_a_device_without_enough_memory(forks, data, started, tmp_path):
    """Catches XLA's page of buffers in place of the key to turn down."""
    workdir = tmp_path / "run"
    shutil.copytree(started, workdir)
    large = {"resolution": 4096, "allow_change": ("resolution",), "data__prefetch": 1}
    argv = killing.arguments(workdir, data, **large)
    status, _, said = forks(argv, stderr=tmp_path / "log", memory=6 * 2**30)
    _one_line(status, said, "device is out of memory", "batch_size", "accumulate")
    assert _intact(workdir) == 8


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "quota"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "permission denied"),
        (ValueError('Error writing "/a/b": No space left on device [OS error 28]'), "/a/b: the di"),
        (MemoryError(), "no memory left on this host"),
    ],
)
def test_the_systems_words_are_found_wherever_they_stand(error, words):
    """Catches an error of a C++ library that hides a full disk."""
    assert words in errors_lib.explain(error)
    try:
        raise RuntimeError("the save failed") from error
    except RuntimeError as outer:
        assert words in errors_lib.explain(outer)


def test_a_bug_keeps_its_traceback():
    """Catches a bug of ours reported as a machine failure."""
    for bug in (ValueError("x"), FileNotFoundError(2, "gone", "/x"), KeyError("disk"), TypeError()):
        assert errors_lib.explain(bug) is None
