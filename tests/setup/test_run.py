# SPDX-License-Identifier: Apache-2.0
"""Where a run's first weights come from."""

import re

import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.setup import run as run_lib


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
    assert f"{filled} paths of {len(found)}, random, seed {small.seed}" in origin
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
