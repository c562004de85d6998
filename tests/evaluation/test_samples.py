# SPDX-License-Identifier: Apache-2.0
"""Samples against every kind of reference, by one process or two."""

import json
import os
import pathlib

import numpy as np
import pytest
from goldens import judges as goldens
from PIL import Image
from support import run_job, small_networks, to_json
from support.processes import two_processes

from dcae_jax import files
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics
from dcae_jax.evaluation import samples as samples_lib
from dcae_jax.jobs import evaluate, sample
from dcae_jax.models import inception


@pytest.fixture
def sample_config(evaluate_config, small_inception, alone):
    evaluate_config.data.source = "photos"
    evaluate_config.evaluate.inception_weights = small_inception
    return evaluate_config


def test_samples_against_every_kind_of_reference(sample_config, tmp_path, caplog):
    """Fails if an .npz is read otherwise than a folder, mu and sigma otherwise than images, with
    the other preprocessing, or with samples and reference exchanged."""
    caplog.set_level("INFO")
    settings = sample_config.evaluate
    real, fake = goldens.pictures(13, 32, seed=8), goldens.pictures(11, 32, seed=9)
    small_networks.write_images(tmp_path / "fake", fake)
    small_networks.write_images(tmp_path / "real", real)
    np.savez(tmp_path / "fake.npz", fake)
    np.savez_compressed(tmp_path / "real.npz", arr_0=real)
    weights = small_networks.small_weights()
    seen = {
        (name, kind): [
            np.asarray(v)
            for v in small_networks.small_features(weights, inception.preprocess(levels, kind))
        ]
        for name, levels in (("real", real), ("fake", fake))
        for kind in inception.PREPROCESSINGS
    }
    moments = {}
    for name in ("real", "fake"):
        rows = np.float64(seen[name, "pytorch-fid"][0])
        moments[name] = rows.mean(0), np.cov(rows, rowvar=False)
    np.savez(tmp_path / "moments.npz", mu=moments["real"][0], sigma=moments["real"][1])
    # mu and sigma of many more images than the file holds: theirs is the FID, the images' the rest.
    np.savez(
        tmp_path / "three.npz", arr_0=real, mu=moments["real"][0] + 1, sigma=moments["real"][1]
    )
    fid = metrics.frechet_distance(*moments["fake"], *moments["real"])
    far = metrics.frechet_distance(*moments["fake"], moments["real"][0] + 1, moments["real"][1])
    a, b = (seen[name, "torch-fidelity"] for name in ("fake", "real"))
    expected = {"fid": fid, "is": metrics.inception_score(a[1])[0]}
    more = {"kid": metrics.kernel_distance(a[0], b[0], subset_size=11)[0]}
    more |= dict(zip(("precision", "recall"), metrics.precision_recall(a[0], b[0]), strict=True))
    cases = (
        ("fake", "real", more),
        ("fake.npz", "real.npz", more),
        ("fake.npz", "moments.npz", {}),
        ("fake.npz", "three.npz", more | {"fid": far}),
    )
    for samples, reference, others in cases:
        settings.samples, settings.reference = (str(tmp_path / x) for x in (samples, reference))
        assert run_job(evaluate, sample_config, str(tmp_path / "out")) == 0
        scores = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"]["32"]
        assert scores["images"] == 11 and scores["biased"] is True
        assert ("kid" in scores) == bool(others)
        for name, value in (expected | others).items():
            assert scores[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert files.read_rows(str(tmp_path / "out"))[0]["step"] == 0


def test_reference_statistics_are_kept_until_something_changes(sample_config, tmp_path, caplog):
    """Fails if the reference is computed twice, or not again for other images or weights."""
    caplog.set_level("INFO")
    settings = sample_config.evaluate
    np.savez(tmp_path / "fake.npz", goldens.pictures(9, 32, seed=9))
    settings.samples, settings.reference = str(tmp_path / "fake.npz"), sample_config.data.path
    scores = []

    def run_again():
        caplog.clear()
        run_job(evaluate, sample_config, str(tmp_path / "out"))
        text = (tmp_path / "out" / "evaluate.json").read_text()
        scores.append(json.loads(text)["results"]["32"])
        return "statistics read from" in caplog.text

    assert not run_again() and run_again() and scores[0] == scores[1]
    Image.fromarray(goldens.pictures(1, 32, seed=99)[0]).save(
        os.path.join(settings.reference, "more.png")
    )
    assert not run_again() and scores[2]["fid"] != scores[1]["fid"]
    pathlib.Path(settings.inception_weights).write_bytes(b"other")
    assert not run_again() and run_again()
    assert len(list((tmp_path / "out" / "reference").iterdir())) == 3


def test_samples_alone_have_an_inception_score(sample_config, tmp_path):
    """Fails if the job asks for a reference that the score does not need."""
    np.savez(tmp_path / "fake.npz", goldens.pictures(9, 32, seed=9))
    sample_config.evaluate.samples = str(tmp_path / "fake.npz")
    assert run_job(evaluate, sample_config, str(tmp_path / "out")) == 0
    scores = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"]["32"]
    assert scores.keys() == {"is", "is_std", "images"} and scores["is"] >= 1


def test_samples_that_cannot_be_scored_are_named(sample_config, tmp_path):
    """Fails if samples of another size are cut silently, or a file's fault shows as a traceback."""
    arrays = {
        "size.npz": {"arr_0": np.zeros((3, 48, 48, 3), np.uint8)},
        "float.npz": {"arr_0": np.zeros((3, 32, 32, 3), np.float32)},
        "other.npz": {"images": np.zeros((3, 32, 32, 3), np.uint8)},
        "moments.npz": {"mu": np.zeros(7), "sigma": np.zeros((7, 7))},
        "good.npz": {"arr_0": goldens.pictures(9, 32)},
    }
    for name, values in arrays.items():
        np.savez(tmp_path / name, **values)
    (tmp_path / "text.npz").write_text("none of the kind")
    (tmp_path / "empty").mkdir()
    good = str(tmp_path / "good.npz")
    for samples, reference, word in (
        ("size.npz", good, "48x48"),
        ("float.npz", good, "float32"),
        ("other.npz", good, "images; images must be in arr_0"),
        ("text.npz", good, "is not an .npz"),
        ("empty", good, "evaluate.samples=.*holds no image"),
        ("none", good, "does not exist"),
        ("good.npz", str(tmp_path / "none"), "evaluate.reference=.*does not exist"),
        ("good.npz", str(tmp_path / "moments.npz"), "mu is .7,"),
    ):
        sample_config.evaluate.update(samples=str(tmp_path / samples), reference=reference)
        sample_config.evaluate.resolutions = (32,)
        with pytest.raises(UserError, match=word) as error:
            run_job(evaluate, sample_config, str(tmp_path / "out"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["compressed", "header", "short"])
def test_a_damaged_npz_is_named(form, tmp_path):
    """Fails if a traceback stands for one flipped byte, of the array or before it."""
    path = tmp_path / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    if form == "compressed":
        np.savez_compressed(path, arr_0=images)
    else:
        np.savez(path, arr_0=images)
    data = bytearray(path.read_bytes())
    if form == "short":  # the array claims more images than the file has
        data = data.replace(b"(20, 32, 32, 3), }", b"(2000000,32,32,3)}")
    else:
        place = len(data) // 2 if form == "compressed" else data.index(np.lib.format.MAGIC_PREFIX)
        data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"evaluate.samples='.*': arr_0 is damaged \(.*fetch it again"
    ):
        samples_lib.image_source(str(path), "evaluate.samples")


@pytest.mark.parametrize("form", ["stored", "job", "compressed", "fortran"])
def test_images_of_an_npz_stay_on_disk_where_they_can(form, tmp_path):
    """Catches 10 GB of samples read into memory, and pixels from the wrong place of the file."""
    images, path = goldens.pictures(10, 16), str(tmp_path / "samples.npz")
    if form == "job":
        sample._write_npz(path, [images[:7], images[7:]], np.arange(10))
    elif form == "compressed":
        np.savez_compressed(path, arr_0=images)
    else:
        order = np.asfortranarray if form == "fortran" else np.ascontiguousarray
        np.savez(path, arr_1=np.arange(10), arr_0=order(images))
    source = samples_lib.image_source(path, "evaluate.samples")
    assert isinstance(source.images, np.memmap) == (form in ("stored", "job"))
    np.testing.assert_array_equal(np.stack([source[i][0] for i in range(10)]), images)


@pytest.mark.slow
def test_two_processes_score_samples_as_one_does(sample_config, tmp_path):
    """Fails if features of one process's images are lost or counted twice, or if a process waits
    for ever for another that found the reference on its disk: run twice."""
    np.savez(tmp_path / "fake.npz", goldens.pictures(11, 32, seed=9))
    sample_config.evaluate.samples = str(tmp_path / "fake.npz")
    sample_config.evaluate.reference = os.path.join(tmp_path, "pictures")
    run_job(evaluate, sample_config, str(tmp_path / "one"))
    settings = to_json(sample_config.evaluate)
    two_processes(SAMPLES_OF_TWO, settings | {"workdir": str(tmp_path / "two")})
    one, two = (
        json.loads((tmp_path / name / "evaluate.json").read_text())["results"]["32"]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-3, abs=1e-6) and two["images"] == 11


SAMPLES_OF_TWO = """
inception.features = small_networks.small_features
inception_torch.load = small_networks.small_weights
config = config_lib.load_file(CONFIGS + "/evaluate.py")
for key in ("batch_size", "samples", "reference", "inception_weights"):
    config.evaluate[key] = settings[key]
status = [run_job(evaluate, config, settings["workdir"]) for _ in range(2)]
sys.stdout.write(json.dumps(status) + chr(10))
"""
