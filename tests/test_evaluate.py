# SPDX-License-Identifier: Apache-2.0
"""The job `evaluate`: each image once, the same numbers on any mesh, mistakes in one line."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS
from goldens import judges as goldens
from PIL import Image
from safetensors.numpy import save_file

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import data, evaluate, main, metrics, report, sharding
from dcae_jax.config import UserError
from dcae_jax.models import inception, lpips

DIM, CLASSES = 24, 12  # of the network that stands in for Inception where its own is too slow
SCORES = ("psnr", "ssim", "lpips")


def small_features(weights, x, fc_bias=False):
    """Like `inception.features`: the means of 8x8 squares through a random layer and ReLU."""
    x = x[:, :296, :296].reshape(x.shape[0], 37, 8, 37, 8, 3).mean((2, 4)).reshape(x.shape[0], -1)
    pool3 = jax.nn.relu(jnp.matmul(x, weights["hidden"], precision="highest"))
    return pool3, jnp.matmul(pool3, weights["fc.kernel"], precision="highest")


def small_weights(path=""):
    """Weights of `small_features`."""
    random = np.random.RandomState(0)
    return {
        "hidden": random.standard_normal((37 * 37 * 3, DIM)).astype(np.float32) / 20,
        "fc.kernel": random.standard_normal((DIM, CLASSES)).astype(np.float32),
    }


@pytest.fixture
def small_inception(monkeypatch, tmp_path):
    """Puts a fast network in Inception's place; -> the file that has its weights."""
    monkeypatch.setattr(inception, "features", small_features)
    monkeypatch.setattr(inception, "load", small_weights)
    evaluate.judge_fn.cache_clear()
    evaluate.features_fn.cache_clear()
    path = tmp_path / "inception.safetensors"
    path.write_bytes(b"small")
    yield str(path)
    evaluate.judge_fn.cache_clear()
    evaluate.features_fn.cache_clear()


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """The file of LPIPS with random features."""
    path = tmp_path_factory.mktemp("lpips") / "lpips-alex.safetensors"
    weights = lpips.from_torch(goldens.lpips_state("alex", scale=1.0))[1]
    save_file(weights, path, metadata={"network": "lpips-alex"})
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Ten photographs' worth of noise and waves, 32 pixels a side."""
    root = tmp_path / "pictures"
    write_pictures(root, goldens.pictures(10, 32))
    return str(root)


def write_pictures(root, pictures):
    root.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{i:04d}.png")


@pytest.fixture
def judge_config(small, folder):
    """The job at 32 pixels on `folder`."""
    config = config_lib.load_file(os.path.join(CONFIGS, "evaluate.py"))
    config.model = small.model
    config.resolution = 32
    config.data.source, config.data.path = "folder", folder
    config.evaluate.batch_size, config.evaluate.grid = 8, 3
    return config


def judge(config, devices=1, source=None):
    """evaluate.evaluate with random weights on the first devices -> the Result at 32 pixels."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    model = dcae_jax.api.build_autoencoder(config, dict(model_weights(config)), mesh)
    config = evaluate.resolve(config)
    source = source or data.evaluation_source(config.data)
    return evaluate.evaluate(config, model.graph, model.weights, mesh, source)[32]


def model_weights(config):
    """Random weights by path, NumPy."""
    from dcae_jax import state
    from dcae_jax.models import layers

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    _, params, stats = layers.split(state.create_model(config, mesh, layers.random(5)))
    return {name: np.asarray(value) for name, value in {**params, **stats}.items()}


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
        return dcae_jax.api.build_autoencoder(judge_config, dict(model_weights(judge_config)), mesh)

    monkeypatch.setattr(dcae_jax.api, "load_autoencoder", load)
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
    config = evaluate.resolve(judge_config)
    judges = evaluate.load_judges(config, one_device)
    model = dcae_jax.api.build_autoencoder(config, dict(model_weights(config)), one_device)
    source = data.evaluation_source(config.data)
    parts = [
        evaluate.measure(config, model.graph, model.weights, one_device, part, judges, 32)
        for part in (source, *(data.Subset(source, np.arange(*x)) for x in ((0, 7), (7, 10))))
    ]
    for name, total in parts[0].sums.items():
        assert parts[1].sums[name] + parts[2].sums[name] == pytest.approx(total, rel=1e-5), name
    merged = {
        k: metrics.moments_merge(parts[1].moments[k], parts[2].moments[k])
        for k in ("image", "output")
    }
    found, expected = (
        metrics.frechet_distance(*(x for k in m for x in metrics.moments_finalize(m[k])))
        for m in (merged, parts[0].moments)
    )
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
        lpips.load(alexnet), x / 127.5 - 1, y / 127.5 - 1, "alex", "torchmetrics"
    )
    assert result.scores["lpips"] == pytest.approx(float(distance.mean()), rel=1e-5)
    moments = []
    for levels in (y, x):
        inputs = inception.preprocess(levels, "pytorch-fid")
        features = np.float64(small_features(small_weights(), inputs)[0])
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


def two_processes(script, settings):
    """Runs `script` in two processes of two devices; -> what the last line of each says, if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = settings | {"address": f"127.0.0.1:{free.getsockname()[1]}"}
    root = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START + script, json.dumps(settings | {"process": i})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(judge_config, alexnet, tmp_path):
    """Fails if processes judge the same images, miss each other's, or disagree: with Inception
    itself, 2 processes of 2 devices against 1 device."""
    path = str(tmp_path / "inception.safetensors")
    weights = inception.from_torch(goldens.inception_state(inception.shapes()))
    save_file(weights, path, metadata={"network": "inception-fid"})
    judge_config.evaluate.inception_weights = path
    judge_config.evaluate.lpips_weights = alexnet
    alone = judge(judge_config)
    results = [{**alone.scores, "count": alone.count}]
    settings = {"path": judge_config.data.path, "inception": path, "lpips": alexnet}
    settings["model"] = judge_config.model.to_dict()
    results += two_processes(ONE_OF_TWO, settings)
    for other in results[1:]:
        assert other["count"] == 10
        assert_same_scores(other, results[0])
    assert results[1] == results[2]  # with the sum of the pictures in the grids


@pytest.mark.slow
def test_two_processes_judge_samples_as_one_does(sample_config, tmp_path):
    """Fails if features of one process's images are lost or counted twice, or if a process waits
    for ever for another that found the reference on its disk: run twice."""
    np.savez(tmp_path / "fake.npz", goldens.pictures(11, 32, seed=9))
    sample_config.evaluate.samples = str(tmp_path / "fake.npz")
    sample_config.evaluate.reference = os.path.join(tmp_path, "pictures")
    evaluate.run(sample_config, str(tmp_path / "one"))
    settings = config_lib.to_json(sample_config.evaluate)
    two_processes(SAMPLES_OF_TWO, settings | {"workdir": str(tmp_path / "two")})
    one, two = (
        json.loads((tmp_path / name / "evaluate.json").read_text())["results"]["32"]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-3, abs=1e-6) and two["images"] == 11


START = """
import json, sys
settings = json.loads(sys.argv[1])
import jax
jax.distributed.initialize(settings["address"], 2, settings["process"])
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
import test_evaluate
from dcae_jax import config as config_lib
from dcae_jax import evaluate
from dcae_jax.models import inception
"""

SAMPLES_OF_TWO = """
inception.features, inception.load = test_evaluate.small_features, test_evaluate.small_weights
config = config_lib.load_file(test_evaluate.CONFIGS + "/evaluate.py")
for key in ("batch_size", "samples", "reference", "inception_weights"):
    config.evaluate[key] = settings[key]
status = [evaluate.run(config, settings["workdir"]) for _ in range(2)]
sys.stdout.write(json.dumps(status) + chr(10))
"""

ONE_OF_TWO = """
config = config_lib.load_file(test_evaluate.CONFIGS + "/evaluate.py")
config.model.update(settings["model"])
config.resolution = 32
config.data.source, config.data.path = "folder", settings["path"]
config.evaluate.batch_size, config.evaluate.grid = 8, 3
config.evaluate.inception_weights = settings["inception"]
config.evaluate.lpips_weights = settings["lpips"]
result = test_evaluate.judge(config, devices=4)
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
        report.append_row(str(workdir), step, {"loss": 1.0})
    for _ in range(2):
        assert evaluate.run(trained, str(workdir)) == 0
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
    rows = report.read_rows(str(workdir))
    assert [row["step"] for row in rows] == [7, 40, 90] and rows[0] == {"step": 7, "loss": 1.0}
    assert rows[1] == {"step": 40, "loss": 1.0} | {f"{k}_32": scores[k] for k in ("psnr", "ssim")}
    names = {path.name for path in (workdir / "images").iterdir()}
    assert names == {f"evaluate_32{which}.png" for which in ("", "_best", "_worst")}


def test_few_images_are_marked_biased(trained, small_inception, tmp_path, caplog):
    """Fails if an FID of ten images looks like one of fifty thousand in the table or the files."""
    caplog.set_level("INFO")
    trained.evaluate.inception_weights = small_inception
    assert evaluate.run(trained, str(tmp_path / "judged")) == 0
    assert "at least 2048" in caplog.text
    table = next(r.getMessage() for r in caplog.records if "RFID" in r.getMessage())
    assert table.splitlines()[2].split()[0] == "32" and table.splitlines()[2].endswith("biased")
    judged = json.loads((tmp_path / "judged" / "evaluate.json").read_text())["results"]["32"]
    assert judged["biased"] is True and judged["rfid"] > 0
    assert report.read_rows(str(tmp_path / "judged"))[0]["biased_32"] is True


def test_one_picture_gets_lpips_too(trained, alexnet, tmp_path):
    """Fails if the judge is forgotten for a single picture."""
    trained.evaluate.lpips_weights = alexnet
    path = tmp_path / "picture.png"
    Image.fromarray(goldens.pictures(1, 32)[0]).save(path)
    trained.data.path = str(path)
    evaluate.run(trained, str(tmp_path / "one"))
    judged = json.loads((tmp_path / "one" / "evaluate.json").read_text())["results"]
    assert judged[str(path)].keys() == {*SCORES}


# --- samples --------------------------------------------------------------------------------------


@pytest.fixture
def sample_config(judge_config, small_inception, alone):
    judge_config.data.source = "photos"
    judge_config.evaluate.inception_weights = small_inception
    return judge_config


def test_samples_against_every_kind_of_reference(sample_config, tmp_path, caplog):
    """Fails if an .npz is read otherwise than a folder, mu and sigma otherwise than images, with
    the other preprocessing, or with samples and reference exchanged."""
    caplog.set_level("INFO")
    settings = sample_config.evaluate
    real, fake = goldens.pictures(13, 32, seed=8), goldens.pictures(11, 32, seed=9)
    write_pictures(tmp_path / "fake", fake)
    write_pictures(tmp_path / "real", real)
    np.savez(tmp_path / "fake.npz", fake)
    np.savez_compressed(tmp_path / "real.npz", arr_0=real)
    weights = small_weights()
    seen = {
        (name, kind): [
            np.asarray(v) for v in small_features(weights, inception.preprocess(levels, kind))
        ]
        for name, levels in (("real", real), ("fake", fake))
        for kind in inception.PREPROCESSINGS
    }
    moments = {}
    for name in ("real", "fake"):
        rows = np.float64(seen[name, "pytorch-fid"][0])
        moments[name] = rows.mean(0), np.cov(rows, rowvar=False)
    np.savez(tmp_path / "moments.npz", mu=moments["real"][0], sigma=moments["real"][1])
    fid = metrics.frechet_distance(*moments["fake"], *moments["real"])
    a, b = (seen[name, "torch-fidelity"] for name in ("fake", "real"))
    expected = {"fid": fid, "is": metrics.inception_score(a[1])[0]}
    more = {"kid": metrics.kernel_distance(a[0], b[0], subset_size=11)[0]}
    more |= dict(zip(("precision", "recall"), metrics.precision_recall(a[0], b[0]), strict=True))
    cases = (
        ("fake", "real", more),
        ("fake.npz", "real.npz", more),
        ("fake.npz", "moments.npz", {}),
    )
    for samples, reference, others in cases:
        settings.samples, settings.reference = (str(tmp_path / x) for x in (samples, reference))
        assert evaluate.run(sample_config, str(tmp_path / "out")) == 0
        scores = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"]["32"]
        assert scores["images"] == 11 and scores["biased"] is True
        assert ("kid" in scores) == bool(others)
        for name, value in (expected | others).items():
            assert scores[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert report.read_rows(str(tmp_path / "out"))[0]["step"] == 0


def test_reference_statistics_are_kept_until_something_changes(sample_config, tmp_path, caplog):
    """Fails if the reference is computed twice, or not again for other images or weights."""
    caplog.set_level("INFO")
    settings = sample_config.evaluate
    np.savez(tmp_path / "fake.npz", goldens.pictures(9, 32, seed=9))
    settings.samples, settings.reference = str(tmp_path / "fake.npz"), sample_config.data.path
    scores = []

    def judged():
        caplog.clear()
        evaluate.run(sample_config, str(tmp_path / "out"))
        text = (tmp_path / "out" / "evaluate.json").read_text()
        scores.append(json.loads(text)["results"]["32"])
        return "statistics read from" in caplog.text

    assert not judged() and judged() and scores[0] == scores[1]
    Image.fromarray(goldens.pictures(1, 32, seed=99)[0]).save(
        os.path.join(settings.reference, "more.png")
    )
    assert not judged() and scores[2]["fid"] != scores[1]["fid"]
    pathlib.Path(settings.inception_weights).write_bytes(b"other")
    assert not judged() and judged()
    assert len(list((tmp_path / "out" / "reference").iterdir())) == 3


def test_samples_alone_have_an_inception_score(sample_config, tmp_path):
    """Fails if the job asks for a reference that the score does not need."""
    np.savez(tmp_path / "fake.npz", goldens.pictures(9, 32, seed=9))
    sample_config.evaluate.samples = str(tmp_path / "fake.npz")
    assert evaluate.run(sample_config, str(tmp_path / "out")) == 0
    scores = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"]["32"]
    assert scores.keys() == {"is", "is_std", "images"} and scores["is"] >= 1


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
    assert status == main.MISTAKE and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_samples_that_cannot_be_judged_are_named(sample_config, tmp_path):
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
        ("other.npz", good, "images; images are called arr_0"),
        ("text.npz", good, "is no .npz"),
        ("empty", good, "evaluate.samples=.*holds no image"),
        ("none", good, "does not exist"),
        ("good.npz", str(tmp_path / "none"), "evaluate.reference=.*does not exist"),
        ("good.npz", str(tmp_path / "moments.npz"), "mu is .7,"),
    ):
        sample_config.evaluate.update(samples=str(tmp_path / samples), reference=reference)
        sample_config.evaluate.resolutions = (32,)
        with pytest.raises(UserError, match=word) as error:
            evaluate.run(sample_config, str(tmp_path / "out"))
        assert "\n" not in str(error.value)


def test_a_protocol_fixes_its_keys_and_warns_of_another_set(judge_config, caplog):
    """Fails if the protocol leaves the resolution as it was, or ten images pass for ImageNet."""
    judge_config.evaluate.protocol = "imagenet-512"
    resolved = evaluate.resolve(judge_config)
    assert resolved.evaluate.resolutions == (512,) and judge_config.evaluate.resolutions == ()
    evaluate._warn_of_count("imagenet-512", 10, "images")
    assert "50,000 images, there are 10" in caplog.text
    judge_config.evaluate.samples = "samples.npz"
    with pytest.raises(UserError, match="needs evaluate.reference"):
        evaluate.resolve(judge_config)
    judge_config.evaluate.protocol = ""
    assert evaluate.resolve(judge_config).evaluate.resolutions == ()


def test_steps_come_from_the_path(tmp_path):
    """Fails if the row of a checkpoint stands at another step."""
    for step in (3, 20):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert evaluate.step_of(str(tmp_path)) == 20
    assert evaluate.step_of(str(tmp_path / "checkpoints" / "3")) == 3
    assert evaluate.step_of("dc-ae-f32c32-in-1.0") == 0
