# SPDX-License-Identifier: Apache-2.0
"""Diffusion from latents to pictures: training, the Generator, the job `sample`."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, on_latents, run_job, small_models
from support.processes import two_processes

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.diffusion import objectives
from dcae_jax.errors import UserError
from dcae_jax.evaluation import samples
from dcae_jax.jobs import sample, train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib


@pytest.fixture(scope="module")
def one():
    """Within the module, jobs of this process see one device."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(
            mesh_lib, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
        )
        yield


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return small_models.export_autoencoder(str(tmp_path_factory.mktemp("autoencoder")))


@pytest.fixture(scope="module")
def latents(one, autoencoder, tmp_path_factory):
    folder, pictures = (str(tmp_path_factory.mktemp(name)) for name in ("latents", "pictures"))
    return small_models.write_latents(folder, autoencoder, pictures)


@pytest.fixture
def config(latents):
    return small_models.diffusion_config(latents)


@pytest.fixture(scope="module")
def trained(one, latents, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = str(tmp_path_factory.mktemp("trained"))
    assert run_job(train, small_models.diffusion_config(latents), workdir) == train.DONE
    return workdir


def _arrays(workdir, which="raw"):
    return checkpoint_weights.load_weights(workdir, which, kind="generator")[0]


def test_a_run_leaves_rows_samples_and_what_the_latents_fix(trained, latents, autoencoder):
    """Catches a config.json that does not say which latents, scale and autoencoder were learned."""
    rows = files.read_rows(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "mse", "grad_norm", "learning_rate", "images_per_s"} <= rows[0].keys()
    with Image.open(os.path.join(trained, "images", "step0000004_samples.png")) as picture:
        assert picture.size == (2 * 130 - 2, 2 * 130 - 2)
    saved = files.read_json(os.path.join(trained, "config.json"))
    manifest = files.read_json(os.path.join(latents, "manifest.json"))
    model = saved["config"]["model"]
    assert model["scaling_factor"] == manifest["scaling_factor_multiplies_latent"]
    assert (model["latent_size"], model["latent_channels"], model["num_classes"]) == (2, 8, 3)
    assert saved["config"]["autoencoder"] == autoencoder
    assert saved["latents"]["encoder_checksum"] == manifest["encoder_checksum"]


@pytest.mark.parametrize("file", ["uvit", "usit", "dit"])
def test_a_restarted_run_ends_bit_equal(file, one, latents, tmp_path):
    """Catches draws of noise, times or dropped labels that depend on where a run began."""
    config = small_models.diffusion_config(latents, file)
    workdir, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    config.steps, config.optimizer.schedule, config.sample.steps = 4, "constant", 2
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
    name = os.path.join("images", "step0000004_samples.png")
    pictures = [open(os.path.join(folder, name), "rb").read() for folder in (workdir, halves)]
    assert pictures[0] == pictures[1]


def test_latents_are_scaled_once_and_labels_are_dropped_by_their_share(
    config, latents, one_device, monkeypatch
):
    """Catches a factor that is left out, inverted or applied twice, and labels never dropped."""
    seen = {}

    def loss(objective, model, x0, cond, key):
        jax.debug.callback(lambda x: seen.update(x0=np.asarray(x)), x0)
        return jnp.sum(model(x0, jnp.zeros(x0.shape[0]), cond)), {}

    monkeypatch.setattr(objectives, "loss", loss)
    config, source = on_latents(config)
    spec = state_lib.train_spec(config, one_device)
    values = np.stack([source[i][0][0] for i in range(len(source))])
    batch = {"latent": jnp.asarray(values), "label": jnp.zeros(len(values), jnp.int32)}
    step = jax.jit(step_lib.make_step(config, spec))
    jax.block_until_ready(step(state_lib.init_state(config, one_device, spec), batch, {}))
    manifest = source.manifest
    want = values.astype(np.float32) * manifest["scaling_factor_multiplies_latent"]
    np.testing.assert_allclose(seen["x0"], want, rtol=1e-6)
    assert 0.8 < np.sqrt(np.mean(seen["x0"] ** 2)) < 1.2
    kept = step_lib.drop_labels(jnp.arange(4000) % 3, jax.random.key(0), 0.1, 3)
    assert 300 < int((kept == 3).sum()) < 500
    again = step_lib.drop_labels(jnp.arange(2000) % 3, jax.random.key(0), 0.1, 3)
    np.testing.assert_array_equal(again, kept[:2000])


def test_microbatches_see_their_own_latents_and_labels(config, one_device):
    """Catches accumulation that is refused for latents, or splits labels another way."""
    config, source = on_latents(config)
    batch = {
        "latent": jnp.asarray(np.stack([source[i][0][0] for i in range(8)])),
        "label": jnp.arange(8, dtype=jnp.int32) % 3,
    }
    found = {}

    def spy(config, spec, state, batch, key):
        jax.debug.callback(
            lambda x, y: found.setdefault(int(y[0]), np.asarray(x)), batch["latent"], batch["label"]
        )
        return real(config, spec, state, batch, key)

    real, step_lib.denoising_gradients = step_lib.denoising_gradients, spy
    try:
        config.accumulate = 2
        spec = state_lib.train_spec(config, one_device)
        new, metrics = jax.jit(step_lib.make_step(config, spec))(
            state_lib.init_state(config, one_device, spec), batch, {}
        )
        jax.block_until_ready(new.params)
    finally:
        step_lib.denoising_gradients = real
    assert int(metrics["finite"]) == 1
    np.testing.assert_array_equal(found[0], batch["latent"][::2])
    np.testing.assert_array_equal(found[1], batch["latent"][1::2])


# --- what does not fit ----------------------------------------------------------------------------


def test_latents_that_do_not_fit_are_refused(config, latents, one, tmp_path, autoencoder):
    """Catches hours of training on latents of another size, scale or autoencoder."""
    for key, value in {"latent_channels": 32, "latent_size": 4, "scaling_factor": 0.5}.items():
        other = config.copy_and_resolve_references()
        other.model[key] = value
        with pytest.raises(
            UserError, match=f"model.{key}={value} does not fit data.path=.*latents"
        ):
            run_job(train, other, str(tmp_path / "run"))

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 1

    config.autoencoder = small_models.export_autoencoder(str(tmp_path), change)
    with pytest.raises(UserError, match="did not make these latents .* the encoder differs"):
        run_job(train, config, str(tmp_path / "run"))
    config.autoencoder, config.data.source = "", "photos"
    with pytest.raises(UserError, match="data.source='photos'.*run configs/encode.py"):
        run_job(train, config, str(tmp_path / "run"))
    config.data.source, config.patch_size = "latents", 4
    with pytest.raises(UserError, match="patch_size=4 does not divide model.latent_size=2"):
        run_job(train, config, str(tmp_path / "run"))
    config.patch_size, config.mesh.spatial = 1, 2
    with pytest.raises(UserError, match="mesh.spatial=2"):
        resolve.check_training(
            config_lib.validate(config), mesh_lib.make_mesh(config_lib.default().mesh)
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_decoder_trained_further_is_still_the_latents_own(config, one, tmp_path):
    """Catches latents refused after a fine-tuning of the decoder alone, which keeps them valid."""

    def change(weights):
        weights["decoder.project_out.conv.conv.bias"] = (
            weights["decoder.project_out.conv.conv.bias"] + 1
        )

    config.autoencoder = small_models.export_autoencoder(str(tmp_path / "ae"), change)
    config.steps = 1
    assert run_job(train, config, str(tmp_path / "run")) == train.DONE


def test_models_of_the_other_kind_are_refused(trained, autoencoder, config, one, tmp_path):
    """Catches a diffusion model read as an autoencoder, which would miss all of its weights."""
    with pytest.raises(UserError, match="holds a run of the kind generator"):
        dcae_jax.load_autoencoder(trained)
    with pytest.raises(UserError, match="is no generator"):
        dcae_jax.load_generator(autoencoder)
    config.init_from = trained
    config.model.width = 32
    with pytest.raises(UserError, match="misshapen"):
        run_job(train, config, str(tmp_path / "run"))


def test_a_pattern_that_names_one_block_says_so(config, one_device):
    """Catches a block that a user freezes by its number and that trains on."""
    config = on_latents(config)[0]
    config.trainable = (r"in_blocks\.0\..*",)
    with pytest.raises(UserError, match="names one of several blocks.*in_blocks"):
        state_lib.train_spec(config, one_device)


def test_fine_tuning_starts_from_the_averages_and_freezes_the_rest(trained, config, one, tmp_path):
    """Catches init_from that is dropped, and a head-only run that moves the backbone."""
    config.init_from, config.trainable, config.steps = trained, (r"decoder_pred\..*",), 2
    assert run_job(train, config, str(tmp_path / "run")) == train.DONE
    before, after = _arrays(trained, "ema"), _arrays(str(tmp_path / "run"), "raw")
    moved = {name for name in before if np.any(before[name] != after[name])}
    assert moved == {"decoder_pred.kernel", "decoder_pred.bias"}


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_is_that_of_its_number(trained, one):
    """Catches samples that depend on the batch, and labels or guidance that nothing hears."""
    model = dcae_jax.load_generator(trained)
    labels = np.array([0, 1, 2, 0])
    images = model.sample(labels, guidance=2.0, steps=4, seed=3)
    assert images.dtype == np.uint8 and images.shape == (4, 32, 32, 3)
    again = model.sample(labels[2:], guidance=2.0, steps=4, seed=3, first=2)
    np.testing.assert_array_equal(again, images[2:])
    for other in (
        model.sample(np.array([1, 2, 0, 1]), guidance=2.0, steps=4, seed=3),
        model.sample(labels, guidance=4.0, steps=4, seed=3),
        model.sample(labels, guidance=2.0, steps=4, seed=4),
    ):
        assert np.any(other != images)


def test_samples_are_decoded_from_unscaled_latents(trained, one, monkeypatch):
    """Catches a scaling factor that is left out on the way back, or applied the wrong way."""
    from dcae_jax.api import generator as api
    from dcae_jax.diffusion import samplers as sampling

    model = dcae_jax.load_generator(trained)
    z = np.random.default_rng(0).standard_normal((3, 2, 2, 8)).astype(np.float32)
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: jnp.asarray(z))
    api._sample_fn.cache_clear()
    images = model.sample([0, 1, 2], steps=1)
    api._sample_fn.cache_clear()
    decoded = np.asarray(model.autoencoder.decode(z / model.scaling_factor))
    want = np.clip(127.5 * decoded + 128, 0, 255).astype(np.uint8)  # truncated
    assert np.mean(images != want) < 1e-3 and np.abs(images.astype(int) - want).max() <= 1


def test_samples_on_eight_devices_are_those_of_one(trained, one):
    """Catches noise or labels that follow the layout of the mesh."""
    labels = np.arange(11) % 3
    on_one = dcae_jax.load_generator(trained).sample(labels, guidance=1.5, steps=4)
    eight = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2, 1, 1), mesh_lib.AXES)
    on_eight = dcae_jax.load_generator(trained, mesh=eight).sample(labels, guidance=1.5, steps=4)
    assert np.mean(on_one != on_eight) <= 1e-3
    assert np.abs(on_one.astype(int) - on_eight.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": [0, 4]}, "labels=4 is no class; there are 0 to 2, and 3 for none"),
        ({"labels": [-1]}, "labels=-1"),
        ({"labels": [0.5]}, "labels must be whole numbers"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"sampler": "euler"}, "sampler='euler' does not fit"),
        ({"interval": (0.5, 0.2)}, "interval="),
    ],
)
def test_wrong_arguments_are_named(trained, one, change, words):
    """Catches a label past the table, which JAX clamps, and a picture made of NaN."""
    model = dcae_jax.load_generator(trained)
    with pytest.raises(ValueError, match=re.escape(words)):
        model.sample(**{"labels": [0], "steps": 2, **change})


def _sample_config(trained, **changes):
    config = config_lib.load_file(os.path.join(CONFIGS, "sample.py"))
    config.init_from = trained
    config.sample.update({"count": 7, "steps": 2, "batch_size": 3, "format": "npz", **changes})
    return config


def test_the_job_writes_what_suites_read_and_goes_on_where_it_stopped(
    trained, one, tmp_path, monkeypatch
):
    """Catches samples made twice or lost after a stop, and an .npz that no suite can read."""
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert run_job(sample, _sample_config(trained), whole) == 0
    with np.load(os.path.join(whole, "samples.npz")) as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (7, 32, 32, 3)
    model = dcae_jax.load_generator(trained)
    np.testing.assert_array_equal(model.sample(labels[:3], steps=2), images[:3])
    assert len(samples.image_source(os.path.join(whole, "samples.npz"), "key")) == 7

    real, calls = sample.pictures, []

    def fails_once(config, model, numbers):
        calls.append(numbers[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config, model, numbers)

    monkeypatch.setattr(sample, "pictures", fails_once)
    with pytest.raises(KeyboardInterrupt):
        run_job(sample, _sample_config(trained), stopped)
    assert run_job(sample, _sample_config(trained), stopped) == 0
    assert calls == [0, 3, 3, 6]
    left, right = (open(os.path.join(f, "samples.npz"), "rb").read() for f in (whole, stopped))
    with np.load(os.path.join(stopped, "samples.npz")) as found:
        np.testing.assert_array_equal(found["arr_0"], images)
    assert left == right and not os.path.exists(os.path.join(stopped, "parts"))
    with pytest.raises(UserError, match="holds other samples: sample differ"):
        run_job(sample, _sample_config(trained, guidance=3.0), stopped)
    with pytest.raises(UserError, match="holds other samples: seed differ"):
        other = _sample_config(trained)
        other.seed = 5
        run_job(sample, other, stopped)


def test_two_processes_sample_what_one_samples(trained, one, tmp_path):
    """Catches samples that each process makes for itself, or parts that one of them lacks."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    changes = {"count": 6, "batch_size": 4}
    assert run_job(sample, _sample_config(trained, **changes), alone) == 0
    script = """
from dcae_jax.jobs import sample
from support import run_job
config = config_lib.load_file(f"{CONFIGS}/sample.py")
config.init_from = settings["trained"]
config.sample.update(settings["sample"])
print(json.dumps(run_job(sample, config, settings["workdir"])))
"""
    given = {"sample": {"steps": 2, "format": "npz", **changes}, "trained": trained}
    assert two_processes(script, given | {"workdir": together}) == [0, 0]
    left, right = (np.load(os.path.join(f, "samples.npz"))["arr_0"] for f in (alone, together))
    assert left.shape == right.shape and np.mean(left != right) <= 1e-3
    assert np.abs(left.astype(int) - right).max() <= 1


def test_files_and_grids(trained, one, tmp_path):
    """Catches pictures under wrong numbers, and labels that are lost."""
    folder = str(tmp_path / "files")
    assert (
        run_job(sample, _sample_config(trained, format="png", labels=(2, 0), count=3), folder) == 0
    )
    assert sorted(os.listdir(os.path.join(folder, "images"))) == [f"{i:06d}.png" for i in range(3)]
    with open(os.path.join(folder, "labels.json")) as file:
        assert json.load(file) == {"000000.png": 2, "000001.png": 0, "000002.png": 2}
    want = dcae_jax.load_generator(trained).sample([2, 0, 2], steps=2)
    with Image.open(os.path.join(folder, "images", "000001.png")) as picture:
        np.testing.assert_array_equal(np.asarray(picture), want[1])
    folder = str(tmp_path / "grid")
    assert run_job(sample, _sample_config(trained, format="grid", count=5), folder) == 0
    with Image.open(os.path.join(folder, "samples.png")) as picture:
        assert picture.size == (3 * 130 - 2, 2 * 130 - 2)


def test_a_checkpoint_of_other_latents_is_refused(trained, autoencoder, one, tmp_path):
    """Catches a diffusion model sampled through an autoencoder that it was not trained on."""
    moved = str(tmp_path / "moved")
    shutil.copytree(trained, moved)

    def change(weights):
        weights["encoder.project_out.bias"] = weights["encoder.project_out.bias"] + 1

    other = small_models.export_autoencoder(str(tmp_path / "other"), change)
    with pytest.raises(UserError, match="did not make these latents"):
        dcae_jax.load_generator(moved, autoencoder=other)
    assert dcae_jax.load_generator(moved, autoencoder=autoencoder).num_classes == 3
