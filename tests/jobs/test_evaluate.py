# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: its files and log lines, its protocol, mistakes in one line."""

import json
import os

import pytest
from goldens import judges as goldens
from PIL import Image
from support import CONFIGS, run_job
from support.reconstruction import model_weights

from dcae_jax import config as config_lib
from dcae_jax import files, main
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.errors import UserError
from dcae_jax.evaluation.reconstruction import SCORES
from dcae_jax.jobs import evaluate, train
from dcae_jax.runtime import process


@pytest.fixture
def trained(evaluate_config, alone, monkeypatch):
    """Makes the job find a model of random weights wherever init_from points."""

    def load(path, dtype, mesh, weights, variant):
        model = config_lib.validate(evaluate_config).model
        weights = model_weights(evaluate_config).items()
        return autoencoder_lib.build_autoencoder(model, weights, mesh)

    monkeypatch.setattr(autoencoder_lib, "load_autoencoder", load)
    evaluate_config.init_from = "runs/phase1/checkpoints/40"
    return evaluate_config


def test_the_job_leaves_its_files_and_says_what_is_locked(trained, tmp_path, caplog):
    """Fails if a file is missing, a row of the same step is written twice or others are lost, or
    the hint at the missing files is more than one line, or names no command."""
    caplog.set_level("INFO")
    workdir = tmp_path / "evaluated"
    for step in (7, 40, 90):
        files.append_row(str(workdir), step, {"loss": 1.0})
    for _ in range(2):
        assert run_job(evaluate, trained, str(workdir)) == 0
    lines = [r.getMessage() for r in caplog.records if "dcae-jax convert" in r.getMessage()]
    assert len(lines) == 2 and "\n" not in lines[0]
    for word in (
        "alexnet-owt-7be5be79.pth",
        "evaluate.lpips_weights",
        "--out=inception.safe",
        "KID",
    ):
        assert word in lines[0]
    written = json.loads((workdir / "evaluate.json").read_text())
    scores = written["results"]["32"]
    assert written["step"] == 40 and scores.keys() == {"psnr", "ssim", "images"}
    assert written["config"]["data"]["path"] == trained.data.path
    rows = files.read_rows(str(workdir))
    assert [row["step"] for row in rows] == [7, 40, 90] and rows[0] == {"step": 7, "loss": 1.0}
    assert rows[1] == {"step": 40, "loss": 1.0} | {f"{k}_32": scores[k] for k in ("psnr", "ssim")}
    names = {path.name for path in (workdir / "images").iterdir()}
    assert names == {f"evaluate_32{which}.png" for which in ("", "_best", "_worst")}


def test_a_variant_that_is_not_that_of_the_weights_is_refused(
    evaluate_config, autoencoder_export, alone, tmp_path
):
    """Fails if the job evaluates other weights than those of the name that it was given."""
    evaluate_config.init_from = autoencoder_export
    evaluate_config.model.variant = "dc-ae-f32c32-in-1.0"
    with pytest.raises(
        UserError, match="1.0' is another model than that of these weights, of tiny"
    ):
        run_job(evaluate, evaluate_config, str(tmp_path / "evaluated"))


@pytest.mark.parametrize("init_from", ["other", "run/checkpoints/3", ""])
def test_scores_are_not_mixed_into_another_run(init_from, tmp_path):
    """Fails if a run's metrics.jsonl gets the scores of other weights, or cannot get its own."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    path = init_from and str(tmp_path / init_from)
    if init_from.startswith("run"):
        evaluate._check_workdir(path, str(tmp_path / "run"))
        return
    with pytest.raises(
        UserError, match="holds a run, but not that of init_from=.*another --workdir"
    ):
        evaluate._check_workdir(path, str(tmp_path / "run"))
    evaluate._check_workdir(path, str(tmp_path / "scores"))


def test_few_images_are_marked_biased(trained, small_inception, tmp_path, caplog):
    """Fails if an FID of ten images looks like one of fifty thousand in the table or the files."""
    caplog.set_level("INFO")
    trained.evaluate.inception_weights = small_inception
    assert run_job(evaluate, trained, str(tmp_path / "evaluated")) == 0
    assert "at least 2048" in caplog.text
    table = next(r.getMessage() for r in caplog.records if "RFID" in r.getMessage())
    assert table.splitlines()[2].split()[0] == "32" and table.splitlines()[2].endswith("biased")
    results = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["results"]["32"]
    assert results["biased"] is True and results["rfid"] > 0
    assert files.read_rows(str(tmp_path / "evaluated"))[0]["biased_32"] is True


def test_rows_of_a_training_run_are_marked_too(small, alone, small_inception, tmp_path):
    """Fails if the rFID of six images in the middle of training passes for a real one."""
    small.evaluate.inception_weights = small_inception
    small.evaluate_first, small.steps = True, 1
    assert run_job(train, small, str(tmp_path / "run")) == 0
    rows = files.read_rows(str(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["biased_32"] is True and row["rfid_32"] > 0 for row in rows)


def test_one_image_gets_lpips_too(trained, alexnet, tmp_path):
    """Fails if the network is forgotten for a single image."""
    trained.evaluate.lpips_weights = alexnet
    path = tmp_path / "picture.png"
    Image.fromarray(goldens.pictures(1, 32)[0]).save(path)
    trained.data.path = str(path)
    run_job(evaluate, trained, str(tmp_path / "one"))
    results = json.loads((tmp_path / "one" / "evaluate.json").read_text())["results"]
    assert results[str(path)].keys() == {*SCORES}


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        ({"protocol": "imagenet-64"}, ["imagenet-64", "imagenet-256"]),
        ({"protocol": "imagenet-512", "resolutions": (256,)}, ["(256,)", "(512,)"]),
        ({"protocol": "imagenet-256", "crops": 2}, ["evaluate.crops=2", "1"]),
        ({"protocol": "imagenet-256", "count": 100}, ["evaluate.count=100"]),
        ({"protocol": "imagenet-256"}, ["data.source='photos'", "imagenet-256"]),
        ({"reference": "/data/val"}, ["evaluate.reference", "evaluate.samples"]),
        (
            {"lpips_weights": "/none"},
            ["evaluate.lpips_weights='/none'", "alexnet-owt", "dcae-jax convert"],
        ),
        ({"inception_weights": "/none"}, ["evaluate.inception_weights", "pt_inception"]),
        ({"samples": "/none"}, ["evaluate.inception_weights", "dcae-jax convert"]),
    ],
)
def test_a_contradiction_or_a_missing_file_is_one_line(tmp_path, capsys, values, words):
    """Fails if a protocol's number is reported for something else, or a mistake is a traceback."""
    flags = [f"--config.evaluate.{key}={value}" for key, value in values.items()]
    if "samples" not in values:
        flags.append("--config.init_from=/nothing")
    config = os.path.join(CONFIGS, "evaluate.py")
    status = main.main(["main", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags])
    said = capsys.readouterr().err
    assert status == process.MISTAKE and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_protocol_fixes_its_keys_and_warns_of_another_set(evaluate_config, caplog):
    """Fails if the protocol leaves the resolution or the dtype as it was, or if ten images pass for
    ImageNet."""
    evaluate_config.evaluate.protocol = "imagenet-512"
    resolved = evaluate.resolve(config_lib.validate(evaluate_config))
    assert resolved.evaluate.resolutions == (512,) and evaluate_config.evaluate.resolutions == ()
    evaluate._warn_of_count("imagenet-512", 10, "images")
    assert "50,000 images, but got 10" in caplog.text
    assert resolved.dtype == "float32"
    evaluate_config.dtype = "bfloat16"
    with pytest.raises(UserError, match="dtype='bfloat16' contradicts evaluate.protocol="):
        evaluate.resolve(config_lib.validate(evaluate_config))
    evaluate_config.evaluate.samples = "samples.npz"
    with pytest.raises(UserError, match="needs evaluate.reference"):
        evaluate.resolve(config_lib.validate(evaluate_config))
    evaluate_config.evaluate.protocol = ""
    assert evaluate.resolve(config_lib.validate(evaluate_config)).evaluate.resolutions == ()


def test_steps_come_from_the_path(tmp_path):
    """Fails if the row of a checkpoint stands at another step."""
    for step in (3, 20):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert evaluate.step_of(str(tmp_path)) == 20
    assert evaluate.step_of(str(tmp_path / "checkpoints" / "3")) == 3
    assert evaluate.step_of("dc-ae-f32c32-in-1.0") == 0
