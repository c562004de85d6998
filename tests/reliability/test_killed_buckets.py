# SPDX-License-Identifier: Apache-2.0
"""A run in a bucket ends with the bits of one on a disk, though every tenth request fails."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, killing, stores

from dcae_jax.files import buckets
from dcae_jax.runtime import process

UPLOADS = [
    ("dcae_jax.files.buckets", "put_file", "upload"),
    ("dcae_jax.files", "write_json", "json"),
]


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """(URL of a bucket, the proxy before its store); the clients' environment is set."""
    for package in (stores.PACKAGES[request.param], buckets.STORES[request.param]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run `make test-buckets`")
    folder = tmp_path_factory.mktemp(request.param)
    with stores.store(request.param, folder) as (proxy, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            buckets._system.cache_clear()
            yield f"{request.param}://{stores.BUCKET}", proxy


@pytest.fixture(scope="module")
def run(bucket):
    """A server that runs command lines; it has the environment of the store's clients."""
    server = killing.Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(run, data, tmp_path_factory):
    """The workdir of a run on a disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, _, said = run(killing.arguments(workdir, data), stderr=f"{workdir}.log")
    assert status == 0, said[-3000:]
    return workdir


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_a_run_killed_five_times_on_a_failing_store_ends_bit_equal(
    bucket, run, data, whole, tmp_path
):
    """Catches a checkpoint that counts half uploaded, rows lost or doubled, a request given up."""
    url, proxy = bucket
    argv, rng = killing.arguments(f"{url}/run", data), random.Random(url)
    log, hit = tmp_path / "run.log", {}
    proxy.every = 10
    for number in range(5):
        kill = killing.draw_kill(rng)
        if number % 2:  # among the 40 or so files of a checkpoint
            kill = ("upload", rng.randint(1, 60), rng.uniform(0, 0.01), signal.SIGKILL)
        status, _, said = run(argv, [kill], stderr=log, more=UPLOADS)
        assert status in (-signal.SIGKILL, 0), (kill, status, said[-3000:])
        hit[kill[0]] = hit.get(kill[0], 0) + (status != 0)
    status, _, said = run(argv, stderr=log)
    assert status == 0, said[-3000:]
    proxy.every = 0
    print("killed at", hit, "requests failed:", proxy.failed)
    assert proxy.failed > 20
    there = tmp_path / "run"
    buckets.get_folder(f"{url}/run", str(there), buckets.tree(f"{url}/run"))
    killing.assert_same(whole, there)


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_the_second_of_two_jobs_is_refused_and_changes_nothing(bucket, run, data, tmp_path):
    """Catches two runs that write each other's checkpoints, as no lock of a disk keeps them."""
    url, _ = bucket
    argv = killing.arguments(f"{url}/two", data, steps=10_000, evaluate_first=False)
    log = tmp_path / "first.log"
    command, environment = ["-m", "dcae_jax.main", *argv], {**os.environ, "PYTHONPATH": ROOT}
    with open(log, "w") as said, open(log) as seen:
        first = subprocess.Popen([sys.executable, *command], stderr=said, env=environment)
        try:
            while "step 3" not in (line := seen.readline()):
                assert first.poll() is None, log.read_text()
                time.sleep(0 if line else 1)
            status, _, said = run(argv, stderr=tmp_path / "second.log")
            assert status == process.MISTAKE and f"in use by process {first.pid} on " in said, said
        finally:
            first.kill()
            first.wait()
