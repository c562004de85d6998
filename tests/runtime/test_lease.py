# SPDX-License-Identifier: Apache-2.0
"""Two jobs on one workdir: the second is refused, and a dead owner stands in nobody's way."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from support import ROOT, run_job

from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.runtime import lease

HOLD = "import sys, time\nfrom dcae_jax.runtime import lease\nwith lease.hold(sys.argv[1]):\n"


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
            run_job(train, small, str(workdir))
        said = str(refused.value)
        assert f"process {owner.pid} on {socket.gethostname()} since 20" in said, said
        assert not (workdir / "checkpoints").exists()
    finally:
        owner.kill()
        owner.wait()


def test_the_holder_is_named_and_is_not_disturbed(tmp_path):
    """Catches a question that takes the lease itself, so that a job starting then is refused."""
    workdir = tmp_path / "run"
    assert lease.holder(str(workdir)) == "" and not workdir.exists()
    owner = _owner(workdir)
    try:
        assert lease.holder(str(workdir)).startswith(f"process {owner.pid} on ")
        with pytest.raises(UserError, match=str(owner.pid)), lease.hold(str(workdir)):
            pass
    finally:
        owner.kill()
        owner.wait()
    assert (workdir / lease.FILE).exists() and lease.holder(str(workdir)) == ""
    with lease.hold(str(workdir)):
        pass


def test_the_lock_survives_neither_its_owners_crash_nor_its_end(tmp_path):
    """Catches a stale lock that somebody has to delete by hand after each crash."""
    workdir = tmp_path / "run"
    owner = _owner(workdir)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (workdir / lease.FILE).exists()  # the file means nothing by itself
    with lease.hold(str(workdir)):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), lease.hold(str(workdir)):
            pass
    assert not (workdir / lease.FILE).exists()
    with lease.hold(str(workdir)):
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
        with lease.hold(str(workdir)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("folder", ["images", "diverged", "parts", "reference"])
def test_what_a_killed_owner_had_half_written_is_removed(folder, tmp_path):
    """Catches images/step8.png.77.tmp, which stays for ever in each workdir that was killed."""
    (tmp_path / folder).mkdir()
    halves = [tmp_path / folder / "a.png.77.tmp", tmp_path / "metrics.jsonl.77.tmp"]
    others = [tmp_path / folder / "a.png", tmp_path / "notes.tmp", tmp_path / "a.77.tmp.txt"]
    for path in halves + others:
        path.write_bytes(b"x")
    with lease.hold(str(tmp_path)):
        assert not any(path.exists() for path in halves)
    assert all(path.exists() for path in others)


def test_the_other_processes_of_one_run_need_no_lock(tmp_path):
    """Catches a distributed run that refuses its own second process."""
    with lease.hold(str(tmp_path), 0), lease.hold(str(tmp_path), 1), lease.hold(str(tmp_path), 2):
        with pytest.raises(UserError, match="is in use by"), lease.hold(str(tmp_path), 0):
            pass


def test_a_refused_run_leaves_no_folder_behind(small, alone, tmp_path):
    """Catches an empty workdir for each mistake in a command."""
    small.init_from = str(tmp_path / "none")
    with pytest.raises(UserError, match=re.escape(small.init_from)):
        run_job(train, small, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    """Catches a run that cannot start at all on a store that knows no locks, and one that deletes
    files there without holding a lock."""

    def unable(descriptor, operation):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unable)
    half = tmp_path / "metrics.jsonl.77.tmp"
    half.write_bytes(b"x")
    with lease.hold(str(tmp_path)):
        assert "cannot be locked" in caplog.text
        assert half.exists()


@pytest.mark.parametrize("target", ["precious.txt", "none.txt"])
def test_a_lock_that_is_a_link_is_refused(target, tmp_path):
    """Catches a downloaded folder whose `.lock` points at a file that is truncated and overwritten,
    or made."""
    workdir, file = tmp_path / "run", tmp_path / target
    (tmp_path / "precious.txt").write_text("precious")
    workdir.mkdir()
    (workdir / lease.FILE).symlink_to(file)
    with pytest.raises(UserError, match="is a link.*remove it"), lease.hold(str(workdir)):
        pass
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert not (tmp_path / "none.txt").exists()
    assert (workdir / lease.FILE).is_symlink()


def test_a_lock_that_is_another_name_of_a_file_is_refused(tmp_path):
    """Catches a hard link whose other name loses its contents."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious.txt").write_text("precious")
    os.link(tmp_path / "precious.txt", tmp_path / "run" / lease.FILE)
    with pytest.raises(UserError, match="is a link"), lease.hold(str(tmp_path / "run")):
        pass
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_only_this_workdirs_own_halves_are_removed(tmp_path):
    """Catches a chain's folder, or whatever else is a folder here, that loses the file which its
    live job is just writing; and a link, through which files elsewhere are removed."""
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folders = [workdir / "phase1", workdir / "photos", workdir / "images", elsewhere]
    halves = [folder / "a.png.77.tmp" for folder in folders]
    for half in halves:
        half.parent.mkdir(parents=True)
        half.write_bytes(b"x")
    (workdir / "parts").symlink_to(elsewhere)
    with pytest.raises(UserError, match="parts is a link"), lease.hold(str(workdir)):
        pass
    assert all(half.exists() for half in halves)
    (workdir / "parts").unlink()
    (workdir / "b.77.tmp").symlink_to(halves[-1])
    (workdir / "d.77.tmp").mkdir()
    with lease.hold(str(workdir / "images")):
        halves[2].write_bytes(b"being written")
        with lease.hold(str(workdir)):
            assert all(half.exists() for half in halves)
    with lease.hold(str(workdir)):  # nobody else has `images` now
        assert [half.exists() for half in halves] == [True, True, False, True]
    assert (workdir / "b.77.tmp").is_symlink() and (workdir / "d.77.tmp").is_dir()


@pytest.mark.parametrize("name", lease.OWN)
def test_a_job_writes_through_no_link(name, tmp_path):
    """Catches a downloaded workdir whose link makes a run write into, or remove, other files."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link.*replace it"):
        with lease.hold(str(tmp_path / "run")):
            pass
    assert os.listdir(tmp_path / "run") == [name] and not (tmp_path / "elsewhere").exists()


def test_a_second_job_leaves_the_owners_record(tmp_path):
    """Catches a lock file that the refused job empties, so that the third gets no owner's name."""
    with lease.hold(str(tmp_path)):
        for _ in range(2):
            with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                with lease.hold(str(tmp_path)):
                    pass
        owner = json.loads((tmp_path / lease.FILE).read_text())
        assert owner.keys() == {"host", "pid", "since"}
