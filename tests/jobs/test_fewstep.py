# SPDX-License-Identifier: Apache-2.0
"""The job `train` on average velocities: where it starts, what it leaves, what it refuses."""

import os

import jax
import numpy as np
import pytest
from support import run_job, small_models
from support.processes import JOINED, two_processes

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api.generator import Generator, SampleSettings
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib


@pytest.fixture(scope="module")
def flow_run(latents_folder, tmp_path_factory):
    """The workdir of a USiT that was trained for one step."""
    workdir = str(tmp_path_factory.mktemp("flow"))
    config = small_models.diffusion_config(latents_folder, "usit")
    config.steps, config.sample.steps, config.mesh.data = 1, 2, 1
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(mesh_lib, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        assert run_job(train, config, workdir) == train.DONE
    return workdir


@pytest.fixture
def config(latents_folder, flow_run):
    """A fine-tune of it."""
    config = small_models.diffusion_config(latents_folder, "fewstep")
    config.init_from, config.steps = flow_run, 2
    return config


def test_a_fine_tune_starts_as_its_flow_model(config, flow_run, one_device, alone, tmp_path):
    """Catches an average velocity of a fresh fine-tune that is not its flow model's velocity."""
    ready, latents = resolve.training(config_lib.validate(config), one_device)
    run = run_lib.build(ready, str(tmp_path / "run"), one_device, latents)
    state, origin = run_lib.initialise(run)
    assert "random" in origin.weights
    flow = dcae_jax.load_generator(flow_run)
    few = Generator(
        run.spec.graphdef,
        state_lib.averaged(state),
        state_lib.architecture(ready.model, ready),
        ready.model,
        "meanflow",
        flow.autoencoder,
    )
    for steps in (1, 2):
        want = flow.sample_latents([0, 1, 2], SampleSettings(steps=steps, sampler="euler"))
        for sampler in ("jumps", "euler"):
            ours = few.sample_latents([0, 1, 2], SampleSettings(steps=steps, sampler=sampler))
            np.testing.assert_array_equal(ours, want)


@pytest.mark.slow
def test_a_run_leaves_grids_and_an_export_that_samples(config, run_export, alone, tmp_path):
    """Catches a grid of another number of jumps, an evaluation that is owed forever, guidance
    that is added to what is folded in, and an export that loses the interval's embedding."""
    workdir = str(tmp_path / "run")
    assert run_job(train, config, workdir) == train.DONE
    for jumps in (1, 2, 4):
        assert os.path.exists(os.path.join(workdir, f"images/step0000002_samples_{jumps}.png"))
    assert {"loss", "mse", "jump_mse"} <= files.read_rows(workdir)[0].keys()
    assert run_job(train, config, workdir) == train.DONE  # nothing left to do
    model = dcae_jax.load_generator(workdir)
    images = model.sample([0, 1, 2], steps=1)
    assert np.any(images != model.sample([0, 1, 2], steps=2))
    with pytest.raises(ValueError, match="guidance=1.5.*meanflow.guidance") as refused:
        model.sample([0], guidance=1.5, steps=1)
    assert "\n" not in str(refused.value)
    status, said, out = run_export(workdir, "orbax")
    assert status == 0, said
    np.testing.assert_array_equal(dcae_jax.load_generator(out).sample([0, 1, 2], steps=1), images)
    status, said, _ = run_export(workdir, "authors", out="b")
    assert status == 2 and "cannot express objective='meanflow' of uvit" in said


def test_what_cannot_be_fine_tuned_is_refused(config, generator_run, alone, tmp_path):
    """Catches noise predictions taken for velocities, and no weights to start from."""
    config.init_from = generator_run
    with pytest.raises(UserError, match="objective='epsilon'.*train one with configs/usit.py"):
        run_job(train, config, str(tmp_path / "run"))
    config.init_from, config.init_parts = "", ()
    with pytest.raises(UserError, match="run configs/usit.py first"):
        run_job(train, config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sample.guidance": 4.0}, "sample.guidance=4.0.*set meanflow.guidance"),
        ({"meanflow.equal": 0.9, "meanflow.to_data": 0.2}, "exceed 1 together"),
        ({"meanflow.equal": 0.75, "accumulate": 8}, "splits 1 examples.*into 1 and 0"),
        ({"meanflow.equal": 0.0}, "meanflow.balance=True needs rows with r = t"),
        ({"meanflow.guidance_interval": (0.8, 0.2)}, "meanflow.guidance_interval="),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, changes, words):
    """Catches a batch that never has a jump, guidance applied twice, and a mean of no rows."""
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        config_lib.validate(config)


TRAINING = """
sys.argv = sys.argv[:1]
from support import run_job, small_models
from dcae_jax.jobs import train
config = small_models.diffusion_config(settings["latents"], "fewstep")
config.init_from, config.steps = settings["init_from"], 2
print(json.dumps(run_job(train, config, settings["workdir"])))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(config, flow_run, latents_folder, alone, tmp_path):
    """Catches rows with r = t that are split by process, so that each has its own share."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    assert run_job(train, config, alone) == train.DONE
    given = {"latents": latents_folder, "init_from": flow_run, "workdir": together}
    assert two_processes(TRAINING, given, JOINED) == [0, 0]
    for ours, want in zip(files.read_rows(together), files.read_rows(alone), strict=True):
        for key in ("loss", "mse", "jump_mse", "grad_norm"):
            np.testing.assert_allclose(ours[key], want[key], rtol=1e-4, err_msg=key)
    before, after = (
        checkpoint_weights.load_weights(folder, "raw", kind="generator")[0]
        for folder in (alone, together)
    )
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("derivative, steps", [("jvp", 2000), ("difference", 500)])
def test_bfloat16_trains_for_thousands_of_steps(derivative, steps, config, alone, tmp_path):
    """Catches a derivative that half precision blows up: no step is skipped, the loss falls."""
    config.dtype, config.steps, config.save_every, config.log_every = "bfloat16", steps, steps, 100
    config.meanflow.derivative = derivative
    workdir = str(tmp_path / "run")
    assert run_job(train, config, workdir) == train.DONE
    rows = files.read_rows(workdir)
    assert rows[-1]["skipped"] == 0 and all(np.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["mse"] < rows[0]["mse"] and rows[-1]["jump_mse"] < 3 * rows[0]["jump_mse"]


@pytest.mark.slow
def test_dit_trains_from_nothing(latents_folder, alone, tmp_path):
    """Catches an interval that a DiT never embeds: its embedding must move."""
    config = small_models.diffusion_config(latents_folder, "meanflow")
    config.model.name, config.steps = "dit", 4
    workdir = str(tmp_path / "run")
    assert run_job(train, config, workdir) == train.DONE
    raw = checkpoint_weights.load_weights(workdir, "raw", kind="generator")[0]
    assert np.abs(raw["h_embedder.fc2.kernel"]).max() > 0
