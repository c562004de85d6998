# SPDX-License-Identifier: Apache-2.0
"""The job `sample`: what it writes, alone and with others, and where it continues."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, run_job
from support.processes import two_processes

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.errors import UserError
from dcae_jax.evaluation import samples
from dcae_jax.jobs import sample


def _sample_config(trained, **changes):
    config = config_lib.load_file(os.path.join(CONFIGS, "sample.py"))
    config.init_from = trained
    config.sample.update({"count": 7, "steps": 2, "batch_size": 3, "format": "npz", **changes})
    return config


def test_the_job_writes_what_suites_read_and_goes_on_where_it_stopped(
    generator_run, alone, tmp_path, monkeypatch
):
    """Catches samples made twice or lost after a stop, and an .npz that no suite can read."""
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert run_job(sample, _sample_config(generator_run), whole) == 0
    with np.load(os.path.join(whole, "samples.npz")) as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (7, 32, 32, 3)
    model = dcae_jax.load_generator(generator_run)
    np.testing.assert_array_equal(model.sample(labels[:3], steps=2), images[:3])
    assert len(samples.image_source(os.path.join(whole, "samples.npz"), "key")) == 7

    real, calls = sample.draw, []

    def fails_once(settings, seed, model, numbers):
        calls.append(numbers[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(settings, seed, model, numbers)

    monkeypatch.setattr(sample, "draw", fails_once)
    with pytest.raises(KeyboardInterrupt):
        run_job(sample, _sample_config(generator_run), stopped)
    assert run_job(sample, _sample_config(generator_run), stopped) == 0
    assert calls == [0, 3, 3, 6]
    left, right = (open(os.path.join(f, "samples.npz"), "rb").read() for f in (whole, stopped))
    with np.load(os.path.join(stopped, "samples.npz")) as found:
        np.testing.assert_array_equal(found["arr_0"], images)
    assert left == right and not os.path.exists(os.path.join(stopped, "parts"))
    with pytest.raises(UserError, match="holds other samples: sample differ"):
        run_job(sample, _sample_config(generator_run, guidance=3.0), stopped)
    with pytest.raises(UserError, match="holds other samples: seed differ"):
        other = _sample_config(generator_run)
        other.seed = 5
        run_job(sample, other, stopped)


def test_only_files_of_the_job_are_removed(generator_run, alone, tmp_path):
    """Catches a folder that is removed with files of somebody else in it."""
    parts = tmp_path / "samples" / "parts"
    parts.mkdir(parents=True)
    (parts / "notes.txt").write_text("mine")
    (parts / "000000-000002.npy").write_bytes(b"")  # of an earlier batch size
    assert run_job(sample, _sample_config(generator_run), str(tmp_path / "samples")) == 0
    assert os.listdir(parts) == ["notes.txt"]


@pytest.mark.slow
def test_two_processes_sample_what_one_samples(generator_run, alone, tmp_path):
    """Catches samples that each process makes for itself, or parts that one of them lacks."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    changes = {"count": 6, "batch_size": 4}
    assert run_job(sample, _sample_config(generator_run, **changes), alone) == 0
    script = """
from dcae_jax.jobs import sample
from support import run_job
config = config_lib.load_file(f"{CONFIGS}/sample.py")
config.init_from = settings["trained"]
config.sample.update(settings["sample"])
print(json.dumps(run_job(sample, config, settings["workdir"])))
"""
    given = {"sample": {"steps": 2, "format": "npz", **changes}, "trained": generator_run}
    assert two_processes(script, given | {"workdir": together}) == [0, 0]
    left, right = (np.load(os.path.join(f, "samples.npz"))["arr_0"] for f in (alone, together))
    assert left.shape == right.shape and np.mean(left != right) <= 1e-3
    assert np.abs(left.astype(int) - right).max() <= 1


def test_files_and_grids(generator_run, alone, tmp_path):
    """Catches images under wrong numbers, and labels that are lost."""
    folder = str(tmp_path / "files")
    assert (
        run_job(sample, _sample_config(generator_run, format="png", labels=(2, 0), count=3), folder)
        == 0
    )
    assert sorted(os.listdir(os.path.join(folder, "images"))) == [f"{i:06d}.png" for i in range(3)]
    with open(os.path.join(folder, "labels.json")) as file:
        assert json.load(file) == {"000000.png": 2, "000001.png": 0, "000002.png": 2}
    want = dcae_jax.load_generator(generator_run).sample([2, 0, 2], steps=2)
    with Image.open(os.path.join(folder, "images", "000001.png")) as image:
        np.testing.assert_array_equal(np.asarray(image), want[1])
    folder = str(tmp_path / "grid")
    assert run_job(sample, _sample_config(generator_run, format="grid", count=5), folder) == 0
    with Image.open(os.path.join(folder, "samples.png")) as image:
        assert image.size == (3 * 130 - 2, 2 * 130 - 2)
