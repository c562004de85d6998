# SPDX-License-Identifier: Apache-2.0
"""A run in a bucket ends with the bits of one on a disk, though every tenth request fails."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import CONFIGS, ROOT, flags, killing, stores

from dcae_jax import files
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.config.loading import PHASES
from dcae_jax.files import buckets
from dcae_jax.runtime import process

UPLOADS = [
    ("dcae_jax.files.buckets", "put_file", "upload"),
    ("dcae_jax.files", "write_json", "json"),
]


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
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
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


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, answer, status, words",
    [
        ("buckett", 0, process.MISTAKE, "there is no bucket 'buckett'; check its name"),
        (stores.BUCKET, 403, process.FAILED, ": no permission ("),
        (stores.BUCKET, 503, process.FAILED, ": the store does not answer ("),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(
    bucket, run, data, tmp_path, name, answer, status, words
):
    """Catches a page of a library's frames, and a cause that is found out after minutes."""
    url, proxy = bucket
    scheme = url.partition(":")[0]
    argv = killing.arguments(f"{scheme}://{name}/run", data)
    proxy.answer = answer
    try:
        found, _, said = run(argv, stderr=tmp_path / "log")
    finally:
        proxy.answer = 0
    assert found == status and words in said and said.count("\n") == 1, said


FEW = {"batch_size": 4, "steps": 4, "save_every": 2, "log_every": 1, "evaluate_every": 0}
FEW |= {"evaluate_first": False, "evaluate.count": 4, "evaluate.batch_size": 4}
FEW |= {"model.widths": (8, 8, 16, 32, 32), "evaluate.resolutions": (64,)}
DRAWN = {"sample.count": 6, "sample.batch_size": 4, "sample.steps": 4, "sample.sampler": "heun"}


def _chain(root):
    """[(workdir, its command line)]: each job from and to `root`."""
    phases = {f"{phase}.{k}": v for phase in PHASES for k, v in FEW.items()}
    phases |= {"phase2.resolutions": (64,)}
    model, usit = f"{root}/chain/phase3", f"{root}/usit"
    exported, latents = f"{root}/exported/export", f"{root}/latents"
    jobs = [
        ("chain", "phases.py:tiny", phases),
        ("latents", "encode.py:tiny", {"init_from": model, "encode.count": 24}),
        ("usit", "usit.py:tiny", {**FEW, **DRAWN, "data.path": latents, "batch_size": 8}),
        ("samples", "sample.py", {"init_from": usit, "sample.format": "npz", **DRAWN}),
        ("evaluation", "evaluate.py", {"init_from": model, "evaluate.count": 4}),
        ("exported", "export.py", {"init_from": model}),
        ("exported-usit", "export.py", {"init_from": usit}),
        ("again", "sample.py", {"init_from": f"{root}/exported-usit/export", **DRAWN}),
        ("evaluated-again", "evaluate.py", {"init_from": exported, "evaluate.count": 4}),
    ]
    return [
        (name, [f"--config={CONFIGS}/{file}", f"--workdir={root}/{name}", *flags(keys)])
        for name, file, keys in jobs
    ]


def _results(folder):
    """{path: content} of what a chain wrote, without times, places and what belongs to a store."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or re.search(r"checkpoints/|params/|events|times|\.lease|\.lock", name):
            continue
        if path.name == files.METRICS:
            found[name] = killing.rows(path.parent)
        elif path.suffix == ".json":
            found[name] = path.read_text().replace(str(folder), "ROOT")
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole_chain(run, tmp_path_factory):
    """The folder of a chain of all jobs on a disk."""
    folder = tmp_path_factory.mktemp("chain")
    for name, argv in _chain(folder):
        status, _, said = run(argv, stderr=folder.parent / f"{name}.log")
        assert status == 0, (name, said[-3000:])
    return folder


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_a_chain_of_all_jobs_in_a_failing_store_has_the_results_of_a_disk(
    bucket, run, whole_chain, tmp_path
):
    """Catches a job that reads or writes a disk where it is given a URL, or loses a request."""
    url, proxy = bucket[0] + "/all", bucket[1]
    proxy.every, failed = 10, proxy.failed
    for name, argv in _chain(url):
        status, _, said = run(argv, stderr=tmp_path / f"{name}.log")
        assert status == 0, (name, said[-3000:])
    proxy.every = 0
    print("requests failed:", proxy.failed - failed)
    there = tmp_path / "all"
    buckets.get_folder(url, str(there), buckets.tree(url))
    ours, theirs = _results(there), _results(whole_chain)
    for name, content in ours.items():
        ours[name] = content.replace(url, "ROOT") if isinstance(content, str) else content
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in ours if ours[name] != theirs[name]] == []
    for name in ("chain/phase1", "chain/phase2", "chain/phase3", "usit"):
        for step in checkpoints.saved_steps(str(whole_chain / name)):
            left, right = (killing.everything(root / name, step) for root in (there, whole_chain))
            assert left.keys() == right.keys()
            for key, value in left.items():
                np.testing.assert_array_equal(value, right[key], err_msg=f"{name} {step} {key}")


def _two_processes(argv, log):
    """Runs a command line in two processes of one device, each with a disk of its own."""
    address = f"--coordinator=127.0.0.1:{stores.free_port()}"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    command = [sys.executable, "-m", "dcae_jax.main", *argv, address, "--num_processes=2"]
    with open(log, "a") as said:
        processes = [
            subprocess.Popen([*command, f"--process_id={i}"], stderr=said, env=environment)
            for i in range(2)
        ]
        try:
            assert [process.wait(900) for process in processes] == [0, 0], log.read_text()[-3000:]
        finally:
            for process in processes:
                process.kill()


@pytest.mark.xdist_group("buckets")
@pytest.mark.slow
def test_two_processes_share_a_bucket_as_they_share_a_disk(bucket, data, tmp_path):
    """Catches a checkpoint that has the shards of one process alone, and one that only as many
    processes as wrote it can resume."""
    url = f"{bucket[0]}/shared"
    few = {"log_every": 1, "save_every": 2, "evaluate_every": 0, "evaluate_first": False}
    few |= {"mesh__data": 1, "mesh__fsdp": 2, "evaluate__batch_size": 2}
    for workdir in (url, tmp_path / "disk"):
        for steps in (2, 4):
            argv = killing.arguments(workdir, data, steps=steps, **few)
            _two_processes(argv, tmp_path / "two.log")
    there = tmp_path / "bucket"
    buckets.get_folder(url, str(there), buckets.tree(url))
    killing.assert_same(tmp_path / "disk", there)
    named = [name for name in files.sizes(f"{url}/checkpoints/4") if "process_" in name]
    assert any(name.endswith("process_1") for name in named), named
