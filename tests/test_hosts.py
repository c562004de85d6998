# SPDX-License-Identifier: Apache-2.0
"""Processes that are one run: how they find each other, agree, train, stop and resume."""

import multiprocessing
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import CONFIGS, NARROW, flags, small_judges

from dcae_jax import checkpoint, hosts, report, train
from dcae_jax.config import UserError

# --- who is there ---------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A shell in an allocation for 8, and a batch script that starts nothing with srun.
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_single_process_waits_for_nobody(environ):
    """Catches a laptop, or a shell in a cluster's allocation, that waits for others for ever."""
    assert hosts.find({}, environ) is None


def test_clusters_are_recognised(monkeypatch):
    """Catches a pod of which each host trains by itself, and Slurm tasks with a node each that
    take one of its GPUs."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)  # JAX reads the environment itself
    together = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    found = hosts.find({}, together)
    assert re.fullmatch(r"node3:\d+", found.coordinator)
    assert (found.count, found.process, found.local_devices) == (8, 5, (1,))
    apart = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}
    assert hosts.find({}, apart).local_devices is None
    assert hosts.detect(OPEN_MPI) == "ompi"
    assert hosts.detect({"TPU_WORKER_HOSTNAMES": "a,b"}) == "gketpu"
    assert hosts.detect({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    indexed = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert hosts.detect(indexed) == "k8s"
    assert hosts.detect(indexed | {"TPU_WORKER_HOSTNAMES": "alone"}) is None


def test_pods_of_an_indexed_job_find_each_other(monkeypatch):
    """Catches pods of which each trains by itself in the one workdir."""
    from jax._src.clusters.k8s_cluster import K8sCluster

    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: False)
    with pytest.raises(UserError, match="pip install kubernetes; give --coordinator"):
        hosts.find({}, pod)
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "get_process_id", lambda: 1)
    monkeypatch.setattr(K8sCluster, "get_coordinator_address", lambda **_: "job-0.net:55527")
    for count, found in ((4, hosts.Cluster("job-0.net:55527", 4, 1)), (1, None)):
        monkeypatch.setattr(K8sCluster, "get_process_count", lambda count=count: count)
        assert hosts.find({}, pod) == found


def test_flags_name_the_cluster_or_are_refused():
    """Catches a mistyped number that ends in a traceback, or starts a run of one."""
    line = ["main", "--workdir=x", "--coordinator=h:1", "--num_processes=3", "--process_id=2"]
    given, rest = hosts.take_flags(line)
    assert rest == ["main", "--workdir=x"]
    assert hosts.find(given, {}) == hosts.Cluster("h:1", 3, 2)
    assert hosts.find({"coordinator": "h:1"}, OPEN_MPI) == hosts.Cluster("h:1", 2, 1, (1,))
    for change, said in (
        ({"process_id": "3"}, "below --num_processes=3"),
        ({"process_id": "one"}, "whole number"),
        ({"coordinator": "h"}, "HOST:PORT"),
        ({"process_id": ""}, "needs --process_id too"),
    ):
        with pytest.raises(UserError, match=said):
            hosts.find(given | change, {})


def test_a_reader_of_batches_joins_nothing(monkeypatch):
    """Catches worker processes of the data that count as processes of the run."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the run")
    hosts.start({"coordinator": "h"}, preemptible=True)  # flags that would be refused


# --- roll call ------------------------------------------------------------------------------------


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _roll_call(counts, seconds):
    """What each of the processes {number: count that it was started with} is told."""
    address, told = f"127.0.0.1:{_free_port()}", {}

    def call(process, count):
        try:
            hosts.roll_call(hosts.Cluster(address, count, process), seconds)
            told[process] = ""
        except hosts.Absent as error:
            told[process] = str(error)

    threads = [threading.Thread(target=call, args=item) for item in counts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_who_come_go_on():
    """Catches a call that loses one of several, or leaves the port taken."""
    assert _roll_call({2: 3, 1: 3, 0: 3}, 20) == {0: "", 1: "", 2: ""}


def test_who_does_not_come_is_named_to_all():
    """Catches a run that ends by a signal, or waits for ever, and does not say for whom."""
    told = _roll_call({0: 4, 2: 4}, 1)
    assert told[0] == told[2] and "processes 1, 3 of 4 did not start within 1 s" in told[0]
    assert "process 0 does not answer" in _roll_call({1: 2}, 1)[1]
    assert "process 1 was started as one of 3" in _roll_call({0: 2, 1: 3}, 20)[0]


# --- two real processes ---------------------------------------------------------------------------

JOINED = """
import json, logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
settings = json.loads(sys.argv[1])
from dcae_jax import hosts
flags = {"coordinator": settings["address"], "num_processes": "2"}
flags["process_id"] = str(settings["process"])
hosts.start(flags, preemptible=True)
hosts.start(flags, preemptible=True)
import jax
"""

AGREEING = """
said = []
def agree(**facts):
    try:
        hosts.agree(facts)
        said.append("")
    except (hosts.Absent, ValueError) as error:
        said.append(type(error).__name__ + ": " + str(error))
agree(step=3)
agree(step=3 + settings["process"], same=1)
hosts.AGREE_S = 2
if settings["process"] == 0:
    agree(step=4)
    hosts._store().wait_at_barrier("end", 60000)
else:
    hosts._store().wait_at_barrier("end", 60000)
print(json.dumps([jax.process_count(), *said]))
"""


def test_processes_agree_or_say_who_differs():
    """Catches a run of two configurations or steps, and one that waits for ever for an answer."""
    first, second = small_judges.two_processes(AGREEING, {}, JOINED)
    differs = "UserError: the processes differ: process 1 has step=4 (0: 3); start all alike"
    assert second == [2, "", differs]
    assert first[:3] == second
    assert "Absent: process 1 said nothing for 2 s" in first[3]


TRAINING = """
sys.argv = sys.argv[:1]
from support import CONFIGS, small_judges
from dcae_jax import config as config_lib, train
config = config_lib.load_file(CONFIGS + "/phase1.py", "tiny")
config.update(settings["config"])
config.mesh.update(settings["mesh"])
print(json.dumps(train.run(config, settings["workdir"])))
"""


def _train(config, workdir, mesh=None):
    """Two processes train `config` into `workdir`."""
    changed = {key: config.to_dict()[key] for key in ("model", "evaluate", "optimizer")}
    for key in ("resolution", "batch_size", "steps", "log_every", "save_every", "evaluate_every"):
        changed[key] = config[key]
    settings = {"config": changed, "workdir": str(workdir), "mesh": mesh or {}}
    # JSON has no tuples, and the configuration takes nothing else.
    script = TRAINING.replace('settings["config"]', repr(changed))
    assert small_judges.two_processes(script, settings, JOINED) == [0, 0]


def _assert_same_rows(rows, wanted):
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        values = {k: v for k, v in want.items() if not k.endswith("_s")}
        assert row.keys() == want.keys()
        for key, value in values.items():
            # A ReLU that opens on one side alone is seen in the norm of the gradients at once.
            tolerance = 5e-3 if key == "grad_norm" else 2e-4
            floor = 1e-4 if key.startswith("ssim") else 1e-5  # of 1; an untrained model has 0.03
            np.testing.assert_allclose(row[key], value, rtol=tolerance, atol=floor, err_msg=key)


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"data": 1, "spatial": 4}, marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_and_one_resumes_them(mesh, small, alone, tmp_path):
    """Catches images read twice or by nobody, an evaluation of one process's share, rows written
    by both, and a checkpoint that needs as many processes as wrote it."""
    small.optimizer.eps = 1e-4  # or where a gradient is zero, Adam would step by rounding's sign
    small.evaluate_every = 2
    if mesh:
        small.resolution, small.evaluate.resolutions = 128, (128,)
    size = small.resolution
    whole, parts = str(tmp_path / "whole"), tmp_path / "parts"
    assert train.run(small, whole) == train.DONE
    wanted = report.read_rows(whole)
    small.steps = 2
    _train(small, parts, mesh)
    two = report.read_rows(str(parts))
    _assert_same_rows(two, wanted[:2])
    assert f"psnr_{size}" in two[1]
    assert (parts / "images" / f"step0000002_{size}.png").exists()
    small.steps = 4
    assert train.run(small, str(parts)) == train.DONE
    _assert_same_rows(report.read_rows(str(parts)), wanted)


@pytest.mark.slow
def test_sigterm_on_one_process_saves_once_on_both(tmp_path):
    """Catches processes that stop at different steps, of which one waits for ever."""
    settings = {
        **NARROW,
        "steps": 2000,
        "log_every": 1,
        "save_every": 1000,
        "evaluate_every": 0,
    }
    command = [
        *(sys.executable, "-m", "dcae_jax.main", f"--workdir={tmp_path / 'run'}"),
        f"--config={os.path.join(CONFIGS, 'phase1.py')}:tiny",
        *flags(settings),
        *(f"--coordinator=127.0.0.1:{_free_port()}", "--num_processes=2"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
    }
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        end = time.monotonic() + 300
        while not report.read_rows(str(tmp_path / "run")) and time.monotonic() < end:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], said[0][-2000:]
    (step,) = checkpoint.saved_steps(str(tmp_path / "run"))
    for i, text in enumerate(said):
        assert f"process {i} of 2 on" in text and "2 of 4 devices" in text
        assert f"saved at step {step} after a signal" in text
