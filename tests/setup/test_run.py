# SPDX-License-Identifier: Apache-2.0
"""Where a run starts: what comes with its first weights."""

import dataclasses

import pytest
from support import run_job
from support.published_weights import random_weights, write_export

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib

DECODER = (r"decoder\..*",)


def _export(folder, config, factor):
    """Weights for `config`, with a scaling factor of their own."""
    model = config_lib.validate(config).model
    arch = dataclasses.replace(dcae.architecture(model), scaling_factor=factor)
    write_export(folder, arch, random_weights(arch))
    return str(folder)


def _factor(path):
    _, saved = checkpoint_weights.load_weights(str(path))
    return dcae.architecture(saved.model).scaling_factor


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
        ("published-tiny", 0.0, 0.5, "has the scaling factor 0.3, the weights of .* have 0.5"),
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


@pytest.mark.parametrize("channels, words", [(3, "try 4$"), (10, "try 8 or 12"), (12, "")])
def test_the_discriminators_groups_fit_its_channels(channels, words, small, alone):
    """Catches a traceback of GroupNorm for a width that nobody has been told the rule of."""
    small.loss.gan_weight, small.loss.gan_channels, small.loss.gan_layers = 1.0, channels, 2
    config = config_lib.validate(small)
    mesh = run_lib.mesh_lib.make_mesh(config.mesh)
    if words:
        with pytest.raises(
            UserError, match=f"gan_channels={channels} is no multiple of 4; {words}"
        ):
            resolve.check_training(config, mesh)
    else:
        resolve.check_training(config, mesh)
        run_lib.build(config, "", mesh, None)
