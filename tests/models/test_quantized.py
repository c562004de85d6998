# SPDX-License-Identifier: Apache-2.0
"""int8 and fp8 layers: their numbers, and which layers of a model they replace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcae_jax.config.schema import Model
from dcae_jax.models import dcae, layers, quantized, sdvae
from dcae_jax.models import weights as weights_lib


class Stages(nnx.Module):
    """A model of one layer, in a place whose layers are quantised."""

    def __init__(self, layer):
        self.decoder = nnx.Dict(stages=nnx.List([layer]))

    def encode(self, x):
        return x

    def decode(self, z):
        return self.decoder.stages[0](z)


def _quantized(model, name, peaks):
    """(the quantised layer's module, its weights) of a `Stages`."""
    _, params, _ = weights_lib.split(model)
    form = quantized.FORMS[name]
    weights = quantized.quantize(params, model, form, peaks)
    quantized.replace(model, form)
    graphdef, _, _ = weights_lib.split(model)
    return weights_lib.merge(graphdef, {k: jnp.asarray(v) for k, v in weights.items()}), weights


@pytest.mark.parametrize("kind", ["conv", "stride", "linear"])
def test_a_layer_rounds_its_inputs_and_sums_integers(kind):
    """Catches a scale along another axis, values beyond the range that wrap around, a padding or
    stride of another layer, and a bias that is left out."""
    make = layers.Layers(jnp.float32, nnx.Rngs(0))
    layer = {
        "conv": lambda: make.conv(5, 7),
        "stride": lambda: make.conv(5, 7, strides=2, padding=(0, 1)),
        "linear": lambda: make.linear(5, 7),
    }[kind]()
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 5)).astype(np.float32)
    peak = float(np.abs(x).max()) / 2  # half of the largest value: some are beyond the range
    model, weights = _quantized(Stages(layer), "int8", {"decoder.stages.0": peak})
    scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1)), keepdims=True) / 127.5
    stored = np.clip(np.round(kernel / scale), -127, 127)
    assert weights["decoder.stages.0.kernel"].dtype == np.int8
    assert np.abs(weights["decoder.stages.0.kernel"] - stored).max() <= 1
    given = np.clip(np.round(x.astype(np.float64) / (peak / 127)), -127, 127)
    k = weights["decoder.stages.0.kernel"].astype(np.float64)
    step, low, high, k = {
        "conv": (1, 1, 1, k),
        "stride": (2, 0, 1, k),
        "linear": (1, 0, 0, k[None, None]),
    }[kind]
    padded = np.pad(given, ((0, 0), (low, high), (low, high), (0, 0)))
    size = k.shape[0]
    h, w = (range((n - size) // step + 1) for n in padded.shape[1:3])
    sums = np.array(
        [
            [np.tensordot(padded[:, i * step :, j * step :][:, :size, :size], k, 3) for j in w]
            for i in h
        ]
    ).transpose(2, 0, 1, 3)
    wanted = sums * (peak / 127) * weights["decoder.stages.0.kernel_scale"].reshape(-1) + bias
    np.testing.assert_allclose(model.decode(jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, worst", [("int8-weights", 0.01), ("int8", 0.02), ("fp8", 0.06)])
def test_each_form_is_near_the_float_layer(name, worst):
    """Catches fp8 that is cut off at int8's largest value."""
    layer = layers.Layers(jnp.float32, nnx.Rngs(0)).conv(16, 8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 16)), jnp.float32)
    y = layer(x)
    model, weights = _quantized(Stages(layer), name, {"decoder.stages.0": float(jnp.abs(x).max())})
    assert weights["decoder.stages.0.kernel"].dtype == quantized.FORMS[name].dtype
    assert ("decoder.stages.0.input_scale" in weights) == (name != "int8-weights")
    error = jnp.sqrt(jnp.mean((model.decode(x) - y) ** 2) / jnp.mean(y**2))
    assert 1e-4 < error < worst


def test_bfloat16_scales_after_the_sums():
    """Catches scales and sums rounded to bfloat16 before the result is."""
    outputs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = layers.Layers(dtype, nnx.Rngs(0)).conv(16, 8)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 16)), jnp.bfloat16)
        model, _ = _quantized(Stages(layer), "int8", {"decoder.stages.0": 3.0})
        outputs[dtype] = model.decode(x)
    assert outputs[jnp.bfloat16].dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs[jnp.bfloat16], outputs[jnp.float32].astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_an_input_that_is_always_zero_gives_no_nan(name):
    """Catches a division by a range of 0, which int8 survives and fp8 does not."""
    layer = layers.Layers(jnp.float32, nnx.Rngs(0)).linear(4, 3)
    bias = layer.bias[...]
    model, _ = _quantized(Stages(layer), name, {"decoder.stages.0": 0.0})
    np.testing.assert_array_equal(model.decode(jnp.zeros((1, 2, 2, 4)))[0, 0, 0], bias)


def test_ranges_are_those_of_each_layer_s_own_input():
    """Catches a range of another layer, of its output, or without the sign."""
    make = layers.Layers(jnp.float32, nnx.Rngs(0))
    model = Stages(make.linear(3, 3))
    x = jnp.zeros((1, 2, 2, 3)).at[0, 1, 1, 2].set(-5.0).at[0, 0, 0, 0].set(4.0)
    peaks = quantized.input_peaks(model, x)
    assert {name: float(peak) for name, peak in peaks.items()} == {"decoder.stages.0": 5.0}


LEFT = {
    "tiny": "project_in.conv project_in project_out project_out.conv.conv depth_conv",
    "f32c32-sana": "project_in project_out project_out.conv depth_conv aggreg_depth aggreg_point",
    "sd-vae-f8": "conv_in conv_out quant_conv post_quant_conv",
}


@pytest.mark.parametrize("variant", LEFT)
def test_sensitive_layers_stay_float(variant):
    """Catches a first or last convolution in int8, and a layer in between that is left out."""
    module = sdvae if variant.startswith("sd") else dcae
    settings = {"platform": "cpu", "remat": False, "dtype": jnp.float32}
    model = weights_lib.abstract(
        lambda rngs: module.create(Model(variant=variant), rngs=rngs, **settings)
    )
    quantized.replace(model, quantized.FORMS["int8"])
    _, params, stats = weights_lib.split(model)
    kernels = {name: leaf.dtype for name, leaf in params.items() if name.endswith(".kernel")}
    left = {name for name, dtype in kernels.items() if dtype == jnp.float32}
    endings = tuple(LEFT[variant].split())
    assert left == {n for n in kernels if n.removesuffix(".kernel").endswith(endings)}
    assert len(left) < len(kernels) / 2
    others = {name: leaf.dtype for name, leaf in {**params, **stats}.items() if name not in kernels}
    assert set(others.values()) == {jnp.dtype("float32")}  # norms, biases, statistics, scales
    assert jax.tree.leaves(params)
