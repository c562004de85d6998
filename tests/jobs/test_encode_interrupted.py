# SPDX-License-Identifier: Apache-2.0
"""The job `encode`, killed, stopped, repeated, in two processes: always the same bytes."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
from support import ROOT, encoding, run_job
from support.processes import two_processes

from dcae_jax import files
from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.jobs import encode
from dcae_jax.runtime import preemption


def test_a_killed_job_ends_with_the_same_bytes(encode_config, tmp_path, alone):
    """Catches half a shard taken for a whole one, and statistics that forget the first half."""
    encode_config.encode.crops = 20  # enough that the signal finds the job at work
    assert run_job(encode, encode_config, str(tmp_path / "whole")) == encode.DONE
    killed = tmp_path / "killed"
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": xla}
    process = subprocess.Popen(
        encoding.command(killed, encode_config), env=environment, stderr=subprocess.DEVNULL
    )
    first = killed / latents.shard_name(0, 92)
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None and not first.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert first.exists() and not (killed / latents.MANIFEST).exists()
    before = first.stat()
    done = subprocess.run(
        encoding.command(killed, encode_config), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming: " in done.stderr
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    encoding.assert_same_files(tmp_path / "whole", killed)


class _Killed(BaseException):
    """In the place of a power cut."""


@pytest.mark.parametrize("file", ["encode.json", "00001-of-00005.json", "00004-of-00005.json"])
@pytest.mark.parametrize("after", [False, True])
def test_every_moment_of_a_crash_is_safe(
    encoded, encode_config, tmp_path, monkeypatch, alone, file, after
):
    """Catches a shard that counts before its sums are written, and files left by a crash."""
    write_json = files.write_json

    def crash(path, value):
        if path.endswith(file):
            if after:
                write_json(path, value)
            raise _Killed
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", crash)
    with pytest.raises(_Killed):
        run_job(encode, encode_config, str(tmp_path))
    (tmp_path / f"{latents.MANIFEST}.99.tmp").write_text("{")
    monkeypatch.setattr(files, "write_json", write_json)
    with pytest.raises(UserError, match="is not fully encoded|holds no latents"):
        latents.latents(str(tmp_path))
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    encoding.assert_same_files(encoded, tmp_path)


def test_sigterm_stops_after_a_whole_shard_with_status_75(
    encoded, encode_config, tmp_path, monkeypatch, alone
):
    """Catches a preempted job that goes on, calls itself done, or leaves half a shard."""
    write_json = files.write_json

    def terminate(path, value):
        write_json(path, value)
        if path.endswith("00001-of-00005.json"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files, "write_json", terminate)
    assert run_job(encode, encode_config, str(tmp_path)) == preemption.STATUS
    left = sorted(name for name in os.listdir(tmp_path) if not name.endswith(".json"))
    assert left == [latents.shard_name(s, 5) for s in range(2)]
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    encoding.assert_same_files(encoded, tmp_path)


def test_a_finished_job_is_left_alone_and_mended_where_a_shard_is_damaged(
    encoded, encode_config, tmp_path, monkeypatch, alone
):
    """Catches a second encoding of everything, and a truncated shard that stays."""
    for name in os.listdir(encoded):
        (tmp_path / name).write_bytes(pathlib.Path(encoded, name).read_bytes())
    done = []
    write_shard = latents.write_shard
    monkeypatch.setattr(
        latents,
        "write_shard",
        lambda w, shard, *rest: done.append(shard) or write_shard(w, shard, *rest),
    )
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    assert not done
    os.truncate(tmp_path / latents.shard_name(3, 5), 1000)
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    assert [shard.first for shard in done] == [15]
    encoding.assert_same_files(encoded, tmp_path)


def test_two_processes_write_what_one_writes(encoded, encode_config, tmp_path):
    """Catches shards that two processes write, or none, and statistics of one process's part."""
    settings = encode_config.to_dict() | {"workdir": str(tmp_path)}
    # The same four images on each device as in one process on one device.
    settings["encode"] |= {"batch_size": 16}
    two_processes(TWO, {"config": json.loads(json.dumps(settings))})
    encoding.assert_same_files(encoded, tmp_path)


TWO = """
from dcae_jax.jobs import encode
from support import run_job
given = settings["config"]
config = config_lib.load_file(f"{CONFIGS}/encode.py")
config.init_from, config.resolution = given["init_from"], given["resolution"]
config.data.source, config.data.path = given["data"]["source"], given["data"]["path"]
config.encode.update(given["encode"])
print(json.dumps(run_job(encode, config, given["workdir"])))
"""
