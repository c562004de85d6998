# SPDX-License-Identifier: Apache-2.0
"""Two jobs on one workdir: the second is refused, and a dead owner stands in nobody's way."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from dcae_jax import lock, train
from dcae_jax.config import UserError

ROOT = str(pathlib.Path(__file__).parent.parent.parent)
HOLD = "import sys, time\nfrom dcae_jax import lock\nwith lock.hold(sys.argv[1]):\n"


def _owner(workdir, then="    print('held', flush=True); time.sleep(60)"):
    """A process that holds the lock of `workdir`."""
    command = [sys.executable, "-c", HOLD + then, str(workdir)]
    env = {**os.environ, "PYTHONPATH": ROOT}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    return process


def test_the_second_is_refused_and_names_the_first(small, alone, tmp_path):
    """Catches two runs that write each other's checkpoints, and a refusal that helps nobody."""
    workdir = tmp_path / "run"
    owner = _owner(workdir)
    try:
        with pytest.raises(UserError) as refused:
            train.run(small, str(workdir))
        said = str(refused.value)
        assert f"process {owner.pid} on {socket.gethostname()} since 20" in said, said
        assert not (workdir / "checkpoints").exists()
    finally:
        owner.kill()
        owner.wait()


def test_the_lock_survives_neither_its_owners_crash_nor_its_end(tmp_path):
    """Catches a stale lock that somebody has to delete by hand after each crash."""
    workdir = tmp_path / "run"
    owner = _owner(workdir)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (workdir / lock.FILE).exists()  # the file means nothing by itself
    with lock.hold(str(workdir)):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), lock.hold(str(workdir)):
            pass
    assert not (workdir / lock.FILE).exists()
    with lock.hold(str(workdir)):
        pass


def test_a_child_that_outlives_the_owner_does_not_keep_the_lock(tmp_path):
    """Catches a lock inherited by a worker process, which blocks the run that resumes."""
    workdir = tmp_path / "run"
    then = (
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "    print('held', flush=True); print(child.pid, flush=True); time.sleep(60)"
    )
    owner = _owner(workdir, then)
    child = int(owner.stdout.readline())
    try:
        owner.kill()
        owner.wait()
        with lock.hold(str(workdir)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_a_killed_owner_had_half_written_is_removed(tmp_path):
    """Catches images/step8.png.77.tmp, which stays for ever in each workdir that was killed."""
    (tmp_path / "images").mkdir()
    halves = [tmp_path / "images" / "a.png.77.tmp", tmp_path / "metrics.jsonl.77.tmp"]
    others = [tmp_path / "images" / "a.png", tmp_path / "notes.tmp", tmp_path / "a.77.tmp.txt"]
    for path in halves + others:
        path.write_bytes(b"x")
    with lock.hold(str(tmp_path)):
        assert not any(path.exists() for path in halves)
    assert all(path.exists() for path in others)


def test_the_other_processes_of_one_run_need_no_lock(tmp_path):
    """Catches a distributed run that refuses its own second process."""
    with lock.hold(str(tmp_path), 0), lock.hold(str(tmp_path), 1), lock.hold(str(tmp_path), 2):
        with pytest.raises(UserError), lock.hold(str(tmp_path), 0):
            pass


def test_a_refused_run_leaves_no_folder_behind(small, alone, tmp_path):
    """Catches an empty workdir for each mistake in a command."""
    small.init_from = str(tmp_path / "none")
    with pytest.raises(UserError):
        train.run(small, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    """Catches a run that cannot start at all on a store that knows no locks."""

    def unable(descriptor, operation):
        raise OSError(lock.errno.ENOTSUP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unable)
    with lock.hold(str(tmp_path)):
        assert "cannot be locked" in caplog.text
