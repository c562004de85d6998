# SPDX-License-Identifier: Apache-2.0
"""The layers against independent NumPy: loops and definitions, no shared code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcae_jax.models import blocks, layers
from dcae_jax.models.layers import Layers
from dcae_jax.models.weights import merge, split

KW = dict(dtype=jnp.float32)


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _run(module, x):
    """The module as the project runs it: split, weights passed as arguments."""
    graph, params, stats = split(module)
    weights = {**params, **stats}
    return np.asarray(jax.jit(lambda w, x: merge(graph, w)(x))(weights, x)), weights


def test_space_to_channel_has_pytorchs_channel_order():
    """Catches an order other than c*4 + i*2 + j, with which published weights give noise."""
    x = _random(2, 4, 6, 3)
    got = np.asarray(blocks.space_to_channel(x))
    assert got.shape == (2, 2, 3, 12)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                np.testing.assert_array_equal(got[..., c * 4 + i * 2 + j], x[:, i::2, j::2, c])
    np.testing.assert_array_equal(blocks.channel_to_space(got), x)


def test_down_shortcut_averages_consecutive_groups():
    """Catches averaging over strided instead of consecutive channels."""
    x = _random(1, 4, 2, 6)
    folded = np.asarray(blocks.space_to_channel(x))  # 24 channels
    want = np.stack([folded[..., 3 * k : 3 * k + 3].mean(-1) for k in range(8)], -1)
    np.testing.assert_allclose(blocks.down_shortcut(x, 8), want, rtol=1e-6)


def test_up_shortcut_repeats_each_channel_in_a_row():
    """Catches tiling (0 1 2 0 1 2) in place of repeating (0 0 1 1 2 2)."""
    z = _random(1, 2, 3, 6)
    got = np.asarray(blocks.up_shortcut(z, 3))  # 6 channels -> 12 -> 3 at twice the size
    assert got.shape == (1, 4, 6, 3)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                source = (c * 4 + i * 2 + j) // 2
                np.testing.assert_array_equal(got[:, i::2, j::2, c], z[..., source])


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_pads_both_sides_by_one(stride):
    """Catches 'SAME' padding, which for stride 2 pads (0, 1) and shifts the picture."""
    conv = Layers(jnp.float32, nnx.Rngs(1)).conv(3, 5, strides=stride)
    x = _random(2, 6, 8, 3)
    got, weights = _run(conv, x)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.zeros((2, 6 // stride, 8 // stride, 5))
    for r in range(want.shape[1]):
        for c in range(want.shape[2]):
            window = padded[:, r * stride : r * stride + 3, c * stride : c * stride + 3]
            want[:, r, c] = np.einsum("bijk,ijko->bo", window, weights["kernel"])
    np.testing.assert_allclose(got, want + weights["bias"], atol=1e-5)


@pytest.mark.parametrize("size", [3, 5])
def test_both_depthwise_forms_are_the_same_function(size):
    """Catches a shifted form whose values or gradients differ from XLA's convolution."""
    x = _random(2, 5, 7, 6)
    outputs, gradients = [], []
    for form in ("grouped", "shifted"):
        made = Layers(jnp.float32, nnx.Rngs(2), depthwise=form)
        module = made.conv(6, 6, size=size, depthwise=True)
        graph, params, _ = split(module)

        def loss(params, x, graph=graph):
            y = merge(graph, params)(x)
            return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))

        outputs.append(_run(module, x)[0])
        gradients.append(jax.grad(loss, argnums=(0, 1))(params, x))
    np.testing.assert_allclose(*outputs, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)
    centre = outputs[0][:, 2:3, 3:4]
    pad = size // 2
    window = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))[:, 2 : 2 + size, 3 : 3 + size]
    kernel, bias = np.asarray(params["kernel"])[:, :, 0], np.asarray(params["bias"])
    want = np.einsum("bijc,ijc->bc", window, kernel) + bias
    np.testing.assert_allclose(centre[:, 0, 0], want, atol=1e-5)


def test_grouped_pointwise_keeps_groups_apart():
    """Catches mixing of heads in the 1x1 convolution of the 5x5 branch."""
    module = layers.GroupedLinear(6, 9, Layers(jnp.float32, nnx.Rngs(3)), groups=3)
    x = _random(1, 2, 2, 6)
    got, weights = _run(module, x)
    for g in range(3):
        want = x[..., 2 * g : 2 * g + 2] @ np.asarray(weights["kernel"])[g]
        np.testing.assert_allclose(got[..., 3 * g : 3 * g + 3], want, atol=1e-6)


def test_rms_norm_has_a_bias_and_no_mean():
    """Catches LayerNorm, or RMSNorm without the bias that published weights carry."""
    module = layers.RMSNorm(5, **KW)
    graph, _, _ = split(module)
    x, scale, bias = 3 + _random(2, 2, 2, 5), _random(5, seed=1), _random(5, seed=2)
    got = merge(graph, {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)})(x)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_batch_norm_follows_pytorch():
    """Catches a biased running variance, or momentum taken the other way round."""
    module = layers.BatchNorm(3, **KW)
    graph, params, stats = split(module)
    x = 2 + 3 * _random(4, 2, 2, 3)

    def train(weights, x):
        model = layers.training_norms(merge(graph, weights), lambda name: name == ".scale")
        return model(x), split(model)[2]

    y, new = jax.jit(train)({**params, **stats}, x)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * var * 16 / 15, rtol=1e-5)
    evaluated = merge(graph, {**params, **new})(x)
    want = (x - new["mean"]) / np.sqrt(new["var"] + 1e-5)
    np.testing.assert_allclose(evaluated, want, atol=1e-5)


def _attention(q, k, v):
    """Attention by definition, in float64, one query at a time."""
    q, k = np.maximum(q, 0).astype(np.float64), np.maximum(k, 0).astype(np.float64)
    out = np.zeros(v.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for h in range(q.shape[2]):
                weight = k[b, :, h] @ q[b, n, h]
                out[b, n, h] = weight @ v[b, :, h] / weight.sum()
    return out


@pytest.mark.parametrize("tokens", [9, 40])
def test_attention_forms_equal_the_definition(tokens):
    """Catches a form chosen by token count that computes something else than the other."""
    q, k, v = (_random(2, tokens, 2, 32, seed=s) for s in range(3))
    want = _attention(q, k, v)
    np.testing.assert_allclose(blocks.relu_attention(q, k, v), want, atol=2e-5)
    relu = [jax.nn.relu(a) for a in (q, k)]
    np.testing.assert_allclose(blocks.linear_attention(*relu, v, 1e-15), want, atol=2e-5)
    np.testing.assert_allclose(blocks.quadratic_attention(*relu, v, 1e-15), want, atol=2e-5)


def test_attention_takes_the_quadratic_form_up_to_32_tokens(monkeypatch):
    """Catches a threshold at which published models were not trained."""
    taken = []
    for form in ("linear_attention", "quadratic_attention"):
        monkeypatch.setattr(blocks, form, lambda q, *_, form=form: taken.append(form) or q)
    for tokens in (32, 33):
        x = jnp.zeros((1, tokens, 1, 32))
        blocks.relu_attention(x, x, x)
    assert taken == ["quadratic_attention", "linear_attention"]


def test_multi_scale_attention_groups_96_channels_a_head():
    """Catches q, k, v split over all channels (diffusers' layout) instead of head by head."""
    module = blocks.LiteMLA(64, Layers(jnp.float32, nnx.Rngs(4)), scale5=True)
    x = _random(1, 7, 6, 64)
    got, w = _run(module, x)
    w = {k: np.asarray(v) for k, v in w.items()}
    qkv = x @ w["qkv.kernel"]
    padded = np.pad(qkv, ((0, 0), (2, 2), (2, 2), (0, 0)))
    wide = sum(
        padded[:, i : i + 7, j : j + 6] * w["aggreg_depth.kernel"][i, j, 0]
        for i in range(5)
        for j in range(5)
    )
    groups = np.split(wide, 6, axis=-1)
    wide = np.concatenate([g @ w["aggreg_point.kernel"][n] for n, g in enumerate(groups)], -1)
    heads = np.concatenate([qkv, wide], -1).reshape(1, 42, 4, 96)
    q, k, v = heads[..., :32], heads[..., 32:64], heads[..., 64:]
    out = _attention(q, k, v).reshape(1, 7, 6, 128) @ w["proj.kernel"]
    want = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_glumbconv_gates_the_first_half_with_the_second():
    """Catches swapped halves of the gate."""
    module = blocks.GLUMBConv(4, Layers(jnp.float32, nnx.Rngs(5), "shifted"))
    x = _random(1, 1, 1, 4)
    got, w = _run(module, x)
    w = {k: np.asarray(v) for k, v in w.items()}

    def silu(v):
        return v / (1 + np.exp(-v))

    y = silu(x @ w["inverted_conv.kernel"] + w["inverted_conv.bias"])
    y = y * w["depth_conv.kernel"][1, 1, 0] + w["depth_conv.bias"]
    y = (y[..., :16] * silu(y[..., 16:])) @ w["point_conv.kernel"]
    want = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_initial_weights_are_pytorchs_and_depend_on_the_seed_alone(traced):
    """Catches another bound than 1/sqrt(fan_in), a bias at zero, and seeds that give equal
    layers; for draws on the host and for those of a compiled initialisation."""

    def create(rngs):
        return split(Layers(jnp.float32, rngs).conv(16, 32))[1]

    make = (
        jax.jit(lambda key: create(nnx.Rngs(key))) if traced else lambda key: create(nnx.Rngs(key))
    )
    first, again, other = (make(jax.random.key(seed)) for seed in (0, 0, 1))
    bound = 1 / np.sqrt(16 * 9)
    kernel, bias = np.asarray(first["kernel"]), np.asarray(first["bias"])
    assert kernel.dtype == bias.dtype == np.float32
    assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.99 * bound
    assert (
        abs(kernel.mean()) < 0.03 * bound and abs(kernel.std() - bound / np.sqrt(3)) < 0.02 * bound
    )
    assert 0.8 * bound < np.abs(bias).max() <= bound
    np.testing.assert_array_equal(kernel, again["kernel"])
    assert np.abs(kernel - other["kernel"]).max() > 0.1 * bound
    assert abs(np.corrcoef(kernel.ravel()[:32], bias)[0, 1]) < 0.6


@pytest.mark.parametrize("traced", [False, True])
def test_normal_initial_weights_have_the_deviation(traced):
    """Catches a variance taken for a deviation, where PatchGAN starts from N(0, 0.02^2)."""

    def draw(key):
        return layers.normal(0.02)(key, (64, 64))

    values = np.asarray((jax.jit(draw) if traced else draw)(jax.random.key(3)))
    assert abs(values.mean()) < 1e-3 and abs(values.std() - 0.02) < 1e-3
    assert 0.05 < np.abs(values).max() < 0.12  # not truncated


def test_group_norm_is_pytorchs_in_float32_inside():
    """Catches nnx's fast variance and its rounding of the input to `dtype`, at a large mean."""
    x = 40 + _random(2, 4, 4, 8)
    module = Layers(jnp.bfloat16, nnx.Rngs(0)).group_norm(8, groups=2, eps=1e-3)
    graph, _, _ = split(module)
    scale, bias = 1 + 0.1 * _random(8, seed=1), _random(8, seed=2)
    got = merge(graph, {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)})(x)
    grouped = x.reshape(2, 16, 2, 4).astype(np.float64)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    want = ((grouped - mean) / np.sqrt(var + 1e-3)).reshape(x.shape) * scale + bias
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), want, rtol=2**-8, atol=1e-4)


def test_only_norms_that_train_are_put_into_training_mode():
    """Catches a view that moves a frozen norm's statistics, or changes the module it is of."""

    class Two(nnx.Module):
        def __init__(self):
            self.first, self.second = layers.BatchNorm(3, **KW), layers.BatchNorm(3, **KW)

    model = Two()
    view = layers.training_norms(model, lambda name: name == "second.bias")
    assert view.first.use_running_average and not view.second.use_running_average
    assert model.second.use_running_average
    assert view.second.mean is model.second.mean or np.array_equal(view.second.mean, np.zeros(3))
    layers.training_norms(model, lambda name: False)


@pytest.mark.parametrize("side", [2, 4])
def test_a_small_map_runs_as_a_product_with_the_same_numbers(side):
    """Catches patches in another order than the kernel's, in values or in gradients."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, side, side, 6), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 6, 5), np.float32))
    assert x.shape[1] * x.shape[2] <= layers.SMALL_MAP

    def loss(form):
        return lambda x, kernel: jnp.sum(jnp.sin(form(x, kernel)))

    layout = ((1, 1), ((1, 1), (1, 1)))
    names = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def ours(x, kernel):
        return layers.conv_on_small_maps(x, kernel, *layout, **names)

    def xlas(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, *layout, **names)

    for form in (loss(ours), jax.grad(loss(ours), argnums=(0, 1))):
        assert "convolution" not in jax.jit(form).lower(x, kernel).as_text()
    want = jax.value_and_grad(loss(xlas), argnums=(0, 1))(x, kernel)
    found = jax.value_and_grad(loss(ours), argnums=(0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, want)
    large = jnp.zeros((1, 2 * side, 4 * side, 6))
    assert "convolution" in jax.jit(ours).lower(large, kernel).as_text()


def test_remat_keeps_the_inputs_of_blocks_alone():
    """Catches a remat policy that keeps what is inside the blocks, and so saves no memory."""
    rngs = nnx.Rngs(0)

    def block():
        return nnx.Sequential(
            nnx.Linear(8, 32, rngs=rngs), jnp.tanh, nnx.Linear(32, 8, rngs=rngs), jnp.tanh
        )

    stage, x = [nnx.split(block()) for _ in range(4)], jnp.asarray(_random(1000, 8))

    def kept(remat):
        def function(states, x):
            blocks = [nnx.merge(graph, s) for (graph, _), s in zip(stage, states, strict=True)]
            return layers.run(blocks, x, remat=remat)

        _, pull_back = jax.vjp(function, [state for _, state in stage], x)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept(remat=True) < 1.2 * 4 * x.size < 0.3 * kept(remat=False)
