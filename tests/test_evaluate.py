# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: each image once, the same numbers on any mesh, mistakes in one line."""

import json
import os

import jax
import numpy as np
import pytest
from goldens import judges as goldens
from PIL import Image
from safetensors.numpy import save_file
from support import CONFIGS, run_job, small_judges
from support.moments import union
from support.reconstruction import judge, model_weights

from dcae_jax import config as config_lib
from dcae_jax import files, main
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.data import sources
from dcae_jax.errors import UserError
from dcae_jax.evaluation import metrics, reconstruction
from dcae_jax.jobs import evaluate, train
from dcae_jax.models import inception, inception_torch, lpips, lpips_torch
from dcae_jax.runtime import process

SCORES = ("psnr", "ssim", "lpips")


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """The file of LPIPS with random features."""
    path = tmp_path_factory.mktemp("lpips") / "lpips-alex.safetensors"
    weights = lpips_torch.from_torch(goldens.lpips_state("alex", scale=1.0))[1]
    save_file(weights, path, metadata={"network": "lpips-alex"})
    return str(path)


def assert_same_scores(found, expected):
    """PSNR within 1e-5 of itself, SSIM and LPIPS, which run from 0 to 1, within 1e-5."""
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-5)
    for name in ("ssim", "lpips"):
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-5), name
    assert found["rfid"] == pytest.approx(expected["rfid"], rel=1e-3)


@pytest.fixture
def trained(judge_config, alone, monkeypatch):
    """Makes the job find a model of random weights wherever init_from points."""

    def load(path, dtype, mesh, weights):
        model = config_lib.validate(judge_config).model
        return autoencoder_lib.build_autoencoder(model, model_weights(judge_config).items(), mesh)

    monkeypatch.setattr(autoencoder_lib, "load_autoencoder", load)
    judge_config.init_from = "runs/phase1/checkpoints/40"
    return judge_config


# --- reconstructions ------------------------------------------------------------------------------


def test_every_mesh_and_batch_gives_the_same_numbers(judge_config, small_inception, alexnet):
    """Fails if padding of the last batch counts, an image counts twice or not at all, or the
    devices' shares are put together wrongly: ten images at once, and in eights on 8 devices."""
    judge_config.evaluate.inception_weights = small_inception
    judge_config.evaluate.lpips_weights = alexnet
    many = judge(judge_config, devices=8)
    judge_config.evaluate.batch_size = 10
    whole = judge(judge_config)
    assert set(whole.scores) == {*SCORES, "rfid"}
    assert many.count == whole.count == 10
    assert_same_scores(many.scores, whole.scores)
    for which in ("best", "worst"):
        np.testing.assert_array_equal(many.extremes[which][0], whole.extremes[which][0])
    assert whole.scores["rfid"] > 1e-3 and whole.scores["lpips"] > 1e-4


def test_two_halves_are_the_whole(judge_config, small_inception, one_device):
    """Fails if a mean is taken of means, or moments of two parts do not add up to those of all."""
    judge_config.evaluate.inception_weights = small_inception
    config = evaluate.resolve(config_lib.validate(judge_config))
    judges = reconstruction.load_judges(config, one_device)
    model = autoencoder_lib.build_autoencoder(
        config.model, model_weights(config).items(), one_device
    )
    source = sources.evaluation_source(config.data)
    parts = [
        reconstruction.measure(config, model.graphdef, model.weights, one_device, part, judges, 32)
        for part in (source, *(sources.Subset(source, np.arange(*x)) for x in ((0, 7), (7, 10))))
    ]
    for name, total in parts[0].sums.items():
        assert parts[1].sums[name] + parts[2].sums[name] == pytest.approx(total, rel=1e-5), name
    sets = ("image", "output")
    merged = [x for k in sets for x in union(*(part.moments[k] for part in parts[1:]))]
    whole = [x for k in sets for x in metrics.moments_finalize(parts[0].moments[k])]
    found, expected = metrics.frechet_distance(*merged), metrics.frechet_distance(*whole)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_judges_compute_in_float32(judge_config, small_inception, alexnet):
    """Fails if a judge inherits the model's bfloat16, if the images are not rounded to 8 bits, or
    with the other normalisation or network of LPIPS: judged again here from the grids' pixels."""
    judge_config.dtype = "bfloat16"
    judge_config.evaluate.inception_weights = small_inception
    judge_config.evaluate.lpips_weights = alexnet
    judge_config.evaluate.grid = judge_config.evaluate.batch_size = 10
    result = judge(judge_config)
    x, y = (pixels.astype(np.float64) for pixels in (result.images, result.outputs))
    assert len(x) == result.count == 10
    psnr = 10 * np.log10(255**2 / np.mean((x - y) ** 2, axis=(1, 2, 3)))
    assert result.scores["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    x, y = x.astype(np.float32), y.astype(np.float32)
    distance = jax.jit(lpips.distance, static_argnums=(3, 4))(
        lpips_torch.load(alexnet), x / 127.5 - 1, y / 127.5 - 1, "alex", "torchmetrics"
    )
    assert result.scores["lpips"] == pytest.approx(float(distance.mean()), rel=1e-5)
    moments = []
    for levels in (y, x):
        inputs = inception.preprocess(levels, "pytorch-fid")
        features = np.float64(small_judges.small_features(small_judges.small_weights(), inputs)[0])
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    assert result.scores["rfid"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-3)


def test_the_best_and_the_worst_are_found(judge_config):
    """Fails if the grids miss an image of a later batch, repeat one, or show padding."""
    judge_config.evaluate.batch_size, judge_config.evaluate.grid = 4, 2
    result = judge(judge_config)
    judge_config.evaluate.grid = 10
    every = judge(judge_config)
    images, outputs = every.extremes["worst"]
    psnr = np.asarray(metrics.psnr(images.astype(np.float32), outputs.astype(np.float32)))
    assert len(psnr) == 10 and (np.diff(psnr) >= 0).all() and psnr[0] < psnr[-1]
    np.testing.assert_array_equal(result.extremes["worst"][1], outputs[:2])
    np.testing.assert_array_equal(result.extremes["best"][1], outputs[::-1][:2])


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(judge_config, alexnet, tmp_path):
    """Fails if processes judge the same images, miss each other's, or disagree: with Inception
    itself, 2 processes of 2 devices against 1 device."""
    path = str(tmp_path / "inception.safetensors")
    weights = inception_torch.from_torch(goldens.inception_state(inception.shapes()))
    save_file(weights, path, metadata={"network": "inception-fid"})
    judge_config.evaluate.inception_weights = path
    judge_config.evaluate.lpips_weights = alexnet
    alone = judge(judge_config)
    results = [{**alone.scores, "count": alone.count}]
    settings = {"path": judge_config.data.path, "inception": path, "lpips": alexnet}
    settings["model"] = judge_config.model.to_dict()
    results += small_judges.two_processes(ONE_OF_TWO, settings)
    for other in results[1:]:
        assert other["count"] == 10
        assert_same_scores(other, results[0])
    assert results[1] == results[2]  # with the sum of the pictures in the grids


ONE_OF_TWO = """
from support.reconstruction import judge
config = config_lib.load_file(CONFIGS + "/evaluate.py")
config.model.update(settings["model"])
config.resolution = 32
config.data.source, config.data.path = "folder", settings["path"]
config.evaluate.batch_size, config.evaluate.grid = 8, 3
config.evaluate.inception_weights = settings["inception"]
config.evaluate.lpips_weights = settings["lpips"]
result = judge(config, devices=4)
shown = {k: [int(p.sum()) for p in pair] for k, pair in result.extremes.items()}
sys.stdout.write(json.dumps({**result.scores, "count": result.count, **shown}) + chr(10))
"""


# --- the job's files and words --------------------------------------------------------------------


def test_the_job_leaves_its_files_and_says_what_is_locked(trained, tmp_path, caplog):
    """Fails if a file is missing, a row of the same step is written twice or others are lost, or
    the hint at the judges' files is more than one line, or names no command."""
    caplog.set_level("INFO")
    workdir = tmp_path / "judged"
    for step in (7, 40, 90):
        files.append_row(str(workdir), step, {"loss": 1.0})
    for _ in range(2):
        assert run_job(evaluate, trained, str(workdir)) == 0
    lines = [r.getMessage() for r in caplog.records if "torch_io" in r.getMessage()]
    assert len(lines) == 2 and "\n" not in lines[0]
    for word in (
        "alexnet-owt-7be5be79.pth",
        "evaluate.lpips_weights",
        "--out=inception.safe",
        "KID",
    ):
        assert word in lines[0]
    judged = json.loads((workdir / "evaluate.json").read_text())
    scores = judged["results"]["32"]
    assert judged["step"] == 40 and scores.keys() == {"psnr", "ssim", "images"}
    assert judged["config"]["data"]["path"] == trained.data.path
    rows = files.read_rows(str(workdir))
    assert [row["step"] for row in rows] == [7, 40, 90] and rows[0] == {"step": 7, "loss": 1.0}
    assert rows[1] == {"step": 40, "loss": 1.0} | {f"{k}_32": scores[k] for k in ("psnr", "ssim")}
    names = {path.name for path in (workdir / "images").iterdir()}
    assert names == {f"evaluate_32{which}.png" for which in ("", "_best", "_worst")}


def test_few_images_are_marked_biased(trained, small_inception, tmp_path, caplog):
    """Fails if an FID of ten images looks like one of fifty thousand in the table or the files."""
    caplog.set_level("INFO")
    trained.evaluate.inception_weights = small_inception
    assert run_job(evaluate, trained, str(tmp_path / "judged")) == 0
    assert "at least 2048" in caplog.text
    table = next(r.getMessage() for r in caplog.records if "RFID" in r.getMessage())
    assert table.splitlines()[2].split()[0] == "32" and table.splitlines()[2].endswith("biased")
    judged = json.loads((tmp_path / "judged" / "evaluate.json").read_text())["results"]["32"]
    assert judged["biased"] is True and judged["rfid"] > 0
    assert files.read_rows(str(tmp_path / "judged"))[0]["biased_32"] is True


def test_rows_of_a_training_run_are_marked_too(small, alone, small_inception, tmp_path):
    """Fails if the rFID of six images in the middle of training passes for a real one."""
    small.evaluate.inception_weights = small_inception
    small.evaluate_first, small.steps = True, 1
    assert run_job(train, small, str(tmp_path / "run")) == 0
    rows = files.read_rows(str(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["biased_32"] is True and row["rfid_32"] > 0 for row in rows)


def test_one_picture_gets_lpips_too(trained, alexnet, tmp_path):
    """Fails if the judge is forgotten for a single picture."""
    trained.evaluate.lpips_weights = alexnet
    path = tmp_path / "picture.png"
    Image.fromarray(goldens.pictures(1, 32)[0]).save(path)
    trained.data.path = str(path)
    run_job(evaluate, trained, str(tmp_path / "one"))
    judged = json.loads((tmp_path / "one" / "evaluate.json").read_text())["results"]
    assert judged[str(path)].keys() == {*SCORES}


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
        ({"lpips_weights": "/none"}, ["evaluate.lpips_weights='/none'", "alexnet-owt", "torch_io"]),
        ({"inception_weights": "/none"}, ["evaluate.inception_weights", "pt_inception"]),
        ({"samples": "/none"}, ["evaluate.inception_weights", "torch_io"]),
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


def test_a_protocol_fixes_its_keys_and_warns_of_another_set(judge_config, caplog):
    """Fails if the protocol leaves the resolution as it was, or ten images pass for ImageNet."""
    judge_config.evaluate.protocol = "imagenet-512"
    resolved = evaluate.resolve(config_lib.validate(judge_config))
    assert resolved.evaluate.resolutions == (512,) and judge_config.evaluate.resolutions == ()
    evaluate._warn_of_count("imagenet-512", 10, "images")
    assert "50,000 images, there are 10" in caplog.text
    judge_config.evaluate.samples = "samples.npz"
    with pytest.raises(UserError, match="needs evaluate.reference"):
        evaluate.resolve(config_lib.validate(judge_config))
    judge_config.evaluate.protocol = ""
    assert evaluate.resolve(config_lib.validate(judge_config)).evaluate.resolutions == ()


def test_steps_come_from_the_path(tmp_path):
    """Fails if the row of a checkpoint stands at another step."""
    for step in (3, 20):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert evaluate.step_of(str(tmp_path)) == 20
    assert evaluate.step_of(str(tmp_path / "checkpoints" / "3")) == 3
    assert evaluate.step_of("dc-ae-f32c32-in-1.0") == 0
