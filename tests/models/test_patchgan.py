# SPDX-License-Identifier: Apache-2.0
"""PatchGAN against PyTorch's numbers, its published size, and what it starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_gan
from support import phase3_golden

from dcae_jax.config.schema import SHARDING, Loss, Optimizer
from dcae_jax.models import patchgan
from dcae_jax.models import weights as weights_lib
from dcae_jax.training import state as state_lib


def _spec(mesh, channels, depth):
    loss = Loss(gan_channels=channels, gan_layers=depth)
    return state_lib.discriminator_spec(loss, Optimizer(), SHARDING, "float32", mesh)


@pytest.mark.parametrize("channels, depth", make_gan.DEPTHS)
def test_logits_equal_those_of_pytorch(channels, depth, one_device):
    """Catches another slope, eps, padding, stride or grouping, and a widening without end."""
    spec = _spec(one_device, channels, depth)
    weights = phase3_golden.discriminator_weights(1, channels, depth)
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in spec.params.items()}
    x = make_gan.images(1, 64).astype(np.float32) / 127.5 - 1
    found = jax.jit(lambda w, x: weights_lib.merge(spec.graphdef, w)(x))(weights, x)
    want = phase3_golden.golden()["logits"][f"{channels}x{depth}"]
    assert found.shape == want.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


def test_norms_have_the_eps_of_pytorch(one_device):
    """Catches another eps of GroupNorm, which images of ordinary contrast hide."""
    spec = _spec(one_device, 8, 2)
    model = weights_lib.merge(spec.graphdef, phase3_golden.discriminator_weights(1, 8, 2))
    x = 3e-3 * np.random.default_rng(0).normal(size=(2, 4, 4, 16)).astype(np.float32)
    groups = x.reshape(2, 16, 8, 2).astype(np.float64)  # pixels, groups, channels
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    want = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    norm = model.norms[0]
    want = want * np.asarray(norm.scale) + np.asarray(norm.bias)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=1e-5)


def test_patchgan_has_the_published_size_and_patches(one_device):
    """Catches a layer too many or a stride wrong: 70-pixel patches, 2.77 M weights."""
    spec = _spec(one_device, 64, 3)
    sizes = 64 * 48 + 64 + 16 * (64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512)
    assert sum(leaf.size for leaf in spec.params.values()) == sizes + 16 * 512 + 1
    logits = jax.eval_shape(
        lambda w, x: weights_lib.merge(spec.graphdef, w)(x),
        spec.params,
        jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),
    )
    assert logits.shape == (1, 30, 30)
    assert patchgan.smallest_input(3) == 24


def test_a_discriminator_starts_as_published(one_device):
    """Catches weights that start at another scale than normal(0, 0.02), and norms not trivial."""
    config = phase3_golden.config()
    config.loss.gan_channels = 32
    spec = state_lib.train_spec(config, one_device)
    start = state_lib.init_state(config, one_device, spec).discriminator
    for name, value in start.params.items():
        value = np.asarray(value)
        if name.endswith("kernel"):
            assert abs(value.mean()) < 0.02 * 5 / value.size**0.5, name
            assert value.std() == pytest.approx(0.02, rel=5 / value.size**0.5), name
            fourth = np.mean(value**4) / value.std() ** 4  # 3 of a normal one, 1.8 of a uniform one
            assert fourth == pytest.approx(3, rel=0.25), name
        else:
            np.testing.assert_array_equal(value, name.endswith("scale"))


def test_the_discriminator_is_seeded_by_the_run_and_unlike_the_model(one_device):
    """Catches a discriminator drawn from the model's own numbers, or the same one in every run."""
    found = {}
    for seed in (0, 1):
        config = phase3_golden.config()
        config.seed = seed
        spec = state_lib.train_spec(config, one_device)
        found[seed] = np.asarray(
            state_lib.init_state(config, one_device, spec).discriminator.params["convs.0.kernel"]
        )
    assert not np.array_equal(found[0], found[1])
    as_model = patchgan.create(config.loss, dtype="float32", rngs=weights_lib.host_rngs(1))
    assert not np.array_equal(found[1], weights_lib.split(as_model)[1]["convs.0.kernel"])
