# SPDX-License-Identifier: Apache-2.0
"""Several processes that are one run: they find each other, agree on it, and stop together.

`start` finds the other processes from flags or from what the cluster sets in the environment, and
hands them to `jax.distributed`. JAX ends a process by a signal and without a name when another one
never comes, so a roll call goes before it, on the port that JAX takes over afterwards.
"""

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from dcae_jax.config import MachineError, UserError

ARRIVE_S = 300  # for all processes to start: a pod's hosts do not come up at once
AGREE_S = 60  # for all that have started to say what they run
LEAVE_S = 60  # that one which ends, maybe by an error, waits for the others
FLAGS = ("coordinator", "num_processes", "process_id")

_rounds = itertools.count()  # of `agree`, the same on all processes
_looks = itertools.count()  # of `Notice`, likewise


class Absent(MachineError):
    """A process that did not come, or does not answer."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What `jax.distributed.initialize` has to know."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    process: int
    local_devices: tuple[int, ...] | None = None  # this process's among its host's; None: all


# --- who is there ---------------------------------------------------------------------------------


def take_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({flag of FLAGS: value}, the rest of the command line)."""
    found, rest = {}, []
    for argument in argv:
        name, equals, value = argument.lstrip("-").partition("=")
        if equals and argument.startswith("-") and name in FLAGS:
            found[name] = value
        else:
            rest.append(argument)
    return found, rest


def find(given: Mapping[str, str], environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that the flags, or else the environment, speak of; None for a single process.

    Raises UserError for flags that do not fit together.
    """
    if given:
        return _from_flags(given, environ)
    method = detect(environ)
    return method and _from_jax(method, environ)


def _from_flags(given: Mapping[str, str], environ: Mapping[str, str]) -> Cluster | None:
    started = {**_started_by(environ), **given}
    missing = [f"--{name}" for name in FLAGS if not started.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(f'--{name}' for name in given)} needs {' and '.join(missing)} too; give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    numbers = {}
    for name in ("num_processes", "process_id"):
        if not re.fullmatch(r"\d+", started[name]):
            raise UserError(f"--{name}={started[name]!r} must be a whole number")
        numbers[name] = int(started[name])
    count, process = numbers["num_processes"], numbers["process_id"]
    if not process < count:
        raise UserError(
            f"--process_id={process} must be below --num_processes={count}; they count from 0"
        )
    if not re.fullmatch(r"(.+):(\d+)", started["coordinator"]):
        raise UserError(
            f"--coordinator={started['coordinator']!r} is no HOST:PORT; name process 0's host and "
            "a free port there"
        )
    if count == 1:
        return None
    return Cluster(started["coordinator"], count, process, _one_each(environ))


def _started_by(environ: Mapping[str, str]) -> dict[str, str]:
    """Number of processes and this one's, where Slurm or Open MPI started several."""
    for count, process in (
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        if int(environ.get(count, 1)) > 1 and process in environ:
            return {"num_processes": environ[count], "process_id": environ[process]}
    return {}


def _one_each(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The one device of this process where several share a host, under Slurm or Open MPI."""
    several = (
        not re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        or int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
    )
    number = environ.get("SLURM_LOCALID", environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    return (int(number),) if several and number is not None and _started_by(environ) else None


def detect(environ: Mapping[str, str]) -> str | None:
    """JAX's name of the cluster that started this as one of several processes, if one did.

    A plain machine, a shell inside a Slurm job and a pod that is no indexed job are none.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return "slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    cpu_only = environ.get("JAX_PLATFORMS", "") == "cpu"
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    if not cpu_only and ("," in workers or slices > 1):
        return "gketpu"
    if not cpu_only and not workers and "TPU_SKIP_MDS_QUERY" not in environ and _tpu_chips():
        return "gcetpu"
    indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if indexed and not workers:  # a slice of one TPU host is whole by itself
        return "k8s"
    return None


def _tpu_chips() -> bool:
    """Whether this machine has TPU chips and the library for them."""
    import glob
    import importlib.util

    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _from_jax(method: str, environ: Mapping[str, str]) -> Cluster | None:
    """The cluster as JAX reads it off the environment; None if it has but one process.

    jax.distributed has this as a part of its start alone. Raises UserError where the environment
    does not tell all.
    """
    from jax._src.clusters import ClusterEnv

    try:
        if method == "k8s":
            coordinator, count, process = _from_kubernetes(environ)
        else:
            coordinator, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, method, ARRIVE_S
            )
    except Exception as error:  # of JAX, of the network, of Kubernetes' client
        raise UserError(_unknown(method, str(error))) from error
    if count == 1 or (coordinator is None and method == "gcetpu"):
        return None
    if None in (coordinator, count, process):
        raise UserError(_unknown(method, "it does not say where process 0 is"))
    return Cluster(coordinator, count, process, _one_each(environ))


def _from_kubernetes(environ: Mapping[str, str]) -> tuple[str | None, int, int]:
    """(coordinator, number of processes, this one's) of an indexed Job or JobSet.

    JAX's choice by name does not know this cluster, which has no name there.
    """
    from jax._src.clusters.k8s_cluster import K8sCluster

    if not K8sCluster.is_env_present():
        raise RuntimeError("Kubernetes' client is missing: pip install kubernetes")
    count, process = K8sCluster.get_process_count(), K8sCluster.get_process_id()
    if count == 1:
        return None, count, process
    port = environ.get("JAX_COORDINATOR_PORT")
    address = K8sCluster.get_coordinator_address(
        timeout_secs=ARRIVE_S, override_coordinator_port=port
    )
    return address, count, process


def _unknown(method: str, why: str) -> str:
    return (
        f"started by {method}, but {' '.join(why.split())}; give --coordinator=HOST:PORT "
        "--num_processes=N --process_id=I"
    )


# --- start ----------------------------------------------------------------------------------------


def start(given: Mapping[str, str], *, preemptible: bool) -> None:
    """Joins the other processes of the run, if there are any and this was not done before.

    given: flags, from `take_flags`. preemptible: JAX takes SIGTERM, for `Notice`; without it the
    signal ends the process as usual. Raises UserError for flags that do not fit, and Absent,
    naming the process that did not come.
    """
    # A reader of batches runs this program's imports, but is no process of the run.
    if multiprocessing.parent_process() is not None or jax.distributed.is_initialized():
        return
    cluster = find(given, os.environ)
    if cluster is None:
        return
    roll_call(cluster, ARRIVE_S)
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.count,
        cluster.process,
        cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=ARRIVE_S,
        shutdown_timeout_seconds=LEAVE_S,
    )
    logging.info(
        "process %d of %d on %s: %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        socket.gethostname(),
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )


def roll_call(cluster: Cluster, seconds: float) -> None:
    """Returns when all processes are there. Raises Absent, on all that are, after `seconds`."""
    host, port = cluster.coordinator.rsplit(":", 1)
    if cluster.process:
        deadline = time.monotonic() + seconds
        answer = _report(host.strip("[]"), int(port), cluster, deadline)
    else:
        answer = _call(int(port), cluster, seconds)
    if answer:
        raise Absent(answer)


def _call(port: int, cluster: Cluster, seconds: float) -> str:
    """Process 0's side: '' when all have come, else who has not; the others are told the same."""
    deadline = time.monotonic() + seconds
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    lines: dict[int, socket.socket] = {}
    answer = ""
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(f"port {port} of --coordinator: {error.strerror}; take a free one") from (
            error
        )
    with server:
        while len(lines) < cluster.count - 1 and not answer:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                line, _ = server.accept()
                line.settimeout(max(min(deadline - time.monotonic(), 10), 0.01))
                word = line.makefile().readline().split()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(1, cluster.count)) - lines.keys())
                answer = f"{_name(missing)} of {cluster.count} did not start within {seconds:.0f} s"
                answer += "; see there why, or give the number that do"
                break
            except OSError:
                continue
            if len(word) != 2 or not all(part.isdigit() for part in word):
                line.close()  # somebody else, who knocks at every port
                continue
            process, count = map(int, word)
            lines[process] = line
            if count != cluster.count:
                answer = (
                    f"process {process} was started as one of {count}, process 0 as one of "
                    f"{cluster.count}; give all the same number"
                )
    for line in lines.values():
        try:
            line.sendall(f"{answer}\n".encode())
        except OSError:
            pass  # gone meanwhile: jax.distributed will notice
        line.close()
    return answer


def _report(host: str, port: int, cluster: Cluster, deadline: float) -> str:
    """The other processes' side: process 0's answer."""
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(min(left, 10), 0.01)) as line:
                line.sendall(f"{cluster.process} {cluster.count}\n".encode())
                # A moment more than process 0 waits, whose clock began at another time.
                line.settimeout(max(left, 0) + 30)
                answer = line.makefile().readline()
                if answer:
                    return answer.strip()
        except OSError:
            pass
        if left < 0:
            return f"process 0 does not answer at {host}:{port}; see there why"
        time.sleep(min(0.2, max(left, 0)))


def _name(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


# --- agree and stop -------------------------------------------------------------------------------


def agree(facts: Mapping[str, Any]) -> None:
    """Returns when all processes have called this with equal `facts`, flat and of JSON's types.

    Raises UserError, on all, that names who differs in what; Absent, on all, naming those who have
    said nothing for AGREE_S seconds. Nothing to do for a single process.
    """
    if jax.process_count() == 1:
        return
    store, folder = _store(), f"dcae_jax/{next(_rounds)}"
    mine = json.loads(json.dumps({**facts, "devices": jax.device_count(), "jax": jax.__version__}))
    if jax.process_index():
        store.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(mine))
        verdict = _read(store, f"{folder}/verdict", AGREE_S + 15)
        if verdict is None:
            raise Absent(f"process 0 said nothing for {AGREE_S} s; see there why")
        kind, text = json.loads(verdict)
    else:
        kind, text = _verdict(store, folder, mine)
        store.key_value_set(f"{folder}/verdict", json.dumps((kind, text)))
    if text:
        raise (Absent if kind == "absent" else UserError)(text)


def _verdict(store: Any, folder: str, mine: dict[str, Any]) -> tuple[str, str]:
    """Process 0's look at what the others say: ('absent' or 'differ', the error or '')."""
    deadline = time.monotonic() + AGREE_S
    absent, differ = [], []
    for process in range(1, jax.process_count()):
        said = _read(store, f"{folder}/{process}", max(deadline - time.monotonic(), 0.1))
        if said is None:
            absent.append(process)
            continue
        theirs = json.loads(said)
        keys = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        if keys:
            what = [f"{key}={theirs.get(key)!r} (0: {mine.get(key)!r})" for key in keys[:3]]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            differ.append(f"process {process} has {', '.join(what)}{more}")
    if absent:
        return "absent", f"{_name(absent)} said nothing for {AGREE_S} s; see there why"
    if not differ:
        return "", ""
    more = f"; and {len(differ) - 3} more processes" if len(differ) > 3 else ""
    return "differ", f"the processes differ: {'; '.join(differ[:3])}{more}; start all alike"


def _read(store: Any, key: str, seconds: float) -> str | None:
    """What another process wrote under `key`; None if it does not within `seconds`."""
    try:
        return store.blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _store() -> Any:
    """The key-value store of JAX's coordination service.

    It has no public name. The public functions that compare values over processes are collectives,
    which hang when a process is not there.
    """
    from jax._src import distributed

    return distributed.global_state.client


class Notice:
    """Whether to save and stop, alike on all processes, after SIGTERM or a maintenance notice.

    JAX hears of it on one of them and lets them find a step that none has passed.
    """

    def is_set(self) -> bool:
        """To be asked by all processes equally often: once a step or batch."""
        return multihost_utils.reached_preemption_sync_point(next(_looks))
