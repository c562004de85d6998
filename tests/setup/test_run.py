# SPDX-License-Identifier: Apache-2.0
"""Where a run starts: its first weights, and what comes with them."""

import dataclasses
import re

import numpy as np
import pytest
from support import on_latents, run_job
from support.published_weights import random_weights, write_export

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib

DECODER = (r"decoder\..*",)


@pytest.fixture
def first_weights(small, one_device):
    """(**keys) -> the weights before step 1, and where they are from."""

    def initialise(**keys):
        small.update(keys)
        run = run_lib.build(config_lib.validate(small), "unused", one_device, None)
        state, origin = run_lib.initialise(run)
        return {**state.params, **state.stats}, origin

    return initialise


def test_a_model_takes_the_parts_that_it_shares_with_another(
    small, first_weights, autoencoder_export, caplog
):
    """Catches parts that fit left random, others not from the seed, a table that hides which."""
    small.model.latent_channels = 16  # of the export: 8
    small.model.encoder_depths = (0, 1, 1, 1, 2)  # ... and a block less in the deepest stage
    random, _ = first_weights()
    parts = (r"encoder.stages.4.0\..*", "decoder.stages.*")
    caplog.set_level("INFO")
    found, origin = first_weights(init_from=autoencoder_export, init_parts=parts)
    theirs, _ = checkpoint_weights.load_weights(autoencoder_export)
    wider = {"encoder.project_out.kernel", "encoder.project_out.bias", "decoder.project_in.kernel"}
    fresh = wider | {path for path in found if path.startswith("encoder.stages.4.1.")}
    assert found.keys() == random.keys() and len(fresh) > 3
    for path, value in found.items():
        np.testing.assert_array_equal(value, (random if path in fresh else theirs)[path], path)
    filled = len(found) - len(fresh)
    assert f"{filled} paths of {len(found)}, random, seed {small.seed}" in origin.weights
    total = f"total {filled} {len(fresh)} 3"
    for line in ("encoder.project_out 0 2 2", "decoder.project_in 1 1 1", total):
        assert re.search(line.replace(" ", " +"), caplog.text), line


def test_a_part_that_is_required_and_does_not_fit_is_refused(
    small, first_weights, autoencoder_export
):
    """Catches weights that stay random in silence, with init_parts and without."""
    small.model.latent_channels = 16
    with pytest.raises(UserError, match=r"1 misshapen \(encoder.project_out.bias is \(8,\)"):
        first_weights(init_from=autoencoder_export, init_parts=("encoder.project_out.bias",))
    with pytest.raises(UserError, match="3 misshapen .*; set model.variant to [a-z ]*$"):
        first_weights(init_parts=())
    with pytest.raises(UserError, match="init_from, which is empty"):
        first_weights(init_from="", init_parts=(".*",))


def _export(folder, config, factor):
    """Weights for `config`, with a scaling factor of their own."""
    model = config_lib.validate(config).model
    arch = dataclasses.replace(dcae.architecture(model), scaling_factor=factor)
    write_export(folder, arch, random_weights(arch))
    return str(folder)


def _factor(path):
    _, saved = checkpoint_weights.load_weights(str(path))
    return dcae.architecture(saved.model).scaling_factor


@pytest.mark.slow
def test_the_factor_goes_with_the_weights_through_runs(small, alone, tmp_path, caplog):
    """Catches latents of a fine-tuned model that are exported with the scaling factor 1, and a run
    that cannot resume because it inherited one."""
    small.init_from, small.trainable = _export(tmp_path / "ae", small, 0.5), DECODER
    small.steps, small.save_every, small.optimizer.schedule = 1, 1, "constant"
    assert run_job(train, small, str(tmp_path / "frozen")) == train.DONE
    assert "scaling factor" not in caplog.text
    small.steps = 2
    assert run_job(train, small, str(tmp_path / "frozen")) == train.DONE
    assert _factor(tmp_path / "frozen") == 0.5
    small.init_from, small.trainable = str(tmp_path / "frozen"), (".*",)
    assert run_job(train, small, str(tmp_path / "trained")) == train.DONE
    assert "the scaling factor 0.5 is kept" in caplog.text
    assert _factor(tmp_path / "trained") == 0.5


@pytest.mark.parametrize(
    "variant, own, theirs, found",
    [
        ("tiny", 0.0, None, None),
        ("tiny", 0.0, 0.5, 0.5),
        ("tiny", 0.7, 0.5, 0.7),
        ("published-tiny", 0.0, 0.5, "has the scaling factor 0.3, but the weights of .* have 0.5"),
        ("published-tiny", 0.0, None, 0.3),
        ("published-tiny", 0.7, 0.5, 0.7),
    ],
)
def test_a_published_name_contradicts_no_weights(
    variant, own, theirs, found, small, alone, tmp_path, monkeypatch
):
    """Catches a factor that replaces that of the weights, and one that the user cannot set."""
    monkeypatch.setitem(dcae.PUBLISHED, "published-tiny", ("tiny", 0.3))
    small.init_from = _export(tmp_path / "ae", small, theirs)
    small.model.variant, small.model.scaling_factor = variant, own
    config = config_lib.validate(small)
    mesh = run_lib.mesh_lib.make_mesh(config.mesh)
    run = run_lib.build(config, str(tmp_path), mesh, None)
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            run_lib.initialise(run)
        return
    _, origin = run_lib.initialise(run)
    run_lib.write_record(run, None, origin)
    saved = checkpoint_weights._run_at(str(tmp_path))
    assert dcae.architecture(saved.model).scaling_factor == found


@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_a_run_does_not_begin_among_weights_of_others(name, small, tmp_path):
    """Catches the config.json of downloaded weights that is replaced by that of a run, and an
    export with a run in it, which is still read as the export."""
    (tmp_path / name).write_text('{"model_name": "dc-ae-f32c32-in-1.0"}')
    with pytest.raises(
        UserError, match=rf"holds weights that are not a run's \({name}\); use anoth"
    ):
        run_lib.find_checkpoint(config_lib.validate(small), str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text('{"config": {}}')  # of a run that has saved nothing yet
    assert run_lib.find_checkpoint(config_lib.validate(small), str(tmp_path)) is None


def test_weights_of_another_network_with_the_same_shapes_are_refused(
    small, first_weights, tmp_path
):
    """Catches weights of a model without shortcuts that train on, as another model, with them."""
    model = config_lib.validate(small).model
    arch = dataclasses.replace(dcae.architecture(model), residual=False)
    write_export(tmp_path / "ae", arch, random_weights(arch))
    keys = {"init_from": str(tmp_path / "ae"), "needs_weights": False}
    with pytest.raises(
        UserError, match="a model with residual=False, but this run's has True; use"
    ):
        first_weights(**keys)
    first_weights(**keys, init_parts=(".*",))


def test_generator_weights_with_other_heads_are_refused(diffusion_config, generator_run, alone):
    """Catches a model that goes on from weights of the same shapes with another number of heads."""
    config, latents = on_latents(diffusion_config)
    config.init_from, config.model.heads = generator_run, 4
    mesh = run_lib.mesh_lib.make_mesh(config_lib.validate(config).mesh)
    run = run_lib.build(config_lib.validate(config), "", mesh, latents)
    with pytest.raises(UserError, match="a model with heads=2, but this run's has 4; use the same"):
        run_lib.initialise(run)


@pytest.mark.parametrize("channels, words", [(3, "try 4$"), (10, "try 8 or 12"), (12, "")])
def test_the_discriminators_groups_fit_its_channels(channels, words, small, alone):
    """Catches a traceback of GroupNorm for a width that is not a multiple of its groups."""
    small.loss.gan_weight, small.loss.gan_channels, small.loss.gan_layers = 1.0, channels, 2
    config = config_lib.validate(small)
    mesh = run_lib.mesh_lib.make_mesh(config.mesh)
    if words:
        with pytest.raises(
            UserError, match=f"gan_channels={channels} is not a multiple of 4; {words}"
        ):
            resolve.check_training(config, mesh)
    else:
        resolve.check_training(config, mesh)
        run_lib.build(config, "", mesh, None)
