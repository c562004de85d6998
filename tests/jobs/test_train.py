# SPDX-License-Identifier: Apache-2.0
"""The loop: what is on disk after a run, and that no interruption changes it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS, NARROW, ROOT, flags, run_job
from tensorboardX.proto import event_pb2

from dcae_jax import files
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import hooks, metric_writer, nan_guard, train
from dcae_jax.runtime import preemption

TIMES = ("_s", "_per_s")


def _command(workdir, *changes):
    """A command line that trains the narrow tiny model for forty steps."""
    settings = {
        **NARROW,
        "steps": 40,
        "log_every": 5,
        "save_every": 10,
        "evaluate_every": 20,
        "evaluate.batch_size": 8,
        "evaluate.count": 6,
        "evaluate.grid": 2,
    }
    config = f"--config={os.path.join(CONFIGS, 'phase1.py')}:tiny"
    more = [*flags(settings), *(f"--config.{change}" for change in changes)]
    return [sys.executable, "-m", "dcae_jax.main", config, f"--workdir={workdir}", *more]


def _environment():
    """This process's, with one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    root = ROOT
    return {**os.environ, "PYTHONPATH": root, "XLA_FLAGS": flags}


def _start(workdir, *changes):
    return subprocess.Popen(
        _command(workdir, *changes),
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(workdir, *changes):
    done = subprocess.run(
        _command(workdir, *changes), env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def _interrupt(workdir, after_row, number):
    """Sends a signal after a first checkpoint and the row of `after_row`; returns the status."""
    # A terminal sends Ctrl-C to all processes of the job.
    process = _start(workdir, *(["data.workers=1"] if number == signal.SIGINT else []))
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        rows = files.read_rows(str(workdir))
        if checkpoints.saved_steps(str(workdir)) and rows and rows[-1]["step"] >= after_row:
            break
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert "Traceback" not in said, said[-3000:]
    return process.returncode


def _values(workdir):
    """Rows of metrics.jsonl without times."""
    return [
        {k: v for k, v in row.items() if not k.endswith(TIMES)}
        for row in files.read_rows(str(workdir))
    ]


def _assert_same_run(a, b):
    for which in ("ema", "raw"):
        left, right = (checkpoint_weights.load_weights(str(d), which)[0] for d in (a, b))
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    assert _values(a) == _values(b)
    pictures = sorted(p.name for p in (a / "images").iterdir())
    assert pictures == sorted(p.name for p in (b / "images").iterdir())
    for name in pictures:
        assert (a / "images" / name).read_bytes() == (b / "images" / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    _finish(workdir)
    return workdir


def test_a_run_leaves_what_the_docs_promise(whole):
    """Catches a missing file, rows out of order or twice, checkpoints beyond `keep`."""
    rows = files.read_rows(str(whole))
    assert [row["step"] for row in rows] == list(range(5, 41, 5))
    assert list(rows[0])[0] == "step"
    assert {"loss", "l1", "psnr", "grad_norm", "learning_rate", "step_s"} <= rows[0].keys()
    assert "psnr_32" in rows[3] and "psnr_32" not in rows[0] and "ssim_32" in rows[-1]
    assert checkpoints.saved_steps(str(whole)) == [30, 40]
    saved = json.loads((whole / "config.json").read_text())
    assert saved["config"]["batch_size"] == 4 and saved["versions"]["jax"] == jax.__version__
    assert saved["weights"] == "random, seed 0"
    assert (whole / "images" / "step0000040_32.png").exists()


def test_tensorboard_shows_the_rows(whole):
    """Catches scalars that are missing, of another step or value, and pictures left out."""
    scalars, pictures = {}, set()
    for path in whole.glob("events.out.tfevents*"):
        data = path.read_bytes()
        while data:  # a record: its length, a checksum of that, an event, a checksum of that
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.add((event.step, value.tag, value.image.height > 0))
                else:
                    scalars[event.step, value.tag] = value.simple_value
            data = data[16 + size :]
    rows = files.read_rows(str(whole))
    wanted = {(row["step"], k): v for row in rows for k, v in row.items() if k != "step"}
    goodput = {step: scalars.pop((step, "goodput")) for step in {step for step, _ in wanted}}
    assert all(0 < value < 1 for step, value in goodput.items() if step), goodput
    assert scalars == {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()}
    assert pictures == {(step, "reconstruction_32", True) for step in (20, 40)}


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_an_interrupted_run_ends_bit_equal(whole, tmp_path, number):
    """Catches anything that a checkpoint forgets: moments, averages, data, means of metrics."""
    workdir = tmp_path / "run"
    status = _interrupt(workdir, 10, number)
    assert status == (-number if number == signal.SIGKILL else preemption.STATUS)
    steps = checkpoints.saved_steps(str(workdir))
    assert steps and steps[-1] < 40
    said = _finish(workdir)
    assert f"resuming {workdir} at step {steps[-1]}" in said
    _assert_same_run(whole, workdir)


def test_a_finished_run_is_left_alone_and_more_steps_go_on(small, alone, tmp_path, caplog):
    """Catches a run that trains again from the start, or past its last step."""
    workdir = str(tmp_path / "run")
    caplog.set_level("INFO")
    small.optimizer.schedule = "cosine"
    assert run_job(train, small, workdir) == train.DONE
    before = files.read_rows(workdir)
    assert run_job(train, small, workdir) == train.DONE
    assert files.read_rows(workdir) == before and "is done: step 4 of 4" in caplog.text
    small.steps = 6
    with pytest.raises(UserError, match="steps was 4, is 6; use another"):  # of a cosine schedule
        run_job(train, small, workdir)
    small.allow_change = ("steps",)
    assert run_job(train, small, workdir) == train.DONE
    assert "at step 4 the learning rate changes from 0 to 0.0004" in caplog.text  # half the peak
    assert [row["step"] for row in files.read_rows(workdir)] == [1, 2, 3, 4, 5, 6]


def test_another_configuration_is_refused_unless_allowed(small, alone, tmp_path, caplog):
    """Catches a run that goes on with another batch size as if nothing had changed."""
    workdir = str(tmp_path / "run")
    small.steps = 2
    run_job(train, small, workdir)
    small.steps, small.batch_size, small.ema_decay = 4, 8, 0.5
    with pytest.raises(UserError, match="batch_size was 4, is 8; ema_decay was 0.99, is 0.5"):
        run_job(train, small, workdir)
    small.allow_change = ("batch_size", "ema_decay")
    caplog.set_level("INFO")
    assert run_job(train, small, workdir) == train.DONE
    assert "changed: batch_size, ema_decay" in caplog.text


def test_rows_after_the_restored_step_are_written_once(tmp_path):
    """Catches a metrics.jsonl in which a killed run's last rows stand twice, or half."""
    for step in (2, 4, 6):
        files.append_row(str(tmp_path), step, {"loss": float("nan")})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    files.drop_rows_after(str(tmp_path), 4)
    rows = files.read_rows(str(tmp_path))
    assert rows == [{"step": 2, "loss": None}, {"step": 4, "loss": None}]


def test_an_unfinished_checkpoint_is_not_used(small, alone, tmp_path):
    """Catches a resume from half a checkpoint that a crash left behind."""
    workdir = tmp_path / "run"
    run_job(train, small, str(workdir))
    folder = workdir / "checkpoints"
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    (folder / "9.orbax-checkpoint-tmp" / "weights").mkdir()
    assert checkpoints.saved_steps(str(workdir)) == [2, 4]
    newest = str(workdir / "checkpoints" / "4")
    read, named = (checkpoint_weights.load_weights(path)[0] for path in (str(workdir), newest))
    for name, value in named.items():
        np.testing.assert_array_equal(read[name], value)


def test_ten_steps_without_a_finite_loss_stop_the_run(small, alone, tmp_path):
    """Catches a run that skips every step for hours; the last checkpoint stays."""
    workdir = str(tmp_path / "run")
    run_job(train, small, workdir)
    small.steps, small.max_skipped, small.save_every = 40, 3, 100
    small.optimizer.learning_rate = 1e38  # the step after the first overflows
    small.allow_change = ("optimizer", "steps")
    with pytest.raises(nan_guard.Diverged, match="3 consecutive steps"):
        run_job(train, small, workdir)
    assert checkpoints.saved_steps(workdir) == [2, 4]


def test_skipped_steps_do_not_count_in_the_means():
    """Catches one NaN that blanks the whole row's loss."""
    shapes = {"loss": None, "finite": None, "skipped": None}
    totals = metric_writer.empty_means(shapes)
    for loss, finite, skipped in ((1.0, 1, 0), (jnp.nan, 0, 1), (3.0, 1, 1)):
        values = {"loss": loss, "finite": finite, "skipped": skipped}
        totals = metric_writer.add_metrics(totals, {k: jnp.float32(v) for k, v in values.items()})
    assert metric_writer.compute(totals) == {"loss": 2.0, "skipped": 1.0}


@pytest.mark.slow
def test_the_share_of_lpips_is_a_share(small, alone, tmp_path, caplog):
    """Catches a paper config that does not run with the file it asks for, or a share above 1."""
    from dcae_jax.models import lpips
    from dcae_jax.pretrained import torch_io

    rng = np.random.default_rng(0)
    weights = {
        name: np.abs(rng.normal(size=shape) * 0.05).astype(np.float32)
        for name, shape in lpips.shapes("vgg").items()
    }
    file = tmp_path / "lpips.safetensors"
    torch_io.write_safetensors(str(file), weights, {"network": "lpips-vgg"})
    small.loss.lpips_weight, small.loss.lpips_weights = 1.0, str(file)
    small.steps = 1
    caplog.set_level("INFO")
    assert run_job(train, small, str(tmp_path / "run")) == train.DONE
    share = next(r.args[0] for r in caplog.records if "LPIPS is" in r.getMessage())
    assert 20 < share < 100  # VGG16 beside a model of some hundred thousand weights
    assert files.read_rows(str(tmp_path / "run"))[0]["lpips"] > 0


def test_the_comparison_names_what_fell():
    """Catches a loss at low resolution that is not reported."""
    pairs = {"psnr_64": (24.0, 23.5), "psnr_256": (25.0, 25.25), "rfid_64": (3.0, 4.0)}
    pairs["ssim_64"] = (0.5, 0.5)  # no change, in neither list
    assert hooks.changes(pairs) == (
        "worse: psnr_64 24 -> 23.5 (-0.5), rfid_64 3 -> 4 (+1); "
        "better: psnr_256 25 -> 25.25 (+0.25)"
    )


def test_sigterm_saves_where_it_stands(small, alone, tmp_path):
    """Catches a preemption that loses every step since the last regular checkpoint."""
    workdir = str(tmp_path / "run")
    small.steps, small.save_every, small.log_every = 50, 100, 1
    timer = threading.Thread(target=_terminate_at, args=(workdir, 3), daemon=True)
    timer.start()
    assert run_job(train, small, workdir) == preemption.STATUS
    timer.join()
    (step,) = checkpoints.saved_steps(workdir)
    assert 3 <= step < 50


def _terminate_at(workdir, step):
    """Sends this process SIGTERM once the row of `step` is written."""
    while not any(row["step"] >= step for row in files.read_rows(workdir)):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def test_an_allowed_change_is_recorded(small, alone, tmp_path):
    """Catches a run whose config.json says it always had its last configuration."""
    workdir = tmp_path / "run"
    small.steps = 2
    run_job(train, small, str(workdir))
    small.steps, small.ema_decay = 4, 0.5
    with pytest.raises(UserError, match="ema_decay was 0.99, is 0.5"):
        run_job(train, small, str(workdir))
    small.allow_change = ("ema_decay",)
    run_job(train, small, str(workdir))
    small.steps = 5
    run_job(train, small, str(workdir))
    changes = json.loads((workdir / "config.json").read_text())["changes"]
    assert changes == [{"step": 2, "key": "ema_decay", "before": 0.99, "now": 0.5}]


@pytest.mark.slow
def test_another_batch_size_with_several_resolutions_goes_on(small, alone, tmp_path):
    """Catches a traceback of images of two sizes in one batch, after the remedy that the line of a
    device out of memory names: lower batch_size."""
    workdir = str(tmp_path / "run")
    small.resolutions, small.steps = (16, 32), 2
    run_job(train, small, workdir)
    small.steps, small.batch_size, small.allow_change = 8, 3, ("batch_size",)
    assert run_job(train, small, workdir) == train.DONE
    assert files.read_rows(workdir)[-1]["step"] == 8


def test_a_change_that_no_checkpoint_can_follow_is_one_line(small, alone, tmp_path):
    """Catches Orbax's traceback where allow_change lets the parts of the state differ."""
    workdir = str(tmp_path / "run")
    small.steps = 2
    run_job(train, small, workdir)
    small.steps, small.trainable = 4, (r"decoder\..*",)
    small.allow_change = ("trainable",)
    with pytest.raises(UserError, match="changed: trainable; start from its weights"):
        run_job(train, small, workdir)


def test_images_that_changed_between_kill_and_resume_are_told(small, alone, folder, tmp_path):
    """Catches a run that goes on with another data set under the same path."""
    workdir = str(tmp_path / "run")
    small.data.source, small.data.path, small.steps = "folder", folder, 2
    run_job(train, small, workdir)
    inputs = json.loads((tmp_path / "run" / "config.json").read_text())["inputs"]
    first = sorted(os.listdir(folder))[0]
    os.rename(os.path.join(folder, first), os.path.join(folder, "zzz.png"))
    small.steps = 4
    with pytest.raises(UserError, match=r"data.content was .*, is .* images, index .*allow_change"):
        run_job(train, small, workdir)
    small.allow_change = ("data",)
    assert run_job(train, small, workdir) == train.DONE
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    (change,) = record["changes"]
    assert (change["step"], change["key"]) == (2, "data.content")
    assert change["before"] == inputs["data.content"] and record["inputs"] != inputs
