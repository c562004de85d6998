# SPDX-License-Identifier: Apache-2.0
"""UViT and DiT as networks of average velocities: the embedding of the interval."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcae_jax.config.schema import MeanFlow
from dcae_jax.diffusion import meanflow
from dcae_jax.models import dit, uvit
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.transformer import Architecture

PLAIN = Architecture(
    depth=2, width=32, heads=2, latent_size=3, latent_channels=5, out_channels=5, patch_size=1,
    num_classes=4,
)  # fmt: skip
AVERAGE = dataclasses.replace(PLAIN, average=True)
MODULES = pytest.mark.parametrize("module", [uvit, dit], ids=["uvit", "dit"])


def created(module, arch, **form):
    """(graphdef, weights) of a model whose zeros are random, but for the interval's embedding."""
    model = module.create(arch, dtype="float32", rngs=nnx.Rngs(0), **form)
    graph, weights, _ = weights_lib.split(model)
    rng = np.random.default_rng(0)
    for name in sorted(weights):
        if not name.startswith("h_embedder"):
            noise = rng.normal(size=weights[name].shape).astype(np.float32)
            weights[name] = weights[name] + 0.1 * noise
    return graph, weights


def inputs(count=4):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(count, 3, 3, 5)), jnp.float32)
    t = jnp.asarray(rng.uniform(size=count), jnp.float32)
    return x, t, jnp.arange(count) % 5


@MODULES
def test_a_fresh_embedding_leaves_the_flow_model_as_it_is(module):
    """Catches a second embedding that does not start at zero, by which a fine-tune would begin as
    another model, and one that nothing hears once it is trained."""
    x, t, labels = inputs()
    graph, weights = created(module, PLAIN)
    want = jax.jit(lambda w: weights_lib.merge(graph, w)(x, t, labels))(weights)
    more, fresh = created(module, AVERAGE)
    new = {name: value for name, value in fresh.items() if name.startswith("h_embedder")}
    assert set(fresh) - set(weights) == set(new) and len(new) == 4

    @jax.jit
    def run(w, h):
        return weights_lib.merge(more, w)(x, t, labels, h)

    joined = {**weights, **new}
    np.testing.assert_array_equal(run(joined, t / 3), want)
    np.testing.assert_array_equal(run(joined, None), want)
    heard = {**joined, "h_embedder.fc2.kernel": np.eye(32, dtype=np.float32)}
    assert np.abs(run(heard, t / 3) - run(heard, t / 2)).max() > 1e-4


@pytest.mark.parametrize("module", [uvit, pytest.param(dit, marks=pytest.mark.slow)])
def test_loops_and_remat_change_neither_the_derivative_nor_the_gradient(module):
    """Catches a jvp that a compiled loop or jax.checkpoint drops, or a gradient through it."""
    x, t, labels = inputs()
    settings = MeanFlow(equal=0.5, guidance=2.0, mix=0.5)
    found = []
    for form in (dict(unroll=True), dict(remat=True)):
        graph, weights = created(module, AVERAGE, **form)
        fc2 = "h_embedder.fc2.kernel"
        weights[fc2] = weights[fc2] + np.eye(32, dtype=np.float32)

        def loss(weights, graph=graph):
            model = weights_lib.merge(graph, weights)
            key = jax.random.key(0)
            return meanflow.loss(settings, model, x, labels, key, none=4)[0]

        def slope(weights, graph=graph):
            u = meanflow.average_velocity(weights_lib.merge(graph, weights))
            find = functools.partial(meanflow.total_derivative, settings, u)
            return find(x, t, t / 2, labels, jnp.ones_like(x))

        found.append(jax.jit(lambda w, f=loss, g=slope: (jax.value_and_grad(f)(w), g(w)))(weights))
    (value, slopes), derivative = found[0]
    (value2, slopes2), derivative2 = found[1]
    assert np.abs(derivative).max() > 1e-2
    np.testing.assert_allclose(derivative2, derivative, atol=1e-5 * np.abs(derivative).max())
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    for name, one in slopes.items():
        scale = np.abs(one).max()
        assert scale > 0, name
        np.testing.assert_allclose(slopes2[name] / scale, one / scale, atol=1e-4, err_msg=name)
