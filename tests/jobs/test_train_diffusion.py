# SPDX-License-Identifier: Apache-2.0
"""The job `train` on latents: what it records, how it resumes, and what it refuses."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support import run_job, small_models
from support.processes import JOINED, two_processes

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve

AUGMENT = {"channels": (2, 4, 6), "count": 2, "always_full": True}


def _arrays(workdir, which="raw"):
    return checkpoint_weights.load_weights(workdir, which, kind="generator")[0]


def test_a_run_leaves_rows_samples_and_what_the_latents_fix(
    generator_run, latents_folder, autoencoder_export
):
    """Catches a config.json that does not say which latents, scale and autoencoder were learned."""
    rows = files.read_rows(generator_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "mse", "grad_norm", "learning_rate", "images_per_s"} <= rows[0].keys()
    with Image.open(os.path.join(generator_run, "images", "step0000004_samples.png")) as image:
        assert image.size == (2 * 130 - 2, 2 * 130 - 2)
    saved = files.read_json(os.path.join(generator_run, "config.json"))
    manifest = files.read_json(os.path.join(latents_folder, "manifest.json"))
    model = saved["config"]["model"]
    assert model["scaling_factor"] == manifest["scaling_factor_multiplies_latent"]
    assert (model["latent_size"], model["latent_channels"], model["num_classes"]) == (2, 8, 3)
    assert saved["config"]["autoencoder"] == autoencoder_export
    assert saved["latents"]["encoder_checksum"] == manifest["encoder_checksum"]


@pytest.mark.parametrize(
    "file",
    [
        "uvit",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("usit", "dit", "meanflow", "augment")),
    ],
)
def test_a_restarted_run_ends_bit_equal(file, alone, latents_folder, tmp_path):
    """Catches draws (noise, times, labels, channels) that depend on where a run began."""
    config = small_models.diffusion_config(latents_folder, "dit" if file == "augment" else file)
    if file == "augment":
        config.augment.update(AUGMENT)
    workdir, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    config.steps, config.sample.steps = 4, 2
    run_job(train, config, workdir)
    config.steps = 2
    run_job(train, config, halves)
    config.steps = 4
    run_job(train, config, halves)
    for which in ("raw", "ema"):
        before, after = _arrays(workdir, which), _arrays(halves, which)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
    timed = re.compile(r".*_(s|per_s)$")
    for left, right in zip(files.read_rows(workdir), files.read_rows(halves), strict=True):
        assert {k: v for k, v in left.items() if not timed.match(k)} == {
            k: v for k, v in right.items() if not timed.match(k)
        }
    grid = "samples_1" if file == "meanflow" else "samples"
    name = os.path.join("images", f"step0000004_{grid}.png")
    images = [open(os.path.join(folder, name), "rb").read() for folder in (workdir, halves)]
    assert images[0] == images[1]


TRAINING = """
sys.argv = sys.argv[:1]
from support import run_job, small_models
from dcae_jax.jobs import train
config = small_models.diffusion_config(settings["latents"], "uvit")
config.augment.update(eval(settings["augment"]))
config.steps = 2
print(json.dumps(run_job(train, config, settings["workdir"])))
"""


@pytest.mark.slow
def test_two_processes_augment_as_one(diffusion_config, latents_folder, alone, tmp_path):
    """Catches numbers of channels, noise or labels that each process draws for itself."""
    whole, together = str(tmp_path / "whole"), str(tmp_path / "together")
    diffusion_config.augment.update(AUGMENT)
    diffusion_config.steps = 2
    assert run_job(train, diffusion_config, whole) == train.DONE
    given = {"latents": latents_folder, "augment": repr(AUGMENT), "workdir": together}
    assert two_processes(TRAINING, given, JOINED) == [0, 0]
    for ours, want in zip(files.read_rows(together), files.read_rows(whole), strict=True):
        for key in ("loss", "mse", "channels", "grad_norm"):
            np.testing.assert_allclose(ours[key], want[key], rtol=1e-4, err_msg=key)


def test_latents_that_do_not_fit_are_refused(
    diffusion_config, latents_folder, alone, tmp_path, autoencoder_export
):
    """Catches hours of training on latents of another size, scale or autoencoder."""
    for key, value in {"latent_channels": 32, "latent_size": 4, "scaling_factor": 0.5}.items():
        other = diffusion_config.copy_and_resolve_references()
        other.model[key] = value
        with pytest.raises(
            UserError, match=f"model.{key}={value} does not fit data.path=.*latents"
        ):
            run_job(train, other, str(tmp_path / "run"))

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 1

    diffusion_config.autoencoder = small_models.export_autoencoder(str(tmp_path), change)
    with pytest.raises(UserError, match="did not make these latents .* the encoder differs"):
        run_job(train, diffusion_config, str(tmp_path / "run"))
    diffusion_config.autoencoder, diffusion_config.data.source = "", "photos"
    with pytest.raises(UserError, match="data.source='photos'.*run configs/encode.py"):
        run_job(train, diffusion_config, str(tmp_path / "run"))
    diffusion_config.data.source, diffusion_config.patch_size = "latents", 4
    with pytest.raises(UserError, match="patch_size=4 does not divide model.latent_size=2"):
        run_job(train, diffusion_config, str(tmp_path / "run"))
    diffusion_config.patch_size, diffusion_config.mesh.spatial = 1, 2
    with pytest.raises(UserError, match="mesh.spatial=2"):
        resolve.check_training(
            config_lib.validate(diffusion_config), mesh_lib.make_mesh(config_lib.default().mesh)
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_decoder_trained_further_is_still_the_latents_own(diffusion_config, alone, tmp_path):
    """Catches latents refused after a fine-tuning of the decoder alone, which keeps them valid."""

    def change(weights):
        weights["decoder.project_out.conv.conv.bias"] = (
            weights["decoder.project_out.conv.conv.bias"] + 1
        )

    diffusion_config.autoencoder = small_models.export_autoencoder(str(tmp_path / "ae"), change)
    diffusion_config.steps = 1
    assert run_job(train, diffusion_config, str(tmp_path / "run")) == train.DONE


def test_models_of_the_other_kind_are_refused(
    generator_run, autoencoder_export, diffusion_config, alone, tmp_path
):
    """Catches a diffusion model read as an autoencoder, which would miss all of its weights."""
    with pytest.raises(UserError, match="is a run of kind 'generator'"):
        dcae_jax.load_autoencoder(generator_run)
    with pytest.raises(UserError, match="give one with kind='generator'"):
        dcae_jax.load_generator(autoencoder_export)
    diffusion_config.init_from = generator_run
    diffusion_config.model.width = 32
    with pytest.raises(UserError, match="misshapen"):
        run_job(train, diffusion_config, str(tmp_path / "run"))


def test_fine_tuning_starts_from_the_averages_and_freezes_the_rest(
    generator_run, diffusion_config, alone, tmp_path
):
    """Catches init_from that is dropped, and a head-only run that moves the backbone."""
    diffusion_config.init_from, diffusion_config.steps = generator_run, 2
    diffusion_config.trainable = (r"decoder_pred\..*",)
    assert run_job(train, diffusion_config, str(tmp_path / "run")) == train.DONE
    before, after = _arrays(generator_run, "ema"), _arrays(str(tmp_path / "run"), "raw")
    moved = {name for name in before if np.any(before[name] != after[name])}
    assert moved == {"decoder_pred.kernel", "decoder_pred.bias"}


def test_latents_of_another_encoder_under_the_same_path_are_told(
    diffusion_config, latents_folder, alone, tmp_path
):
    """Catches a run that goes on with latents that its first half never saw."""
    workdir, latents = str(tmp_path / "run"), tmp_path / "latents"
    shutil.copytree(latents_folder, latents)
    diffusion_config.data.path, diffusion_config.steps = str(latents), 2
    assert run_job(train, diffusion_config, workdir) == train.DONE
    factor = files.read_json(str(latents / "manifest.json"))["scaling_factor_multiplies_latent"]

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 0.1

    other = small_models.export_autoencoder(str(tmp_path / "ae"), change, scaling_factor=factor)
    shutil.rmtree(latents)
    small_models.write_latents(str(latents), other, str(tmp_path / "images"))
    diffusion_config.steps = 4
    with pytest.raises(UserError, match="data.encoder was 'weights .*data.content was '12 crops"):
        run_job(train, diffusion_config, workdir)
    diffusion_config.allow_change = ("data",)
    assert run_job(train, diffusion_config, workdir) == train.DONE


@pytest.mark.slow
def test_latents_of_raw_weights_are_trained_on_and_sampled(small, alone, tmp_path):
    """Catches the averaged encoder looked for where the latents were made by the raw one."""
    small.steps, small.ema_decay = 2, 0.9
    autoencoder, latents = str(tmp_path / "ae"), str(tmp_path / "latents")
    assert run_job(train, small, autoencoder) == train.DONE
    small_models.write_latents(latents, autoencoder, str(tmp_path / "images"), weights="raw")
    config = small_models.diffusion_config(latents)
    config.steps = 1
    assert run_job(train, config, str(tmp_path / "run")) == train.DONE
    model = dcae_jax.load_generator(str(tmp_path / "run"))
    raw = checkpoint_weights.load_weights(autoencoder, "raw")[0]
    for name, value in model.autoencoder.weights.items():
        np.testing.assert_array_equal(value, raw[name])
