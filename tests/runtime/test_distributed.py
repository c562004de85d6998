# SPDX-License-Identifier: Apache-2.0
"""Processes that are one run: how they find each other, agree, train, stop and resume."""

import importlib
import inspect
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
from support import ROOT
from support.processes import JOINED, free_port, two_processes

from dcae_jax.errors import UserError
from dcae_jax.runtime import distributed

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


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


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
        {"JAX_COORDINATOR_ADDRESS": "h:1"},
    ],
)
def test_a_single_process_waits_for_nobody(environ):
    """Catches a laptop, or a shell in a cluster's allocation, that waits for others for ever."""
    assert distributed.find({}, environ) is None


def test_clusters_are_recognised():
    """Catches a pod whose hosts each train alone, and Slurm tasks with a node each that
    take one of its GPUs."""
    together = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    found = {"cluster_detection_method": "slurm", "local_device_ids": [1]}
    assert distributed.find({}, together) == found
    apart = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}
    assert distributed.find({}, apart) == found | {"local_device_ids": None}
    assert distributed.detect(OPEN_MPI) == "ompi"
    assert distributed.detect({"TPU_WORKER_HOSTNAMES": "a,b"}) == "gketpu"
    assert distributed.detect({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    assert (
        distributed.detect({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == "gketpu"
    )
    assert distributed.detect(POD) == "k8s"
    assert distributed.detect(POD | {"TPU_WORKER_HOSTNAMES": "alone"}) is None


def test_clusters_are_those_that_jax_knows():
    """Catches a name that JAX gives to no cluster, after which a pod's hosts would not start."""
    jax_names = inspect.getsource(importlib.import_module("jax._src.clusters.cloud_tpu_cluster"))
    for module in ("slurm_cluster", "ompi_cluster", "k8s_cluster"):
        jax_names += inspect.getsource(importlib.import_module(f"jax._src.clusters.{module}"))
    for name in ("slurm", "ompi", "gketpu", "gcetpu"):
        assert f'name: str = "{name}"' in jax_names, name
    assert "K8sCluster" in jax_names and "JOB_COMPLETION_INDEX" in jax_names


def test_pods_of_an_indexed_job_find_each_other(monkeypatch):
    """Catches pods that each train alone in the one workdir."""
    assert distributed.find({}, POD) == {"cluster_detection_method": None, "local_device_ids": None}
    pod = POD | {"JAX_COORDINATOR_ADDRESS": "job-0.net:55527", "JAX_NUM_PROCESSES": "4"}
    assert distributed.find({}, pod) == _explicit("job-0.net:55527", 4, 1)
    assert distributed.find({}, pod | {"JAX_NUM_PROCESSES": "1"}) is None
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", _refuse)
    with pytest.raises(UserError, match="Kubernetes, but no such.*pip install kubernetes, or set "):
        distributed.initialize({}, preemptible=False)


def _refuse(**arguments):
    raise ValueError("no such\ncluster")


def _explicit(address, count, process, device=None):
    """Arguments of JAX's start that leave it nothing to find out."""
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": process,
        "local_device_ids": device,
        "cluster_detection_method": "deactivate",
    }


def test_flags_name_the_cluster_or_are_refused():
    """Catches a mistyped number that ends in a traceback, or starts a run of one."""
    line = ["main", "--workdir=x", "--coordinator=h:1", "--num_processes=3", "--process_id=2"]
    given, rest = distributed.take_flags(line)
    assert rest == ["main", "--workdir=x"]
    assert distributed.find(given, {}) == _explicit("h:1", 3, 2)
    assert distributed.find({"coordinator": "h:1"}, OPEN_MPI) == _explicit("h:1", 2, 1, [1])
    elsewhere = {"JAX_COORDINATOR_ADDRESS": "elsewhere:1"}
    assert distributed.find({"coordinator": "h:1"}, OPEN_MPI | elsewhere) == _explicit(
        "h:1", 2, 1, [1]
    )
    assert distributed.find(given | {"num_processes": "1", "process_id": "0"}, {}) is None
    for change, said in (
        ({"process_id": "3"}, "less than --num_processes=3"),
        ({"process_id": "one"}, "non-negative integer"),
        ({"coordinator": "h"}, "HOST:PORT"),
        ({"process_id": ""}, "needs --process_id too"),
    ):
        with pytest.raises(UserError, match=said):
            distributed.find(given | change, {})


def test_a_reader_of_batches_joins_nothing(monkeypatch):
    """Catches worker processes of the data that count as processes of the run."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the run")
    distributed.initialize({"coordinator": "h"}, preemptible=True)  # flags that would be refused


# --- real processes -------------------------------------------------------------------------------

ALONE = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
from dcae_jax.runtime import distributed as hosts
hosts.REPORT_S, hosts.ARRIVE_S = 1, int(sys.argv[3])
names = dict(zip(hosts.FLAGS, (sys.argv[1], "3", sys.argv[2])))
hosts.initialize(names, preemptible=True)
"""


def _start(script, *arguments, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": ROOT,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
        **environment,
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_process_that_does_not_come_is_reported_by_all_that_do():
    """Catches a run that ends by a signal, or waits for ever, and says nothing to anybody."""
    address = f"127.0.0.1:{free_port()}"
    processes = {
        # Process 2 gives up after process 0, with which JAX's coordinator goes.
        0: _start(ALONE, address, 0, 6),
        2: _start(ALONE, address, 2, 9),
        1: _start(ALONE, f"127.0.0.1:{free_port()}", 1, 3),  # process 0 never starts
    }
    for number, process in processes.items():
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 1, said
        *_, first, last = said.splitlines()
        where = f"this is process {number} of 3, process 0 is at 127.0.0.1:"
        assert first.startswith(f"still waiting for processes after 1 s: {where}")
        assert last.startswith("error: not all processes started within") and where in last


def test_a_process_that_is_not_there_is_reported_within_a_minute():
    """Catches a report that comes when the scheduler has long given up."""
    assert distributed.REPORT_S <= 60 and distributed.AGREE_S <= 60


def test_a_port_that_is_taken_is_told():
    """Catches a traceback for a port that another program has."""
    with socket.create_server(
        ("", 0), family=socket.AF_INET6, dualstack_ipv6=socket.has_dualstack_ipv6()
    ) as server:
        port = server.getsockname()[1]
        process = _start(ALONE, f"127.0.0.1:{port}", 0, 60)
        said = process.communicate(timeout=100)[1]
    assert f"UserError: --coordinator: port {port}: " in said and "choose a free port" in said


BY_CLUSTER = """
import json, os, sys
settings = json.loads(sys.argv[1])
for name, value in settings["environ"].items():
    os.environ[name] = value.format(**settings, port=settings["address"].split(":")[1])
from dcae_jax.runtime import distributed as hosts
hosts.initialize({}, preemptible=False)
import jax
"""
HERE = {
    "slurm": {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": "{process}",
        "SLURM_LOCALID": "{process}",
        "JAX_COORDINATOR_PORT": "{port}",
    },
    "ompi": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{process}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{process}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "JAX_COORDINATOR_PORT": "{port}",
    },
    "pods": {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": "{process}",
        "JAX_COORDINATOR_ADDRESS": "{address}",
        "JAX_NUM_PROCESSES": "2",
    },
}


@pytest.mark.parametrize("cluster", HERE)
def test_processes_of_a_cluster_start_as_one_run(cluster):
    """Catches an environment that JAX reads differently from this package, so that two runs of one
    process each write into the one workdir."""
    script = "print(json.dumps([jax.process_count(), jax.process_index()]))"
    said = two_processes(script, {"environ": HERE[cluster]}, BY_CLUSTER)
    assert said == [[2, 0], [2, 1]]


AGREEING = """
said = []
def agree(**facts):
    try:
        hosts.assert_same_config(facts)
        said.append("")
    except ValueError as error:
        said.append(type(error).__name__ + ": " + str(error))
agree(step=3)
agree(step=3 + settings["process"], same=1)
agree(**({"long": "x" * 1000} if settings["process"] else {}), steps=(3, 4))
print(json.dumps([jax.process_count(), *said]))
"""


def test_processes_agree_or_say_who_differs():
    """Catches a run of two configurations or steps, also where one of them is longer, and an error
    that one process has alone."""
    first, second = two_processes(AGREEING, {}, JOINED)
    remedy = "start all with the same command"
    differs = f"UserError: the processes differ: process 1 has step=4 (process 0: 3); {remedy}"
    assert first == second and second[:3] == [2, "", differs]
    assert f"process 1 has long='{'x' * 1000}' (process 0: None); {remedy}" in second[3]


SILENT = """
import os, time
if settings["process"] == 0:
    time.sleep(15)
    print("[]", flush=True)
    os._exit(0)
hosts.AGREE_S = 3
exit_ = os._exit
hosts.os._exit = lambda status: (print(json.dumps(status), flush=True), exit_(0))
hosts.assert_same_config({})
"""


@pytest.mark.slow
def test_a_process_that_says_nothing_is_reported():
    """Catches a run that waits for ever for an answer."""
    began = time.monotonic()
    assert two_processes(SILENT, {}, JOINED)[1] == distributed.FAILED
    assert time.monotonic() - began < 100
