# SPDX-License-Identifier: Apache-2.0
"""UViT: sizes, costs and initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from support.transformer_costs import num_parameters, uvit_macs

from dcae_jax.errors import UserError
from dcae_jax.models import uvit
from dcae_jax.models import weights as weights_lib


def settings(variant, **changes):
    """What config.model says of a transformer."""
    sizes = dict(depth=0, width=0, heads=0, latent_size=4, latent_channels=8, num_classes=10)
    return ConfigDict(dict(variant=variant, **sizes) | changes)


def architecture(variant, learn_sigma=False, patch_size=1, **changes):
    return uvit.architecture(
        settings(variant, **changes), patch_size=patch_size, learn_sigma=learn_sigma
    )


# Of DC-AE's table for 512 pixels: variant, positions a side, channels, parameters (M), MACs (G).
PUBLISHED = [
    ("s", 16, 32, 44.79, 12.27),
    ("h", 16, 32, 500.87, 133.25),
    ("h", 8, 128, 500.87, 33.25),
    ("2b", 16, 32, 1580.40, 414.91),
    ("2b", 8, 128, 1580.40, 104.65),
]


@pytest.mark.parametrize("variant,side,channels,millions,giga", PUBLISHED)
def test_parameters_and_cost_are_the_published_ones(variant, side, channels, millions, giga):
    """Catches a block, a bias or a skip too many, attention's products left out, tokens lost."""
    arch = architecture(variant, latent_size=side, latent_channels=channels, num_classes=1000)
    assert round(num_parameters(uvit, arch) / 1e6, 2) == millions
    # The table counts also one operation for each value of a softmax and of a LayerNorm.
    assert abs(uvit_macs(arch) / (giga * 1e9) - 1) < 1.2e-3
    create = functools.partial(uvit.create, arch, dtype="float32", unroll=True)
    graph, params, _ = weights_lib.split(weights_lib.abstract(lambda rngs: create(rngs=rngs)))
    program = jax.jit(lambda params, *inputs: weights_lib.merge(graph, params)(*inputs)).lower(
        params,
        jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert 0.97 <= program.cost_analysis()["flops"] / (2 * giga * 1e9) <= 1.05


def test_tokens_are_label_time_and_patches():
    """Catches a sequence without the two extra tokens, or with patches of the wrong size."""
    assert uvit.tokens(architecture("tiny", latent_size=8, patch_size=2)) == 2 + 16


def test_sizes_beside_the_variant_replace_its_own():
    """Catches a key that is read and dropped; zeros keep the variant's."""
    arch = architecture("s", depth=6, width=96, heads=3, learn_sigma=True)
    assert (arch.depth, arch.width, arch.heads, arch.out_channels) == (6, 96, 3, 16)
    arch = architecture("h")
    assert (arch.depth, arch.width, arch.heads, arch.out_channels) == (28, 1152, 16, 8)


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(variant="xl"), ("'xl'", "tiny, s, h, 2b")),
        (dict(depth=5), ("depth=5", "even")),
        (dict(width=100, heads=3), ("width=100", "heads=3")),
        (dict(width=27, heads=3), ("width=27", "even")),
        (dict(patch_size=3), ("patch_size=3", "latent_size=4")),
        (dict(latent_size=0), ("latent_size=0",)),
        (dict(num_classes=-1), ("num_classes=-1",)),
    ],
)
def test_sizes_that_do_not_fit_are_told_in_a_line(changes, words):
    """Catches a size that is rounded silently, or fails later inside a reshape."""
    with pytest.raises(UserError) as caught:
        architecture(**{"variant": "tiny", **changes})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_initial_values():
    """Catches PyTorch's defaults left in the Linears, or the label table shrunk to 0.02."""
    arch = architecture("tiny", latent_channels=32, num_classes=100)
    model = uvit.create(arch, dtype="float32", rngs=nnx.Rngs(0))
    params = {name: np.asarray(value) for name, value in weights_lib.split(model)[1].items()}
    assert sum(value.size for value in params.values()) == num_parameters(uvit, arch)
    for name, value in params.items():
        if name == "label_emb.embedding":
            assert abs(value.std() - 1) < 0.02
        elif name.startswith("patch_embed"):
            assert 0.95 * 32**-0.5 < np.abs(value).max() <= 32**-0.5
        elif name.endswith("kernel") or name == "pos_embed":
            assert abs(value.std() - 0.02) < 0.001, name
        elif name.endswith("scale"):
            assert (value == 1).all(), name
        else:
            assert name.endswith("bias") and (value == 0).all(), name


def test_time_and_label_are_heard():
    """Catches a token that is built and then dropped: each must change the prediction."""
    arch = architecture("tiny", depth=2)
    model = uvit.create(arch, dtype="float32", rngs=nnx.Rngs(0))
    x = np.ones((4, 4, 4, 8), np.float32)
    t = np.array([1.0, 1.0, 1.0, 2.0], np.float32)
    labels = np.array([0, 0, 10, 0], np.int32)
    y = np.asarray(model(x, t, labels))
    np.testing.assert_allclose(y[0], y[1], atol=1e-6)
    assert np.abs(y[0] - y[2]).max() > 1e-4 and np.abs(y[0] - y[3]).max() > 1e-4
