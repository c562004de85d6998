# SPDX-License-Identifier: Apache-2.0
"""Sub-commands of the command line."""

import os
import subprocess
import sys

import pytest
from support import ROOT

from dcae_jax import commands, main
from dcae_jax.runtime import process


def test_an_unknown_command_names_the_nearest(capsys):
    """Catches absl's usage text, or a job's error, for a mistyped sub-command."""
    assert main.main(["dcae-jax", "statsu", "runs"]) == process.MISTAKE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'statsu'" in said and "did you mean status?" in said


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_has_an_example(name, capsys):
    """Catches a sub-command that cannot be found out about, or whose example is of another."""
    with pytest.raises(SystemExit) as stop:
        main.main(["dcae-jax", name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert said.startswith(f"usage: dcae-jax {name} ") and f"\n    dcae-jax {name}" in said


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_mistake_is_one_line_and_status_2(name, capsys):
    """Catches argparse's usage text before the message."""
    assert main.main(["dcae-jax", name, "--no_such_flag=1"]) == process.MISTAKE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: dcae-jax {name}: ")
    assert said.endswith("--help\n")


def test_a_reader_that_has_stopped_is_no_error():
    """Catches a traceback from `dcae-jax reconstruct photos/ ... | head`."""
    program = "import sys; from dcae_jax import main; sys.exit(main.main(['dcae-jax', 'models']))"
    reading, writing = os.pipe()
    os.close(reading)
    run = [sys.executable, "-u", "-c", program]
    done = subprocess.run(run, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == process.UNREAD and not done.stderr


def test_a_shipped_config_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    """Catches a command of a page that works in a clone alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("phase2.py:tiny", "configs/phase2.py:tiny"):
        for flag in ([f"--config={name}"], ["--config", name]):
            config, _ = main.parse(["dcae-jax", *flag, "--workdir=run", "--config.seed=3"])
            assert config.needs_weights and config.seed == 3
    for name in ("other/phase2.py", "../configs/phase2.py", "phase9.py"):
        assert main.main(["dcae-jax", f"--config={name}", "--workdir=run"]) == process.MISTAKE
        assert name in capsys.readouterr().err


def test_the_callers_own_file_comes_before_the_shipped_one(tmp_path, monkeypatch):
    """Catches a clone, or an edited copy, whose changes are silently not used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    with open(os.path.join(ROOT, "configs", "phase1.py")) as file:
        text = file.read().replace("steps = 1200", "steps = 7")
    (tmp_path / "configs" / "phase1.py").write_text(text)
    config, _ = main.parse(["dcae-jax", "--config=configs/phase1.py:tiny", "--workdir=run"])
    assert config.steps == 7
    (tmp_path / "phase1.py").write_text(text.replace("steps = 7", "steps = 8"))
    config, _ = main.parse(["dcae-jax", "--config=phase1.py:tiny", "--workdir=run"])
    assert config.steps == 8
