# SPDX-License-Identifier: Apache-2.0
"""Multi-process setup: cluster detection, config agreement, synchronized preemption.

`initialize` uses the flags if there are any; otherwise `jax.distributed` detects Slurm, Open MPI,
GKE, Cloud TPU or Kubernetes from the environment. JAX waits for missing processes in C++ and then
aborts without saying which, so each wait here has its own deadline.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax import errors
from dcae_jax.errors import UserError
from dcae_jax.runtime.process import has_tpu

REPORT_S = 30  # after which a start logs that it is still waiting
ARRIVE_S = 300  # for all processes to start; the hosts of a pod come up one after another
AGREE_S = 60  # for all started processes to exchange their configs
LEAVE_S = 60  # that a process that exits waits for the others
FAILED = 1  # exit status
FLAGS = ("coordinator", "num_processes", "process_id")
EXPLICIT = "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
_GPUS = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")

_sync_points = itertools.count()  # of PreemptionSignal, the same on all processes

Arguments = dict[str, Any]  # for jax.distributed.initialize


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


def find(given: Mapping[str, str], environ: Mapping[str, str]) -> Arguments | None:
    """Arguments for jax.distributed.initialize; None for a single process.

    given: flags, which override the environment. Raises UserError for inconsistent flags.
    """
    known = _started_by(environ)
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        known["coordinator"] = environ["JAX_COORDINATOR_ADDRESS"]
    known.update(given)
    if given or known.keys() == set(FLAGS):
        return _explicit(known, given, environ)
    method = detect(environ)
    if method is None:
        return None
    # JAX's detector for Kubernetes has no name; it is the last one that JAX tries by default.
    name = None if method == "k8s" else method
    return {"cluster_detection_method": name, "local_device_ids": _own_device(environ)}


def _explicit(
    known: Mapping[str, str], given: Mapping[str, str], environ: Mapping[str, str]
) -> Arguments | None:
    missing = [f"--{name}" for name in FLAGS if not known.get(name)]
    if missing:
        flags = ", ".join(f"--{name}" for name in given)
        raise UserError(f"{flags} needs {' and '.join(missing)} too; {EXPLICIT}")
    for name in ("num_processes", "process_id"):
        if not re.fullmatch(r"\d+", known[name]):
            raise UserError(f"--{name}={known[name]!r} must be a non-negative integer")
    address, count, process = known["coordinator"], *(int(known[name]) for name in FLAGS[1:])
    if process >= count:
        raise UserError(
            f"--process_id={process} must be less than --num_processes={count}; ids start at 0"
        )
    if not re.fullmatch(r"(.+):(\d+)", address):
        raise UserError(
            f"--coordinator={address!r} is not HOST:PORT; give process 0's host and a free port "
            "on it"
        )
    return (
        None
        if count == 1
        else {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": process,
            "local_device_ids": _own_device(environ),
            "cluster_detection_method": "deactivate",
        }
    )


def _started_by(environ: Mapping[str, str]) -> dict[str, str]:
    """The number of processes and this one's index, if the environment has both."""
    for count, process in (
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),  # Kubernetes; the manifest sets the first
    ):
        if int(environ.get(count, 1)) > 1 and process in environ:
            return {"num_processes": environ[count], "process_id": environ[process]}
    return {}


def _own_device(environ: Mapping[str, str]) -> list[int] | None:
    """This process's one device if several share a host under Slurm or Open MPI; else None."""
    several = (
        not re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        or int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
    )
    number = environ.get("SLURM_LOCALID", environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    return [int(number)] if several and number is not None and _started_by(environ) else None


def detect(environ: Mapping[str, str]) -> str | None:
    """JAX's name for the cluster that started this as one of several processes; None without one.

    JAX's own detection fails on a plain machine, and takes a shell in a Slurm allocation, or a pod
    outside an indexed job, for one of several processes.
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
    with_library = importlib.util.find_spec("libtpu") is not None
    asks = "TPU_SKIP_MDS_QUERY" not in environ and with_library and has_tpu()
    if not cpu_only and not workers and asks:
        return "gcetpu"
    indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    # A slice with one TPU host and a job with one pod are single-process.
    return "k8s" if indexed and not workers and environ.get("JAX_NUM_PROCESSES") != "1" else None


def initialize(given: Mapping[str, str], *, preemptible: bool) -> None:
    """Connects to the run's other processes, if there are any; the second call does nothing.

    given: flags from `take_flags`. preemptible: JAX handles SIGTERM, for `PreemptionSignal`;
    otherwise the signal ends the process as usual. Raises UserError for inconsistent flags. Exits
    with one line and status 1 if other processes do not start.
    """
    # A data worker runs this program's imports too, but is not a process of the run.
    if multiprocessing.parent_process() is not None or jax.distributed.is_initialized():
        return
    arguments = find(given, os.environ)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        _check_port(int(arguments["coordinator_address"].rsplit(":", 1)[1]))
    jax.config.update("jax_enable_preemption_service", preemptible)
    me = _describe(arguments)
    waits = f"still waiting for processes after {REPORT_S} s: {me}; giving up at {ARRIVE_S} s"
    gives_up = (
        f"not all processes started within {ARRIVE_S} s: {me}; check the logs of the others, or "
        "start fewer processes"
    )
    with _after(REPORT_S, lambda: logging.warning(waits)), _deadline(ARRIVE_S, gives_up):
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=2 * ARRIVE_S,  # JAX aborts after this
                shutdown_timeout_seconds=LEAVE_S,
            )
        except Exception as error:  # from JAX, the network or the Kubernetes client
            raise UserError(_explain(error, arguments)) from error
    if arguments["local_device_ids"] is None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for name in _GPUS:  # by default JAX uses one GPU of a Slurm task that has several
            jax.config.update(name, os.environ.get(name.upper(), "all"))
    logging.info(
        "process %d of %d on %s: %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        socket.gethostname(),
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )


def _check_port(port: int) -> None:
    """Raises UserError if the port is taken, where JAX sometimes crashes."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = f"--coordinator: port {port}: {error.strerror}"
        raise UserError(f"{reason}; choose a free port") from error


def _describe(arguments: Arguments) -> str:
    if "process_id" not in arguments:
        return f"started by {arguments['cluster_detection_method'] or 'Kubernetes'}"
    process, count = arguments["process_id"], arguments["num_processes"]
    address = arguments["coordinator_address"]
    return f"this is process {process} of {count}, process 0 is at {address}"


def _explain(error: Exception, arguments: Arguments) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = EXPLICIT
    if arguments["cluster_detection_method"] is None:
        remedy = (
            f"{errors.install('kubernetes')}, or set JAX_COORDINATOR_ADDRESS and "
            f"JAX_NUM_PROCESSES in the manifest, or {EXPLICIT}"
        )
    return f"{_describe(arguments)}, but {reason}; {remedy}"


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in another thread if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _deadline(seconds: float, text: str) -> contextlib.AbstractContextManager[None]:
    """Exits with one line if the block, a wait inside JAX, takes longer."""

    def end() -> None:
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
        os._exit(FAILED)  # nothing else interrupts a wait in C++

    return _after(seconds, end)


def assert_same_config(facts: Mapping[str, object]) -> None:
    """Checks that all processes call this with equal `facts`, a flat dict of JSON values.

    Raises UserError on every process, with the processes and keys that differ. Exits with one line
    and status 1 if a process does not call this within AGREE_S. No-op for a single process.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps({**facts, "devices": jax.device_count(), "jax": jax.__version__})
    # Process 0 gives up last: when it exits, JAX aborts the processes that still wait.
    seconds = AGREE_S if jax.process_index() == 0 else 0.9 * AGREE_S
    silent = f"not all {jax.process_count()} processes answered within {AGREE_S} s; process "
    with _deadline(seconds, f"{silent}{jax.process_index()} did; check the logs of the others"):
        first, *others = map(json.loads, _gather(mine.encode()))
    differ = []
    for process, theirs in enumerate(others, 1):
        keys = [key for key in sorted({*first, *theirs}) if first.get(key) != theirs.get(key)]
        if keys:
            what = [
                f"{key}={theirs.get(key)!r} (process 0: {first.get(key)!r})" for key in keys[:3]
            ]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            differ.append(f"process {process} has {', '.join(what)}{more}")
    if differ:
        more = f"; and {len(differ) - 3} more processes" if len(differ) > 3 else ""
        raise UserError(
            f"the processes differ: {'; '.join(differ[:3])}{more}; start all with the same command"
        )


def barrier(name: str) -> None:
    """Blocks until all processes reach this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(value: bool) -> bool:
    """Whether `value` is true on any process; blocks until all processes call this."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.int32(value)).any())


def _gather(mine: bytes) -> list[bytes]:
    """The bytes of every process, in process order."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


class PreemptionSignal:
    """Whether to save and stop after SIGTERM or a maintenance notice; equal on all processes.

    One process receives the notice, and JAX agrees on a step that no process has passed yet.
    """

    def is_set(self) -> bool:
        """All processes must call this equally often: once per step or batch."""
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))
