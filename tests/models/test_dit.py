# SPDX-License-Identifier: Apache-2.0
"""DiT: sizes, costs, positions and initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from support.transformer_costs import dit_macs, num_parameters

from dcae_jax.errors import UserError
from dcae_jax.models import dit
from dcae_jax.models import weights as weights_lib


def architecture(variant, learn_sigma=True, patch_size=1, **changes):
    sizes = dict(depth=0, width=0, heads=0, latent_size=4, latent_channels=8, num_classes=10)
    config = ConfigDict(dict(variant=variant, **sizes) | changes)
    return dit.architecture(config, patch_size=patch_size, learn_sigma=learn_sigma)


def weights_of(arch):
    return weights_lib.split(dit.create(arch, dtype="float32", rngs=nnx.Rngs(0)))


def test_parameters_and_cost_of_xl_are_the_published_ones():
    """Catches a positions table that is counted, a bias left out, a modulation per token."""
    arch = architecture("xl", latent_size=16, latent_channels=32, num_classes=1000)
    assert round(num_parameters(dit, arch) / 1e6, 2) == 674.89
    # The published count also has one operation for each value of a softmax and of a LayerNorm.
    assert abs(dit_macs(arch) / 118.68e9 - 1) < 1e-3
    create = functools.partial(dit.create, arch, dtype="float32", unroll=True)
    graph, params, _ = weights_lib.split(weights_lib.abstract(lambda rngs: create(rngs=rngs)))
    program = jax.jit(lambda params, *inputs: weights_lib.merge(graph, params)(*inputs)).lower(
        params,
        jax.ShapeDtypeStruct((1, 16, 16, 32), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert 0.97 <= program.cost_analysis()["flops"] / (2 * 118.68e9) <= 1.05


# arXiv:2212.09748, millions of the models with patches of 2, at 256 pixels on f8c4 latents.
@pytest.mark.parametrize("variant,millions", [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_sizes_have_about_the_parameters_of_the_paper(variant, millions):
    """Catches a depth or a width of another row."""
    arch = architecture(variant, patch_size=2, latent_size=32, latent_channels=4, num_classes=1000)
    assert abs(num_parameters(dit, arch) / 1e6 - millions) < 1


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(variant="2b"), ("'2b'", "tiny, s, b, l, xl")),
        (dict(width=6, heads=3), ("width=6", "multiple of 4")),
        (dict(width=100, heads=3), ("width=100", "heads=3")),
        (dict(patch_size=3), ("patch_size=3", "latent_size=4")),
    ],
)
def test_sizes_that_do_not_fit_are_told_in_a_line(changes, words):
    """Catches a size that is rounded silently, or fails later inside a reshape."""
    with pytest.raises(UserError) as caught:
        architecture(**{"variant": "tiny", **changes})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_positions_name_the_column_before_the_row():
    """Catches a transposed picture, which no test on square symmetric inputs would show."""
    table = dit.positions(3, 8).reshape(3, 3, 8)
    np.testing.assert_array_equal(table[0, 2, :4], table[1, 2, :4])
    np.testing.assert_array_equal(table[2, 0, 4:], table[2, 1, 4:])
    angles = np.array([2.0, 2.0 / 100])
    want = np.concatenate([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(table[1, 2, :4], want, rtol=1e-6)
    np.testing.assert_allclose(table[2, 1, 4:], want, rtol=1e-6)


def test_initial_values():
    """Catches blocks that do not begin as the identity, or a bound taken from one side alone."""
    arch = architecture("tiny", learn_sigma=False, num_classes=100)
    params = {k: np.asarray(v) for k, v in weights_of(arch)[1].items()}
    assert sum(value.size for value in params.values()) == num_parameters(dit, arch)
    for name, value in params.items():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert (value == 0).all(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(value.std() - 0.02) < 0.001, name
        else:
            inputs, outputs = value.shape[-2:]
            assert abs(np.abs(value).max() / (6 / (inputs + outputs)) ** 0.5 - 1) < 0.02, name


def test_a_fresh_model_predicts_zero():
    """Catches a gate or a last layer that does not start at zero."""
    graph, params, _ = weights_of(architecture("tiny", depth=2))
    y = weights_lib.merge(graph, params)(
        np.ones((2, 4, 4, 8), np.float32), np.ones(2, np.float32), np.array([0, 10], np.int32)
    )
    assert y.shape == (2, 4, 4, 16) and (np.asarray(y) == 0).all()
