# SPDX-License-Identifier: Apache-2.0
"""Scripts that run in several processes."""

import json
import os
import socket
import subprocess
import sys

from support import ROOT


def free_port():
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(script, settings, start=None):
    """Runs `script` in two processes of two devices; returns the JSON in the last line of each.

    start: code before it, instead of START, which joins them.
    """
    return processes(2, (start or START) + script, settings, devices=2)


def processes(count, script, settings, devices=1):
    """Runs `script` in `count` processes; returns the JSON in the last line of each.

    It finds `settings`, and its own number, process, as JSON in its first argument.
    """
    settings = settings | {"address": f"127.0.0.1:{free_port()}", "processes": count}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
    }
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                script,
                json.dumps(settings | {"process": i}),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    results = []
    try:
        for process in started:
            said, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return results


START = """
import json, sys
settings = json.loads(sys.argv[1])
import jax
jax.distributed.initialize(settings["address"], 2, settings["process"])
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
from support import CONFIGS, run_job, small_networks
from dcae_jax import config as config_lib
from dcae_jax.jobs import evaluate
from dcae_jax.models import inception, inception_torch
"""

# Likewise as a job does it.
JOINED = """
import json, logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
settings = json.loads(sys.argv[1])
from dcae_jax.runtime import distributed as hosts
flags = {"coordinator": settings["address"], "num_processes": "2"}
flags["process_id"] = str(settings["process"])
hosts.initialize(flags, preemptible=True)
hosts.initialize(flags, preemptible=True)
import jax
"""
