# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: reported, replaced by the previous one, never overwritten."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from support import run_job, to_json

from dcae_jax import config as config_lib
from dcae_jax import files as files_lib
from dcae_jax.checkpoints import __main__, integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import MachineError, UserError
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import state as state_lib

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "missing": lambda data: None,
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
}


def _damage(path, kind):
    """Replaces the file by what the fault leaves of it."""
    data = DAMAGES[kind](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def _files(folder):
    """Files of a checkpoint that restoring depends on, largest first."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in integrity._LATER]
    return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 2, 4 and 6 of a made-up state, and the state."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    tree = {"a": jax.numpy.arange(5000.0), "b": jax.numpy.ones((3, 3))}
    zero = jax.numpy.zeros((), jax.numpy.int32)
    made = state_lib.TrainState(zero, tree, {}, {}, {"m": tree["a"] / 7}, None, zero, zero)
    manager = checkpoints.open_manager(str(workdir), 3)
    for step in (2, 4, 6):
        checkpoints.save(manager, made, {"loss": jax.numpy.float32(step)}, step, step)
    manager.close()
    config = to_json(config_lib.default())
    files_lib.write_json(str(workdir / checkpoints.CONFIG), {"config": config})
    files_lib.append_row(str(workdir), 2, {"loss": 1.0})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damaged_file_is_noticed(workdir, kind):
    """Catches a fault that restoring does not see: Orbax reads a flipped bit as a number."""
    folder = workdir / "checkpoints" / "6"
    assert integrity.damage(str(folder)) == ""
    files = _files(folder)
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        _damage(path, kind)
        assert path.name in integrity.damage(str(folder)), path
        path.write_bytes(data)
    assert integrity.damage(str(folder)) == ""


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_used(workdir, kind, caplog):
    """Catches a run that fails on its newest checkpoint, or resumes from wrong numbers."""
    victim = _files(workdir / "checkpoints" / "6" / "weights")[0]
    _damage(victim, kind)
    raw, _ = checkpoint_weights.load_weights(str(workdir), "raw")
    np.testing.assert_array_equal(raw["a"], np.arange(5000.0))
    assert f"checkpoint 6 of {workdir} is damaged" in caplog.text
    assert checkpoints.resume_step(str(workdir)) == 4
    assert "checkpoint 6 is damaged" in caplog.text and victim.name in caplog.text
    assert checkpoints.saved_steps(str(workdir)) == [2, 4]
    assert (workdir / "damaged" / "6").is_dir()  # for a look, and out of the way of a new 6
    with pytest.raises(UserError, match="not a finished checkpoint"):
        checkpoint_weights.load_weights(str(workdir / "checkpoints" / "6"))


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(workdir):
    """Catches a silent change of the step that was named."""
    _damage(_files(workdir / "checkpoints" / "4" / "weights")[0], "one bit")
    with pytest.raises(UserError, match="checkpoints/4' is damaged: weights/.*checksum"):
        checkpoint_weights.load_weights(str(workdir / "checkpoints" / "4"))


def test_with_none_whole_nothing_starts_anew(small, alone, workdir):
    """Catches the worst: a fresh run that writes over what could still be rescued."""
    for step in (2, 4, 6):
        _damage(_files(workdir / "checkpoints" / str(step) / "weights")[0], "zeroed")
    before = sorted(str(p) for p in workdir.rglob("*"))
    with pytest.raises(MachineError, match="no checkpoint .* is undamaged .6: .*; 4: .*; 2: "):
        run_job(train, small, str(workdir))
    assert sorted(str(p) for p in workdir.rglob("*")) == before
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        checkpoint_weights.load_weights(str(workdir))


def test_a_run_goes_on_past_a_damaged_checkpoint_to_the_same_end(small, alone, tmp_path, caplog):
    """Catches a step that cannot be saved again because its damaged folder is in the way."""
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert run_job(train, small, str(whole)) == train.DONE
    shutil.copytree(whole, hurt)
    _damage(_files(hurt / "checkpoints" / "4")[0], "one bit")
    assert run_job(train, small, str(hurt)) == train.DONE
    assert "moved to" in caplog.text and checkpoints.saved_steps(str(hurt)) == [2, 4]
    a, b = (checkpoint_weights.load_weights(str(d))[0] for d in (whole, hurt))
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
    steps = [[row["step"] for row in files_lib.read_rows(str(d))] for d in (whole, hurt)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]


def test_a_copy_is_whole_and_a_cut_one_is_not_taken_for_it(workdir, tmp_path, capsys):
    """Catches a copy that the copier never compared, and half a copy under a finished name."""
    there = tmp_path / "there"
    assert __main__.main(["copy", str(workdir), str(there)]) == 0
    assert "2, 4, 6" in capsys.readouterr().out
    for step in (2, 4, 6):
        assert integrity.damage(str(there / "checkpoints" / str(step))) == ""
    one = tmp_path / "one"
    assert __main__.main(["copy", str(workdir / "checkpoints" / "4"), str(one)]) == 0
    assert checkpoints.saved_steps(str(one)) == [4]
    assert checkpoint_weights.load_weights(str(one), "raw")[0]["a"].shape == (5000,)
    # Copied by another tool, and cut off in the middle.
    shutil.copytree(workdir / "checkpoints" / "6", one / "checkpoints" / "6")
    for path in list((one / "checkpoints" / "6" / "optimizer").rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    assert checkpoints.resume_step(str(one)) == 4


def test_a_damaged_checkpoint_is_not_copied(workdir, tmp_path, capsys):
    """Catches damage that is copied under a fresh manifest."""
    _damage(_files(workdir / "checkpoints" / "6")[0], "one bit")
    there = tmp_path / "there"
    assert __main__.main(["copy", str(workdir), str(there)]) == 0
    assert checkpoints.saved_steps(str(there)) == [2, 4]
    source = str(workdir / "checkpoints" / "6")
    assert __main__.main(["copy", source, str(tmp_path / "none")]) == 2
    assert not os.path.exists(tmp_path / "none" / "checkpoints" / "6")
    assert __main__.main(["check", str(workdir)]) == 1
    assert "6: " in capsys.readouterr().out


def test_a_damaged_export_is_refused(workdir, tmp_path):
    """Catches a flipped bit in weights that are passed on."""
    folder = tmp_path / "export"
    folder.mkdir()
    weights = {"w": np.arange(999.0, dtype=np.float32)}
    checkpoint_weights.save_export(str(folder), weights, {"kind": "autoencoder", "model": {}})
    assert checkpoint_weights.load_weights(str(folder))[0].keys() == {"w"}
    _damage(_files(folder / "params")[0], "one bit")
    with pytest.raises(UserError, match="damaged export"):
        checkpoint_weights.load_weights(str(folder))


def test_an_old_checkpoint_without_a_manifest_is_read_with_a_warning(workdir, caplog):
    """Catches weights that can no longer be read because they are older than manifests."""
    (workdir / "checkpoints" / "6" / integrity.FILE).unlink()
    assert checkpoint_weights.load_weights(str(workdir), "raw")[0]["a"].shape == (5000,)
    assert "without a check" in caplog.text
    # A run that trains has the one before, which is known to be whole.
    assert checkpoints.resume_step(str(workdir)) == 4


def test_the_mesh_does_not_matter_to_the_manifest(small, tmp_path, monkeypatch):
    """Catches a manifest that is written before every device's files are there."""
    monkeypatch.setattr(sharding, "SMALL", 64)
    sizes = config_lib.default().mesh
    sizes.fsdp = 4
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:4])
    made = state_lib.init_state(small, mesh, state_lib.train_spec(small, mesh))
    manager = checkpoints.open_manager(str(tmp_path), 2)
    checkpoints.save(manager, made, {}, 1, 0)
    manager.close()
    assert integrity.damage(str(tmp_path / "checkpoints" / "1")) == ""
