# SPDX-License-Identifier: Apache-2.0
"""Tiny jobs that can be killed anywhere, and whether two of them left the same."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from dcae_jax import files as files_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.jobs import train
from support import CONFIGS, NARROW, ROOT, flags, run_job, small_models

HERE = pathlib.Path(__file__).parent
TIMES = ("_s", "_per_s")
SETTINGS = {
    **NARROW,
    "steps": 24,
    "optimizer.schedule": "constant",  # whose steps may change when a run resumes
    "log_every": 3,
    "save_every": 4,
    "evaluate_every": 8,
    "evaluate.batch_size": 4,
    "evaluate.count": 12,
    "evaluate.crops": 6,
    "evaluate.grid": 2,
    "data.source": "folder",
    "data.held_out": 0.2,
}


# Places of a kill in the jobs encode and sample: each file that a job writes whole; the moment when
# a file is complete and has not its name yet; the result of `sample`, begun and not complete.
WATCHED = [
    ("dcae_jax.files", "write_file", "file"),
    ("os", "replace", "rename"),
    ("numpy.lib.format", "write_array_header_1_0", "result"),
]


class Forks:
    """The server of forks.py."""

    def __init__(self):
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        # Small programs are kept too, since each process compiles them again otherwise.
        cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = {**os.environ, **cached, "PYTHONPATH": ROOT, "XLA_FLAGS": flags}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, argv, signals=(), stderr=os.devnull, **more):
        """Runs a command line -> (status, steps begun at the first signal, what it said)."""
        order = {"argv": argv, "signals": signals, "stderr": str(stderr)} | more
        before = os.path.getsize(stderr) if os.path.isfile(stderr) else 0
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        said = ""
        if os.path.isfile(stderr):
            said = pathlib.Path(stderr).read_bytes()[before:].decode(errors="replace")
        return answer["status"], answer["steps"], said

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def pictures(folder, count=10, size=40):
    """Writes `count` small pictures of noise; -> the folder."""
    rng = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, f"{i}.png"))
    return str(folder)


def arguments(workdir, data, config="phase1.py:tiny", **changes):
    """The command line of the tiny run; keys of `changes` have '__' for '.'."""
    settings = SETTINGS | {"data.path": data}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config={os.path.join(CONFIGS, config)}", f"--workdir={workdir}", *flags(settings)]


def draw_kill(rng: random.Random):
    """(place, count, delay, SIGKILL): a moment in one of the things that training does."""
    place, most, delay = rng.choice(
        [
            ("read", 40, 0.0),
            ("step", 12, 0.03),
            ("save", 3, 0.15),  # asynchronous: most of it comes after `save` has returned
            ("commit", 3, 0.02),
            ("evaluate", 2, 0.1),
        ]
    )
    return place, rng.randint(1, most), rng.choice((0.0, rng.uniform(0, delay))), signal.SIGKILL


def survive(forks, argv, workdir, kills, rng):
    """Kills training `kills` times, then lets it end. -> Counter-like dict of what was hit."""
    hit = {}
    for _ in range(kills):
        kill = draw_kill(rng)
        status, _, said = forks(argv, [kill], stderr=f"{workdir}.log")
        assert status in (-signal.SIGKILL, 0), (kill, status, said[-3000:])
        where = kill[0] if status else "finished before"
        hit[where] = hit.get(where, 0) + 1
        if any("orbax-checkpoint-tmp" in name for name in _listing(workdir / "checkpoints")):
            hit["left half a checkpoint"] = hit.get("left half a checkpoint", 0) + 1
    status, _, said = forks(argv, stderr=f"{workdir}.log")
    assert status == 0, said[-3000:]
    return hit


def _listing(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def rows(workdir):
    """Rows of metrics.jsonl without times."""
    return [
        {k: v for k, v in row.items() if not k.endswith(TIMES)}
        for row in files_lib.read_rows(str(workdir))
    ]


def everything(workdir, step):
    """All arrays of a checkpoint, and the data's position, as a flat dict."""
    folder = workdir / "checkpoints" / str(step)
    found = {"data": json.loads((folder / "data" / "metadata").read_text())}
    for item in ("weights", "optimizer"):
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(str(folder / item)).item_metadata.tree
            args = jax_map(lambda _: ocp.RestoreArgs(restore_type="np.ndarray"), tree)
            restored = reader.restore(
                str(folder / item), args=ocp.args.PyTreeRestore(item=tree, restore_args=args)
            )
        found |= {f"{item}{path}": leaf for path, leaf in flatten(restored)}
    return found


def jax_map(function, tree):
    import jax

    return jax.tree.map(function, tree)


def flatten(tree):
    import jax

    return [
        (jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def assert_same(a, b):
    """The two workdirs hold the same, apart from times and event files."""
    steps = checkpoints.saved_steps(str(a))
    assert steps and steps == checkpoints.saved_steps(str(b))
    for step in steps:
        left, right = everything(a, step), everything(b, step)
        assert left.keys() == right.keys() and len(left) > 100
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name], err_msg=f"{step} {name}")
    assert rows(a) == rows(b)
    images = sorted(p.name for p in (a / "images").iterdir())
    others = sorted(p.name for p in (b / "images").iterdir())
    assert images and images == others, (images, others)
    for name in images:
        assert (a / "images" / name).read_bytes() == (b / "images" / name).read_bytes(), name
    left, right = (json.loads((d / "config.json").read_text()) for d in (a, b))
    assert left == right


def commands(folder):
    """{'encode' and 'sample': a command line without the workdir}, with what they read."""
    autoencoder = small_models.export_autoencoder(str(folder / "autoencoder"))
    images, latents = str(folder / "images"), str(folder / "latents")
    small_models.write_latents(latents, autoencoder, images)
    config = small_models.diffusion_config(latents)
    config.steps, config.batch_size = 1, 8
    assert run_job(train, config, str(folder / "uvit")) == train.DONE
    settings = {
        "encode": {
            "init_from": autoencoder,
            "resolution": 32,
            "data.source": "folder",
            "data.path": images,
            "encode.shard_size": 2,
            "encode.batch_size": 2,
        },
        "sample": {
            "init_from": str(folder / "uvit"),
            "sample.count": 12,
            "sample.steps": 2,
            "sample.batch_size": 2,
            "sample.format": "npz",
        },
    }
    return {
        job: [f"--config={os.path.join(CONFIGS, job)}.py", *flags(keys)]
        for job, keys in settings.items()
    }


def survive_job(forks, job, argv, workdir, rng):
    """Kills encode or sample three or four times, then lets it end. -> dict of what was hit."""
    # A delay at the first file only: after the others so small a job could end meanwhile.
    count, delay = rng.choice([(1, 0.0), (1, rng.uniform(0, 0.05)), (2, 0.0), (3, 0.0)])
    kills = [("file", count, delay), ("rename", 2, 0.0), ("rename", 2, 0.0)]
    kills += [("result", 1, 0.0)] if job == "sample" else []
    log, hit = f"{workdir}.log", {}
    for kill in kills:
        status, _, said = forks(argv, [(*kill, signal.SIGKILL)], stderr=log, more=WATCHED)
        assert status == -signal.SIGKILL, (kill, status, said[-3000:])
        hit[f"{job}: {kill[0]}"] = hit.get(f"{job}: {kill[0]}", 0) + 1
    status, _, said = forks(argv, stderr=log)
    assert status == 0, said[-3000:]
    return hit


def files(folder):
    """{path within the folder: bytes} of all files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
