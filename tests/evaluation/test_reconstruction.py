# SPDX-License-Identifier: Apache-2.0
"""Reconstructions: each image once, the same numbers on any mesh and in any number of processes."""

import functools

import jax
import numpy as np
import pytest
from goldens import judges as goldens
from safetensors.numpy import save_file
from support import small_networks
from support.moments import union
from support.processes import two_processes
from support.reconstruction import evaluate_random, model_weights

from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.data import pipeline, sources
from dcae_jax.evaluation import metrics, networks, reconstruction
from dcae_jax.models import inception, inception_torch, lpips, lpips_torch


def assert_same_scores(found, expected):
    """PSNR within 1e-5 of itself, SSIM and LPIPS, which run from 0 to 1, within 1e-5."""
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-5)
    for name in ("ssim", "lpips"):
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-5), name
    assert found["rfid"] == pytest.approx(expected["rfid"], rel=1e-3)


def test_every_mesh_and_batch_gives_the_same_numbers(evaluate_config, small_inception, alexnet):
    """Fails if padding of the last batch counts, an image counts twice or not at all, or the
    devices' parts are gathered wrongly: ten images at once, and in eights on 8 devices."""
    evaluate_config.evaluate.inception_weights = small_inception
    evaluate_config.evaluate.lpips_weights = alexnet
    many = evaluate_random(evaluate_config, devices=8)
    evaluate_config.evaluate.batch_size = 10
    whole = evaluate_random(evaluate_config)
    assert set(whole.scores) == {*reconstruction.SCORES, "rfid"}
    assert many.count == whole.count == 10
    assert_same_scores(many.scores, whole.scores)
    for which in ("best", "worst"):
        np.testing.assert_array_equal(many.extremes[which][0], whole.extremes[which][0])
    assert whole.scores["rfid"] > 1e-3 and whole.scores["lpips"] > 1e-4


def test_two_halves_are_the_whole(evaluate_config, small_inception, one_device):
    """Fails if a mean is taken of means, or moments of two parts do not add up to those of all."""
    evaluate_config.evaluate.inception_weights = small_inception
    config = config_lib.validate(evaluate_config)
    loaded = networks.load_networks(config.evaluate, one_device)
    model = autoencoder_lib.build_autoencoder(
        config.model, model_weights(config).items(), one_device
    )
    source = sources.evaluation_source(config.data)
    subsets = [sources.Subset(source, np.arange(*x)) for x in ((0, 8), (8, 10))]  # whole batches:
    # elsewhere in a batch an image may round to other levels, which SSIM shows.
    step = reconstruction.eval_step(model.graphdef, one_device)
    step = functools.partial(step, model.weights, loaded, None)
    parts = []
    for part in (source, *subsets):
        moments = {k: networks.empty_moments(loaded, one_device) for k in ("image", "output")}
        batches = networks.batches(config.evaluate, config.data, part, 32, one_device)
        parts.append(reconstruction.accumulate(step, moments, batches, one_device, range(2), 2))
    for name, total in parts[0].sums.items():
        assert parts[1].sums[name] + parts[2].sums[name] == pytest.approx(total, rel=1e-5), name
    sets = ("image", "output")
    merged = [x for k in sets for x in union(*(part.moments[k] for part in parts[1:]))]
    whole = [x for k in sets for x in metrics.moments_finalize(parts[0].moments[k])]
    found, expected = metrics.frechet_distance(*merged), metrics.frechet_distance(*whole)
    assert found == pytest.approx(expected, rel=1e-4)


def test_metrics_are_computed_in_float32(evaluate_config, small_inception, alexnet):
    """Fails if a metric network inherits the model's bfloat16, if the images are not rounded to
    8 bits, or with the other normalisation or network of LPIPS: computed here from the grids."""
    evaluate_config.dtype = "bfloat16"
    evaluate_config.evaluate.inception_weights = small_inception
    evaluate_config.evaluate.lpips_weights = alexnet
    evaluate_config.evaluate.grid = evaluate_config.evaluate.batch_size = 10
    result = evaluate_random(evaluate_config)
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
        features = np.float64(
            small_networks.small_features(small_networks.small_weights(), inputs)[0]
        )
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    assert result.scores["rfid"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-3)


def test_the_best_and_the_worst_are_found(evaluate_config):
    """Fails if the grids miss an image of a later batch, repeat one, or show padding."""
    evaluate_config.evaluate.batch_size, evaluate_config.evaluate.grid = 4, 2
    result = evaluate_random(evaluate_config)
    evaluate_config.evaluate.grid = 10
    every = evaluate_random(evaluate_config)
    images, outputs = every.extremes["worst"]
    psnr = np.asarray(metrics.psnr(images.astype(np.float32), outputs.astype(np.float32)))
    assert len(psnr) == 10 and (np.diff(psnr) >= 0).all() and psnr[0] < psnr[-1]
    np.testing.assert_array_equal(result.extremes["worst"][1], outputs[:2])
    np.testing.assert_array_equal(result.extremes["best"][1], outputs[::-1][:2])


def test_the_grid_shows_images_of_the_whole_set(evaluate_config, folder):
    """Fails if the grid is of the first images, of one class, or stops at a broken one."""
    evaluate_config.evaluate.batch_size, evaluate_config.evaluate.grid = 4, 3
    source = sources.folder(folder)
    every = [np.asarray(image) for image, _ in map(source.__getitem__, range(10))]
    shown = evaluate_random(evaluate_config).images
    found = [next(i for i, x in enumerate(every) if (x == image).all()) for image in shown]
    assert found == list(pipeline.spread(10, 3)) and found[-1] > 5
    with open(source.name(0), "wb") as file:
        file.write(b"broken")
    result = evaluate_random(evaluate_config)
    assert result.count == 9
    np.testing.assert_array_equal(result.images[0], every[1])
    np.testing.assert_array_equal(result.images[1:], shown[1:])


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(evaluate_config, alexnet, tmp_path):
    """Fails if processes evaluate the same images, miss each other's, or disagree: with Inception
    itself, 2 processes of 2 devices against 1 device."""
    path = str(tmp_path / "inception.safetensors")
    weights = inception_torch.from_torch(goldens.inception_state(inception.shapes()))
    save_file(weights, path, metadata={"network": "inception-fid"})
    evaluate_config.evaluate.inception_weights = path
    evaluate_config.evaluate.lpips_weights = alexnet
    alone = evaluate_random(evaluate_config)
    results = [{**alone.scores, "count": alone.count}]
    settings = {"path": evaluate_config.data.path, "inception": path, "lpips": alexnet}
    settings["model"] = evaluate_config.model.to_dict()
    results += two_processes(ONE_OF_TWO, settings)
    for other in results[1:]:
        assert other["count"] == 10
        assert_same_scores(other, results[0])
    assert results[1] == results[2]  # with the sum of the images in the grids


ONE_OF_TWO = """
from support.reconstruction import evaluate_random
config = config_lib.load_file(CONFIGS + "/evaluate.py")
config.model.update(settings["model"])
config.resolution = 32
config.data.source, config.data.path = "folder", settings["path"]
config.evaluate.batch_size, config.evaluate.grid = 8, 3
config.evaluate.inception_weights = settings["inception"]
config.evaluate.lpips_weights = settings["lpips"]
result = evaluate_random(config, devices=4)
shown = {k: [int(p.sum()) for p in pair] for k, pair in result.extremes.items()}
sys.stdout.write(json.dumps({**result.scores, "count": result.count, **shown}) + chr(10))
"""
