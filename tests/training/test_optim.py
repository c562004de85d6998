# SPDX-License-Identifier: Apache-2.0
"""The optimizer against its formulas, and what freezing means for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.errors import UserError
from dcae_jax.training import optim


def _config(**changes):
    config = config_lib.default()
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate = 0.1
    config.optimizer.update(changes)
    return config


PARAMS = {"a.kernel": jnp.full((2,), 2.0), "a.bias": jnp.full((2,), 2.0), "b.kernel": jnp.ones(2)}


def test_adamw_by_its_formula_without_decay_on_biases():
    """Catches decay on biases, L2 instead of decoupled decay, and moments not bias-corrected."""
    config = _config(weight_decay=0.5, clip_norm=0.0)
    tx = optim.optimizer(config.optimizer, 100, PARAMS, frozenset(PARAMS))
    grads = {"a.kernel": jnp.full(2, 3.0), "a.bias": jnp.full(2, -3.0), "b.kernel": jnp.zeros(2)}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["a.kernel"], -0.1 * (1 + 0.5 * 2), rtol=1e-5)
    np.testing.assert_allclose(updates["a.bias"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["b.kernel"], -0.1 * 0.5, rtol=1e-5)


def test_frozen_parameters_get_zero_updates_and_no_moments():
    """Catches optax.masked alone, which adds the raw gradient to what should be frozen."""
    tx = optim.optimizer(_config().optimizer, 100, PARAMS, frozenset({"a.kernel"}))
    state = tx.init(PARAMS)
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state)) == 2
    updates, _ = tx.update({k: jnp.ones(2) for k in PARAMS}, state, PARAMS)
    assert not np.any(updates["b.kernel"]) and not np.any(updates["a.bias"])
    assert np.all(updates["a.kernel"])


def test_muon_updates_are_orthogonal_matrices_of_adamws_size():
    """Catches a kernel flattened along the wrong axes, stacked blocks taken as one matrix, a scale
    that depends on the shape, decay by another rate, and Muon on depthwise kernels, on biases or on
    frozen weights. Beside numpy's SVD: Muon keeps the singular vectors, and all values are near 1.
    """
    config = _config(muon=(".*kernel",), weight_decay=0.5, clip_norm=1.0)
    shapes = {"conv.kernel": (3, 3, 8, 16), "stack.*.kernel": (2, 24, 8), "frozen.kernel": (4, 4)}
    shapes |= {"depthwise.kernel": (3, 3, 1, 8), "conv.bias": (16,)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    grads = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    tx = optim.optimizer(config.optimizer, 100, params, frozenset(params) - {"frozen.kernel"})
    updates, state = tx.update(grads, tx.init(params), params)
    for name, matrices in {"conv.kernel": 1, "stack.*.kernel": 2}.items():
        step = np.asarray(updates[name] / -0.1 - 0.5 * params[name], np.float64)
        step = step.reshape(matrices, -1, shapes[name][-1])
        gradients = np.asarray(grads[name], np.float64).reshape(step.shape)
        for moved, gradient in zip(step, gradients, strict=True):
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            values = u.T @ moved @ vt.T / (0.2 * np.sqrt(max(moved.shape)))
            assert np.all((np.diag(values) > 0.6) & (np.diag(values) < 1.3))
            np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-4)
    np.testing.assert_allclose(np.abs(updates["conv.bias"]), 0.1, rtol=1e-4)
    depthwise = updates["depthwise.kernel"] + 0.05 * params["depthwise.kernel"]
    np.testing.assert_allclose(np.abs(depthwise), 0.1, rtol=1e-4)
    assert not np.any(updates["frozen.kernel"])
    moments = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim > 1}
    assert moments == {shapes[n] for n in ("conv.kernel", "stack.*.kernel", "depthwise.kernel")}


@pytest.mark.parametrize("pattern", [".*bias", "c.*"])
def test_muon_on_vectors_or_on_nothing_is_an_error(pattern):
    """Catches a renamed layer that silently goes back to AdamW, and a traceback from optax."""
    with pytest.raises(UserError, match=r"optimizer\.muon"):
        optim.optimizer(_config(muon=(pattern,)).optimizer, 100, PARAMS, frozenset(PARAMS))


def test_clipping_counts_trained_gradients_only():
    """Catches a global norm that frozen gradients inflate."""
    config = _config(clip_norm=1.0, weight_decay=0.0, eps=1.0)
    tx = optim.optimizer(config.optimizer, 100, PARAMS, frozenset({"a.kernel"}))
    results = []
    for frozen in (0.0, 1e6):
        grads = {"a.kernel": jnp.full(2, 0.3), "a.bias": jnp.zeros(2)}
        grads["b.kernel"] = jnp.full(2, frozen)
        results.append(tx.update(grads, tx.init(PARAMS), PARAMS)[0]["a.kernel"])
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], -0.1 * 0.3 / (0.3 + 1), rtol=1e-5)


def test_schedules_warm_up_linearly_and_then_hold_or_fall():
    """Catches a warm-up from 0, one step off, or a cosine that ends before `steps`."""
    config = _config(warmup_steps=10, warmup_from=0.1)
    constant = optim.schedule(config.optimizer, 110)
    assert [round(float(constant(s)), 4) for s in (0, 5, 10, 99)] == [0.01, 0.055, 0.1, 0.1]
    config.optimizer.schedule = "cosine"
    cosine = optim.schedule(config.optimizer, 110)
    values = [round(float(cosine(s)), 4) for s in (0, 10, 60, 110)]
    assert values == [0.01, 0.1, 0.05, 0.0]
    config.optimizer.warmup_steps = 110  # of all steps
    short = optim.schedule(config.optimizer, 110)
    assert [round(float(short(s)), 4) for s in (0, 110, 111)] == [0.01, 0.1, 0.0]


@pytest.mark.parametrize("pattern", ["c.*", "a", "("])
def test_patterns_match_whole_paths_or_are_errors(pattern):
    """Catches a renamed layer that un-freezes (or freezes) everything in silence."""
    with pytest.raises(UserError, match="trainable"):
        optim.match([pattern], PARAMS, "trainable")
    assert optim.match([r"a\..*"], PARAMS, "trainable") == {"a.kernel", "a.bias"}


def test_the_discriminator_has_its_own_rate_and_no_decay():
    """Catches weight decay, clipping, the model's learning rate or its warm-up on the
    discriminator."""
    config = _config(weight_decay=0.5, b1=0.3, b2=0.8, clip_norm=1e-3, warmup_steps=10)
    tx = optim.discriminator_optimizer(config.optimizer, 0.02)
    grads = {name: jnp.full(2, 3.0) for name in PARAMS}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(updates[name], -0.02, rtol=1e-5)
        np.testing.assert_allclose(state[0].mu[name], 0.7 * 3, rtol=1e-5)
        np.testing.assert_allclose(state[0].nu[name], 0.2 * 9, rtol=1e-5)


@pytest.mark.parametrize("pattern", [r"b\.7\..*", r"b\.\d+\.k", r"b\.[0-9]\..*", r"b\.(0|12)\.k"])
def test_a_pattern_for_one_of_several_stacked_blocks_says_so(pattern):
    """Catches a block that a user freezes by its number, and an error that names no remedy."""
    names = ["a.kernel", "b.*.k"]
    with pytest.raises(UserError, match=r"names one block of a stack.*like 'b\.\*\.k'"):
        optim.match([pattern], names, "trainable")
    with pytest.raises(UserError, match="matches no parameter"):
        optim.match([r"c\.7\..*"], names, "trainable")
    assert optim.match([r"b\..*"], names, "trainable") == {"b.*.k"}
