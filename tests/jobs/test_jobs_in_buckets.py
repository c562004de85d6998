# SPDX-License-Identifier: Apache-2.0
"""Jobs from and to an object store, in memory: the same results as on a disk."""

import os

import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, killing, run_job, small_models
from support.memory_store import memory_store

from dcae_jax import commands, files
from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights
from dcae_jax.files import buckets
from dcae_jax.jobs import evaluate, export, sample, status, train

ROOT = "memory://bucket"


@pytest.fixture
def store(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    with memory_store(monkeypatch, tmp_path / "cache") as system:
        yield system


def _job(name, **keys):
    config = config_lib.load_file(os.path.join(CONFIGS, f"{name}.py"))
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in keys.items()})
    return config


def _get(url, folder):
    buckets.get_folder(url, str(folder), buckets.tree(url))
    return folder


@pytest.mark.slow
def test_training_in_a_failing_bucket_resumes_to_the_bits_of_a_disk(store, small, tmp_path):
    """Catches a part of a run that is lost on the way to a bucket, or back."""
    store.every = 10
    for steps in (2, 4):
        small.steps = steps
        assert run_job(train, small, f"{ROOT}/run") == train.DONE
        assert run_job(train, small, str(tmp_path / "disk")) == train.DONE
    store.every = 0
    there = _get(f"{ROOT}/run", tmp_path / "bucket")
    killing.assert_same(there, tmp_path / "disk")
    assert any(name.startswith("events.") for name in os.listdir(there))
    said = status.report(f"{ROOT}/run")
    assert "step 4, complete" in said and "state           done" in said
    left, right = (weights.load_weights(path)[0] for path in (f"{ROOT}/run", str(there)))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])


@pytest.mark.slow
def test_all_other_jobs_give_the_same_from_a_bucket(store, autoencoder_export, tmp_path):
    """Catches a job that looks on the disk for what is in the bucket, or leaves results there."""
    disk = tmp_path / "disk"
    for root in (ROOT, str(disk)):
        autoencoder = f"{root}/autoencoder/export"
        exporting = _job("export", init_from=autoencoder_export)
        assert run_job(export, exporting, f"{root}/autoencoder") == 0
        small_models.write_latents(f"{root}/latents", autoencoder, str(tmp_path / "images"))
        config = small_models.diffusion_config(f"{root}/latents")
        assert run_job(train, config, f"{root}/uvit") == train.DONE
        drawn = {"sample__count": 5, "sample__batch_size": 2, "sample__steps": 2}
        sampling = _job("sample", init_from=f"{root}/uvit", sample__format="npz", **drawn)
        assert run_job(sample, sampling, f"{root}/samples") == 0
        whole = _job("export", init_from=f"{root}/uvit", export__out=f"{root}/whole")
        assert run_job(export, whole, f"{root}/whole") == 0
        again = _job("sample", init_from=f"{root}/whole", **drawn)
        assert run_job(sample, again, f"{root}/again") == 0
        scoring = _job("evaluate", init_from=autoencoder, evaluate__count=4, resolution=32)
        scoring.evaluate.batch_size = 4
        assert run_job(evaluate, scoring, f"{root}/scores") == 0
        images = str(tmp_path / "images")
        out = [f"--model={autoencoder}", f"--out={root}/pngs"]
        assert commands.run("reconstruct", [images, *out]) == 0
        for name in ("latents", "uvit", "samples", "scores"):
            assert "done" in status.report(f"{root}/{name}"), name
    there = _get(ROOT, tmp_path / "bucket")
    for name in ("latents/latents-00000-of-00001.array_record", "samples/samples.npz"):
        assert (there / name).read_bytes() == (disk / name).read_bytes(), name
    assert len(os.listdir(there / "pngs")) == len(os.listdir(disk / "pngs")) > 0
    for name in ("uvit", "scores"):
        assert killing.rows(there / name) == killing.rows(disk / name)
    grids = (folder / "again" / "samples.png" for folder in (there, disk))
    np.testing.assert_array_equal(*(np.asarray(Image.open(grid)) for grid in grids))
    assert files.listdir(f"{ROOT}/samples/parts") == [] and not os.path.exists("memory:")
