# SPDX-License-Identifier: Apache-2.0
"""The command line: mistakes end in one line and status 2, before any work is done."""

import os

import pytest
from support import CONFIGS

from dcae_jax import main
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
        (["--config.evaluate.resolutions=()"], ["names no size", "evaluate.resolutions=(64,)"]),
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
