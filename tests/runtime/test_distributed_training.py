# SPDX-License-Identifier: Apache-2.0
"""Training in two processes: the same numbers as in one, one set of files, one decision to stop."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import CONFIGS, NARROW, ROOT, flags, run_job
from support.processes import JOINED, free_port, two_processes

from dcae_jax import files
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.jobs import train

TRAINING = """
sys.argv = sys.argv[:1]
from support import CONFIGS, run_job
from dcae_jax import config as config_lib
from dcae_jax.jobs import train
config = config_lib.load_file(CONFIGS + "/phase1.py", "tiny")
config.update(settings["config"])
config.mesh.update(settings["mesh"])
print(json.dumps(run_job(train, config, settings["workdir"])))
"""


def _train(config, workdir, mesh=None):
    """Two processes train `config` into `workdir`."""
    sections = ("model", "evaluate", "optimizer", "structured")
    changed = {key: config.to_dict()[key] for key in sections}
    for key in ("resolution", "batch_size", "steps", "log_every", "save_every", "evaluate_every"):
        changed[key] = config[key]
    settings = {"config": changed, "workdir": str(workdir), "mesh": mesh or {}}
    # JSON has no tuples, and the configuration takes nothing else.
    script = TRAINING.replace('settings["config"]', repr(changed))
    assert two_processes(script, settings, JOINED) == [0, 0]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, channels", [({}, ()), ({"data": 1, "spatial": 4}, ()), ({}, (2, 4, 6, 8))]
)
def test_two_processes_train_as_one_and_one_resumes_them(mesh, channels, small, alone, tmp_path):
    """Catches images read twice or by nobody, an evaluation of one process's share, rows written
    by both, a checkpoint that needs as many processes as wrote it, and numbers of channels that
    each process draws for itself."""
    if channels:
        small.model.variant, small.structured.channels = "tiny-1.5", channels
    small.optimizer.eps = 1e-4  # or where a gradient is zero, Adam would step by rounding's sign
    small.evaluate_every = 2
    if mesh:
        small.resolution, small.evaluate.resolutions = 128, (128,)
    size = small.resolution
    whole, parts = str(tmp_path / "whole"), tmp_path / "parts"
    assert run_job(train, small, whole) == train.DONE
    wanted = files.read_rows(whole)
    small.steps = 2
    _train(small, parts, mesh)
    two = files.read_rows(str(parts))
    _assert_same_rows(two, wanted[:2])
    assert f"psnr_{size}" in two[1]
    assert (parts / "images" / f"step0000002_{size}.png").exists()
    small.steps = 4
    assert run_job(train, small, str(parts)) == train.DONE
    _assert_same_rows(files.read_rows(str(parts)), wanted)


@pytest.mark.slow
def test_sigterm_on_one_process_saves_once_on_both(tmp_path):
    """Catches processes that stop at different steps, so that one waits forever."""
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
        *(f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": ROOT,
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
        while not files.read_rows(str(tmp_path / "run")) and time.monotonic() < end:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], said[0][-2000:]
    (step,) = checkpoints.saved_steps(str(tmp_path / "run"))
    for i, text in enumerate(said):
        assert f"process {i} of 2 on" in text and "2 of 4 devices" in text
        assert f"saved at step {step} after a signal" in text
