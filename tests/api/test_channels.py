# SPDX-License-Identifier: Apache-2.0
"""Latents of fewer channels: the API, and the jobs encode, train, sample, evaluate and export."""

import json
import os

import jax
import numpy as np
import pytest
from support import CONFIGS, run_job, small_models

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.jobs import encode, evaluate, export, train

KEPT = 3


@pytest.fixture(scope="module")
def cuttable(tmp_path_factory):
    """The export of a narrow tiny-1.5 with 8 latent channels, each of which shows in the image."""

    def louder(weights):
        weights["encoder.project_out.kernel"] = 30 * weights["encoder.project_out.kernel"]

    folder = str(tmp_path_factory.mktemp("cuttable"))
    return small_models.export_autoencoder(folder, louder, variant="tiny-1.5")


@pytest.fixture(scope="module")
def ae(cuttable):
    return dcae_jax.load_autoencoder(cuttable, mesh=None)


def _images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def _masked(z):
    return np.where(np.arange(z.shape[-1]) < KEPT, z, 0)


def test_encode_keeps_and_decode_takes_the_first_channels(ae):
    """Catches the last channels instead of the first, padding on the wrong side, and a decoder that
    is compiled for each number of channels."""
    x = _images(1, 32, 48)
    z = np.asarray(ae.encode(x))
    few = np.asarray(ae.encode(x, channels=KEPT))
    np.testing.assert_array_equal(few, z[..., :KEPT])
    want = np.asarray(ae.decode(_masked(z)))
    for given in (few, jax.numpy.asarray(few)):
        np.testing.assert_array_equal(np.asarray(ae.decode(given)), want)
    assert ae._decode._cache_size() == 1
    assert np.abs(want - np.asarray(ae.decode(z))).max() > 1e-3


def test_tiles_hold_as_many_channels(ae):
    """Catches tiles that are blended into an array of all channels."""
    x = _images(1, 64, 96)
    few = ae.encode(x, channels=KEPT, tile=4, overlap=2)
    np.testing.assert_array_equal(few, ae.encode(x, tile=4, overlap=2)[..., :KEPT])
    whole = ae.decode(_masked(ae.encode(x, tile=4, overlap=2)), tile=4, overlap=2)
    np.testing.assert_array_equal(ae.decode(few, tile=4, overlap=2), whole)


def test_a_cut_autoencoder_gives_the_same(ae):
    """Catches a cut model with the old shapes, or one that forgets its weights."""
    small, x = ae.cut(KEPT), _images(1, 32, 32)
    assert small.latent_channels == KEPT and small.num_parameters < ae.num_parameters
    z = ae.encode(x, channels=KEPT)
    np.testing.assert_allclose(small.encode(x), z, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(small.decode(z), ae.decode(z), atol=1e-5)


def test_a_model_with_a_latent_shortcut_refuses(autoencoder_export):
    """Catches a latent of averages that is cut, and one that is padded without a word."""
    ae = dcae_jax.load_autoencoder(autoencoder_export)
    for call in (lambda: ae.encode(_images(1, 32, 32), channels=KEPT), lambda: ae.cut(KEPT)):
        with pytest.raises(ValueError, match="channels=3 needs a model without a latent shortcut"):
            call()
    with pytest.raises(ValueError, match="z has shape"):
        ae.decode(np.zeros((1, 2, 2, KEPT), np.float32))


@pytest.fixture(scope="module")
def few_latents(cuttable, tmp_path_factory):
    """Latents of KEPT channels: their folder and their images'."""
    folder, images = (str(tmp_path_factory.mktemp(name)) for name in ("few", "images"))
    small_models.write_latents(folder + "/all", cuttable, images)
    config = config_lib.load_file(os.path.join(CONFIGS, "encode.py"))
    config.init_from, config.resolution = cuttable, 32
    config.data.source, config.data.path = "folder", images
    config.encode.batch_size, config.encode.channels = 8, KEPT
    assert run_job(encode, config, folder + "/few") == encode.DONE
    return folder


def test_stored_latents_are_the_first_channels_and_their_statistics(few_latents, cuttable):
    """Catches a manifest of all channels, and statistics of channels that are not stored."""
    few, whole = (latents.latents(f"{few_latents}/{name}") for name in ("few", "all"))
    assert few.manifest["latent_channels"] == KEPT == len(few.manifest["channel_mean"])
    np.testing.assert_allclose(few.manifest["channel_std"], whole.manifest["channel_std"][:KEPT])
    for i in (0, 7):
        np.testing.assert_array_equal(few[i][0], whole[i][0][..., :KEPT])
    assert few.manifest["encoder_checksum"] == whole.manifest["encoder_checksum"]
    values = np.stack([few[i][0] for i in range(len(few))]).astype(np.float64)
    assert few.manifest["rms"] == pytest.approx(np.sqrt((values**2).mean()))
    config = config_lib.load_file(os.path.join(CONFIGS, "encode.py"))
    config.init_from, config.resolution = cuttable, 32
    config.data.source, config.data.path = "folder", few.manifest["source"]["path"]
    config.encode.batch_size = 8
    with pytest.raises(UserError, match="encode.channels was 3, is 0"):
        run_job(encode, config, f"{few_latents}/few")


@pytest.mark.slow
def test_a_diffusion_model_of_few_channels_trains_samples_and_travels(few_latents, tmp_path, alone):
    """Catches a generator that asks for all channels, or decodes few of them as others."""
    config = small_models.diffusion_config(f"{few_latents}/few")
    config.steps, workdir = 2, str(tmp_path / "run")
    assert run_job(train, config, workdir) == train.DONE
    model = dcae_jax.load_generator(workdir)
    z = model.sample_latents([0, 1])
    assert z.shape == (2, 2, 2, KEPT)
    images = model.sample([0, 1])
    decoded = np.asarray(model.autoencoder.decode(z))
    want = np.clip(127.5 * decoded + 128, 0, 255).astype(np.uint8)
    assert np.abs(images.astype(int) - want).max() <= 1
    job = config_lib.load_file(os.path.join(CONFIGS, "export.py"))
    job.init_from, job.export.out = workdir, str(tmp_path / "exported")
    assert run_job(export, job, str(tmp_path / "work")) == 0
    again = dcae_jax.load_generator(job.export.out)
    np.testing.assert_array_equal(again.sample([0, 1]), images)
    job.export.channels, job.export.out = 2, str(tmp_path / "other")
    with pytest.raises(UserError, match="export.channels=2 is for autoencoders"):
        run_job(export, job, str(tmp_path / "work"))


@pytest.mark.parametrize("form", ["orbax", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_an_export_of_few_channels_is_a_model_of_its_own(ae, cuttable, tmp_path, form, alone):
    """Catches an export that says it has few channels and holds all, or the other way round."""
    job = config_lib.load_file(os.path.join(CONFIGS, "export.py"))
    job.init_from, job.export.format, job.export.channels = cuttable, form, KEPT
    job.export.out = str(tmp_path / "cut")
    assert run_job(export, job, str(tmp_path / "work")) == 0
    small, x = dcae_jax.load_autoencoder(job.export.out), _images(1, 32, 32)
    assert small.latent_channels == KEPT
    z = ae.encode(x, channels=KEPT)
    np.testing.assert_allclose(small.encode(x), z, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(small.decode(z), ae.decode(z), atol=1e-5)


def test_scores_by_channels_stand_in_one_table_and_plot(
    cuttable, evaluate_config, tmp_path, alone, caplog
):
    """Catches a cut that is not the model's own, rows under one name, and a plot of another set."""
    caplog.set_level("INFO")
    evaluate_config.init_from, evaluate_config.model.variant = cuttable, ""
    evaluate_config.evaluate.channels = (KEPT, 8)
    assert run_job(evaluate, evaluate_config, str(tmp_path / "cut")) == 0
    by_channels = json.loads((tmp_path / "cut" / "evaluate.json").read_text())["results"]
    assert list(by_channels) == ["32_c3", "32_c8"]
    evaluate_config.evaluate.channels = ()
    assert run_job(evaluate, evaluate_config, str(tmp_path / "all")) == 0
    whole = json.loads((tmp_path / "all" / "evaluate.json").read_text())["results"]["32"]
    assert by_channels["32_c8"]["psnr"] == pytest.approx(whole["psnr"], abs=1e-3)
    export_of_few = str(tmp_path / "export")
    job = config_lib.load_file(os.path.join(CONFIGS, "export.py"))
    job.init_from, job.export.channels, job.export.out = cuttable, KEPT, export_of_few
    run_job(export, job, str(tmp_path / "work"))
    evaluate_config.init_from = export_of_few
    assert run_job(evaluate, evaluate_config, str(tmp_path / "few")) == 0
    few = json.loads((tmp_path / "few" / "evaluate.json").read_text())["results"]["32"]
    assert by_channels["32_c3"]["psnr"] == pytest.approx(few["psnr"], abs=1e-3)
    assert abs(few["psnr"] - whole["psnr"]) > 1e-3
    (row,) = files.read_rows(str(tmp_path / "cut"))
    assert row["psnr_32_c3"] == by_channels["32_c3"]["psnr"]
    assert (tmp_path / "cut" / "images" / "evaluate_channels.png").stat().st_size > 5000
    table = next(r.getMessage() for r in caplog.records if "channels" in r.getMessage())
    assert [line.split()[:2] for line in table.splitlines()[2:4]] == [["32", "3"], ["32", "8"]]
