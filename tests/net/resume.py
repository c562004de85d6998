# SPDX-License-Identifier: Apache-2.0
"""Cases: what is taken up again, after an end and after a kill, is as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import outputs
import space as net
import training
from space import Space

SECONDS = 240  # before a job that should get somewhere counts as hung


def _interrupt(
    config: str,
    workdir: str,
    settings: Mapping[str, Any],
    ready: Callable[[], bool],
    number: int = signal.SIGKILL,
) -> int:
    """Starts a job as a process and sends it a signal soon after `ready()`; -> its status."""
    command = [sys.executable, "-m", "dcae_jax.main", *net.command(config, workdir, settings)]
    environment = {**os.environ, "PYTHONPATH": net.ROOT}
    with open(f"{workdir}.log", "w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
    try:
        end = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < end and not ready():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(number)
        return process.wait(timeout=SECONDS)
    finally:
        process.kill()


def _lines(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with open(path) as file:
        return file.read().count("\n")


def _weights(space: Space, workdir: str, form: str) -> list[str]:
    return [net.digest(space.export(workdir, which, form)[1]) for which in ("ema", "raw")]


def longer(space: Space) -> dict[str, Any]:
    """Catches a run that is given more steps and does not end as one that had them at once."""
    changes = training.DIFFUSION | {
        "data.path": space.latents(),
        "init_from": space.model("uvit"),
        "optimizer.schedule": "constant",
        "save_every": 3,
    }
    once = space.job("uvit.py:tiny", "once", changes | {"steps": 10})
    twice = space.job("uvit.py:tiny", "twice", changes | {"steps": 6})
    space.job("uvit.py:tiny", "twice", changes | {"steps": 10})
    same = _weights(space, once, "authors") == _weights(space, twice, "authors")
    found = {"rows equal": net.rows(once) == net.rows(twice), "weights equal": same}
    return {"exact": found, "rows": net.rows(once)}


def killed_training(space: Space) -> dict[str, Any]:
    """Catches a kill that costs a row, repeats one, or ends in other weights."""
    changes = training.AUTOENCODER | {
        "data.path": space.pictures(),
        "init_from": space.model("tiny"),
        "save_every": 2,
        "steps": 200,
        "log_every": 2,
    }
    fixed = {"optimizer.schedule": "constant"}
    killed = space.path("killed")
    rows = os.path.join(killed, "metrics.jsonl")
    status = _interrupt("phase1.py:tiny", killed, changes | fixed, lambda: _lines(rows) >= 4)
    steps = max(12, 2 * _lines(rows) + 2)
    space.job("phase1.py:tiny", "killed", changes | fixed | {"steps": steps})
    whole = space.job("phase1.py:tiny", "whole", changes | fixed | {"steps": steps})
    same = _weights(space, killed, "diffusers") == _weights(space, whole, "diffusers")
    equal = net.rows(killed) == net.rows(whole)
    return {
        "exact": {"status": status, "rows equal": equal, "weights equal": same},
        "rows": [row for row in net.rows(whole) if row["step"] <= 10],
    }


def killed_encoding(space: Space) -> dict[str, Any]:
    """Catches a shard that a kill leaves out, doubles or leaves behind half."""
    settings = {
        "init_from": space.model("tiny"),
        "data.source": "folder",
        "data.path": space.pictures(),
        "resolution": 32,
        "encode.crops": 40,
        "encode.shard_size": 16,
        "encode.batch_size": 4,
    }
    killed = space.path("killed-latents")

    def begun() -> bool:
        names = os.listdir(killed) if os.path.isdir(killed) else []
        return any(name.endswith(".array_record") for name in names)

    status = _interrupt("encode.py", killed, settings, begun)
    left = os.listdir(killed)
    space.job("encode.py", "killed-latents", settings)
    whole = space.job("encode.py", "whole-latents", settings)
    same = outputs.latents_of(killed, space) == outputs.latents_of(whole, space)
    names = {
        path: sorted(n for n in os.listdir(path) if not n.startswith("."))
        for path in (killed, whole)
    }
    return {
        "exact": {
            "status": status,
            "was not done": "manifest.json" not in left,
            "equal": same,
            "files equal": names[killed] == names[whole],
        }
    }


def killed_sampling(space: Space) -> dict[str, Any]:
    """Catches samples that a kill leaves out or changes."""
    settings = {
        "init_from": space.model("uvit"),
        "autoencoder": space.model("scaled"),
        "sample.count": 60,
        "sample.batch_size": 1,
        "sample.steps": outputs.STEPS,
        "sample.sampler": "ddim",
        "sample.format": "npz",
    }
    killed = space.path("killed-samples")

    def begun() -> bool:
        return sum(len(names) for _, _, names in os.walk(killed)) >= 6

    status = _interrupt("sample.py", killed, settings, begun)
    done = os.path.exists(os.path.join(killed, "samples.npz"))
    space.job("sample.py", "killed-samples", settings)
    whole = space.job("sample.py", "whole-samples", settings)
    found = []
    for workdir in (killed, whole):
        with np.load(os.path.join(workdir, "samples.npz")) as file:
            found.append({key: value.tolist() for key, value in file.items()})
    return {"exact": {"status": status, "was not done": not done, "equal": found[0] == found[1]}}


def preempted(space: Space) -> dict[str, Any]:
    """Catches SIGTERM that is not answered by a save and status 75."""
    changes = training.AUTOENCODER | {
        "data.path": space.pictures(),
        "init_from": space.model("tiny"),
        "steps": 5000,
    }
    workdir = space.path("preempted")
    rows = os.path.join(workdir, "metrics.jsonl")
    status = _interrupt(
        "phase1.py:tiny", workdir, changes, lambda: _lines(rows) >= 2, signal.SIGTERM
    )
    saved = [name for name in os.listdir(os.path.join(workdir, "checkpoints")) if name.isdigit()]
    return {"exact": {"status": status, "checkpoints": len(saved)}}


CASES = {
    "resume with more steps": longer,
    "kill training": killed_training,
    "kill encoding": killed_encoding,
    "kill sampling": killed_sampling,
    "stop training": preempted,
}
