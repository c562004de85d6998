# SPDX-License-Identifier: Apache-2.0
"""The command line: mistakes end in one line and status 2, before any work is done."""

import errno
import importlib.util
import os
import subprocess
import sys
import tempfile

import pytest
from support import CONFIGS, ROOT

from dcae_jax import errors, files, main
from dcae_jax.checkpoints import __main__ as checkpoints_command
from dcae_jax.demo import page
from dcae_jax.jobs import train
from dcae_jax.pretrained import torch_io
from dcae_jax.runtime import process


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command line in this process -> (status, what it wrote to stderr)."""

    def command(*arguments, config="phase1.py:tiny", workdir=True):
        argv = ["main"]
        if config:
            argv.append(f"--config={os.path.join(CONFIGS, config)}")
        if workdir:
            argv.append(f"--workdir={tmp_path / 'run'}")
        if config and config.startswith("phase") and config.endswith(":tiny"):
            argv.append("--config.batch_size=8")  # one image for each of the test's devices
        status = main.main([*argv, *arguments])
        return status, capsys.readouterr().err

    return command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.batch_sise=3"], ["no key batch_sise; did you mean batch_size"]),
        (["--config.optimizer.lr=3"], ["no key optimizer.lr; did you mean optimizer."]),
        (["--config.zzzz=3"], ["no key zzzz; see dcae_jax/config/schema.py"]),
        (["--config.batch_size=three"], ["batch_size", "three"]),
        (["--config.resolution=72"], ["resolution=72", "f=16", "64 or 80"]),
        (["--config.evaluate.resolutions=(64,100)"], ["evaluate.resolutions=100", "96 or 112"]),
        (["--config.evaluate.resolutions=()"], ["is empty", "evaluate.resolutions=(64,)"]),
        (["--config.mesh.data=8", "--config.batch_size=12"], ["batch_size=12", "8 or 16"]),
        (["--config.mesh.fsdp=3"], ["mesh", "8 devices"]),
        (["--config.data.source=folder"], ["data.path=''"]),
        (["--config.data.source=folder", "--config.data.path=/none"], ["'/none'"]),
        (["--config.data.source=web"], ["data.source='web'"]),
        (["--config.loss.lpips_weight=1.0"], ["vgg16-397923af.pth", "dcae-jax convert"]),
        (["--config.loss.lpips_weight=1.0", "--config.loss.lpips_weights=/no"], ["'/no'"]),
        (["--config.trainable=('decoder.step.*',)"], ["decoder.step.*", "no parameter"]),
        (["--config.init_from=/none"], ["'/none'", "config.json"]),
        (["--config.needs_weights=True"], ["init_from", "configs/phase1.py"]),
        (
            ["--config.needs_weights=True", "--config.loss.gan_weight=1.0"],
            ["init_from", "configs/phase2.py"],
        ),
        (["--config.loss.gan_weight=1.0", "--config.trainable=('encoder.*',)"], ["project_out"]),
        (["--config.job=juggle"], ["job='juggle'", "train"]),
        (["--config.model.variant=f33"], ["f33", "f32c32"]),
        (["stray"], ["'stray'"]),
        (["--batch_size=8"], ["no flag --batch_size", "write --config.batch_size=8"]),
        (["--batch-size", "8"], ["write --config.batch_size=VALUE"]),
        (["--optimizer.learning_rate=1e-4"], ["write --config.optimizer.learning_rate=1e-4"]),
        (["--step=8"], ["write --config.steps=8"]),
        (["steps=8"], ["write --config.steps=8"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, arguments, words):
    """Catches a traceback where one line would do, and an hour of work before the mistake shows."""
    status, said = run(*arguments)
    assert status == process.MISTAKE
    assert said.count("\n") == 1 and said.startswith("error: ")
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "options, word",
    [
        ({"config": None}, "--config"),
        ({"workdir": False}, "--workdir"),
        ({"config": "phase9.py"}, "phase9.py"),
        ({"config": "finetune.py:tiny,encoder"}, "VARIANT,decoder"),
        ({"config": "phase2.py:tiny"}, "init_from"),
        # which the fixture gives a batch_size
        ({"config": "phases.py:tiny"}, "phase1.batch_size, phase2.batch_size"),
        ({"config": "evaluate.py"}, "init_from"),
    ],
)
def test_a_missing_file_or_flag_is_one_line_and_status_2(run, options, word):
    """Catches absl's usage text, or its status 1, for what the user can mend."""
    status, said = run(**options)
    assert status == process.MISTAKE and said.count("\n") == 1 and word in said, said


@pytest.mark.parametrize(
    "key, url, remedy",
    [
        ("workdir", "gs:/bucket/run", "give gs://BUCKET/FOLDER"),
        ("workdir", "gs://bucket/run", "pip install gcsfs"),
        ("config.init_from", "s3://bucket/run", "pip install s3fs"),
        ("config.data.path", "gs://bucket/images", "pip install gcsfs"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(run, monkeypatch, tmp_path, key, url, remedy):
    """Catches a run of days in a local folder called 'gs:'."""
    monkeypatch.chdir(tmp_path)
    there = importlib.util.find_spec
    missing = ("gcsfs", "s3fs")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else there(name)
    )
    options = {"workdir": False} if key == "workdir" else {}
    status, said = run(f"--{key}={url}", **options)
    assert status == process.MISTAKE and said.count("\n") == 1, said
    assert f"{key.removeprefix('config.')}={url!r} " in said and remedy in said, said
    assert not (tmp_path / "gs:").exists() and not (tmp_path / "s3:").exists()


JOBS = ["phase1.py:tiny", "phases.py:tiny"] + [
    f"{job}.py" for job in ("encode", "sample", "evaluate", "export", "plan")
]


@pytest.mark.parametrize("config", JOBS)
def test_a_workdir_that_cannot_be_made_is_one_line(config, tmp_path, capsys):
    """Catches a traceback, after an hour of work, where a file is in the workdir's place."""
    (tmp_path / "file").write_text("precious")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run" / "more"):
        argv = ["main", f"--config={os.path.join(CONFIGS, config)}", f"--workdir={workdir}"]
        assert main.main(argv) == process.MISTAKE
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"'{tmp_path}/file' is not a folder" in said, said
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_is_checked_and_nothing_left_there(tmp_path, monkeypatch):
    """Catches a workdir found to be read-only after the work, and a file left by the check."""
    files.check_folder(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", os.path.join(dir, "tmp1"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError) as caught:
        files.check_folder(str(tmp_path / "a" / "b"))
    assert errors.explain(caught.value) == f"{tmp_path}: {errors.REMEDIES[errno.EACCES]}"


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "command, module, function",
    [
        (None, train, "run"),
        (lambda: checkpoints_command.main(["check", "run"]), checkpoints_command, "check"),
        (
            lambda: torch_io.main(["vgg.pth", "--out=x.safetensors"]),
            torch_io,
            "convert_metric_network",
        ),
        (lambda: page.main(["--workdir=run"]), page, "run"),
    ],
)
def test_ctrl_c_is_one_line_and_status_130(
    run, monkeypatch, capsys, tmp_path, command, module, function
):
    """Catches a traceback of a hundred lines where a person ended a command."""
    monkeypatch.setattr(module, function, _interrupted)
    monkeypatch.chdir(tmp_path)
    try:
        status, said = run() if command is None else (command(), capsys.readouterr().err)
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("a traceback")
    assert status == process.INTERRUPTED and said == "interrupted; rerun the same command\n"


def test_a_start_without_a_tpu_says_nothing_of_one(tmp_path):
    """Catches JAX's 'Unable to initialize backend tpu' and libtpu's page before each job's log."""
    argv = [f"--config={os.path.join(CONFIGS, 'evaluate.py')}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax.main", *argv, "--config.init_from=/none"],
        env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == process.MISTAKE
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_chain_refuses_weights_in_its_middle_and_takes_them_at_its_start(tmp_path, capsys):
    """Catches --config.phaseN.init_from that nobody reads."""
    argv = ["main", f"--config={os.path.join(CONFIGS, 'phases.py')}:tiny", f"--workdir={tmp_path}"]
    argv.append("--config.phase1.batch_size=8")
    for phase, word in (("phase1", "'/none'"), ("phase2", "phase2.init_from='/none'")):
        assert main.main([*argv, f"--config.{phase}.init_from=/none"]) == process.MISTAKE
        assert word in capsys.readouterr().err


def test_a_refused_run_leaves_no_workdir(run, tmp_path):
    """Catches a half-made workdir that the corrected command then trips over."""
    run("--config.init_from=/none")
    assert not (tmp_path / "run" / "checkpoints").exists()
