# SPDX-License-Identifier: Apache-2.0
"""Layers with int8 or fp8 weights and inputs, for inference: the arrays and operations of qwix.

qwix can also quantise an NNX model by itself (`quantize_model`). That does not fit here: while one
method of the model runs, it replaces functions of JAX for the whole process, and an autoencoder has
two methods; and it refuses a convolution of float inputs with quantised weights. So this file
replaces the layers, and qwix quantises and computes in them.

Left in float: the first and last convolution of encoder and decoder, depthwise and grouped
convolutions (few weights, little work), norms, and the sums of attention, which are no layers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from dcae_jax import errors
from dcae_jax.errors import UserError
from dcae_jax.models.weights import AnyArray, Array

# Paths of what lies between the first and last convolutions.
INSIDE = re.compile(r"(encoder|decoder)\.(stages|middle)\..*")


@dataclasses.dataclass(frozen=True)
class Form:
    """What is quantised, and to which dtype. inputs: also the inputs, in static ranges."""

    dtype: DTypeLike
    inputs: bool = True


FORMS = {
    "int8": Form(jnp.int8),
    "int8-weights": Form(jnp.int8, inputs=False),
    "fp8": Form(jnp.float8_e4m3fn),
}


def form(name: str) -> Form:
    """The row of FORMS called `name`. Raises UserError."""
    if name not in FORMS:
        raise UserError(f"quantize={name!r} is not known; choose one of {', '.join(FORMS)}")
    errors.require(f"quantize={name!r} needs qwix", "qwix")
    return FORMS[name]


class Quantized(nnx.Module):
    """An nnx.Linear, or an nnx.Conv without groups, whose kernel is quantised per output channel.

    The float kernel is kernel [..., in, out] * kernel_scale [1.., 1, out]. Inputs are rounded to
    multiples of input_scale [], and scales are applied in float32 after the sums. Without an
    input_scale, the kernel is scaled to floats before it is used.
    """

    def __init__(self, layer: nnx.Linear | nnx.Conv, form: Form) -> None:
        shape = layer.kernel.shape
        self.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, form.dtype))
        scales = (1,) * (len(shape) - 1) + shape[-1:]
        self.kernel_scale = nnx.Param(jax.ShapeDtypeStruct(scales, jnp.float32))
        scale = nnx.Param(jax.ShapeDtypeStruct((), jnp.float32)) if form.inputs else None
        self.input_scale, self.bias = nnx.data(scale), nnx.data(layer.bias)
        conv = isinstance(layer, nnx.Conv)
        self.window: Any = ((layer.strides,) * 2, layer.padding) if conv else None
        self.dtype: Any = layer.dtype

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*m out"]:
        import qwix

        kernel = qwix.QArray(self.kernel[...], self.kernel_scale[...])
        if self.input_scale is None:
            inputs, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        else:
            scale = self.input_scale[...]
            rounded = to_dtype(x * (1 / scale), kernel.qvalue.dtype)
            inputs = qwix.QArray(rounded, scale.reshape((1,) * x.ndim))
        if self.window:
            axes = ("NHWC", "HWIO", "NHWC")
            y = qwix.conv_general_dilated(inputs, kernel, *self.window, dimension_numbers=axes)
        else:
            y = qwix.dot_general(inputs, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return (y if self.bias is None else y + self.bias[...]).astype(self.dtype)


def largest(dtype: DTypeLike) -> float:
    """The largest value that is used: 127 in int8, 448 in fp8."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return float(info(dtype).max)


def to_dtype(x: Array, dtype: DTypeLike) -> Array:
    """x rounded to int8 or fp8; what is beyond +-`largest` becomes that."""
    x = jnp.clip(x, -largest(dtype), largest(dtype))
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def replace(model: Any, form: Form) -> None:
    """Quantises the layers of `model` in place; their weights are shapes."""
    _replace(model, lambda layer: Quantized(layer, form))


def quantize(
    weights: Mapping[str, AnyArray], model: Any, form: Form, peaks: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The float `weights` of `model` as those of `replace(model, form)`.

    peaks: the largest absolute input of each layer by its path, from `input_peaks`.
    """
    import qwix

    found = {name: np.asarray(value) for name, value in weights.items()}
    for path in _paths(model):
        kernel = jnp.asarray(found[f"{path}.kernel"], jnp.float32)
        array = qwix.quantize(kernel, form.dtype, channelwise_axes=(kernel.ndim - 1,))
        found[f"{path}.kernel"] = np.asarray(array.qvalue)
        found[f"{path}.kernel_scale"] = np.asarray(array.scale)
        if form.inputs:
            # An input that is always 0 has no range, and a scale of 0 would give NaN.
            scale = float(peaks[path]) / largest(form.dtype) or 1
            found[f"{path}.input_scale"] = np.array(scale, np.float32)
    return found


class _Observed(nnx.Module):
    """A layer that keeps the largest absolute value of its input."""

    def __init__(self, layer: nnx.Linear | nnx.Conv) -> None:
        self.layer, self.peak = layer, nnx.Intermediate(jnp.zeros(()))

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*m out"]:
        self.peak.set_value(jnp.abs(x).max().astype(jnp.float32))
        return self.layer(x)


def input_peaks(model: Any, x: Float[Array, "B H W 3"]) -> dict[str, Float32[Array, ""]]:
    """The largest absolute input of each layer, by its path, while x is encoded and decoded."""
    _replace(model, _Observed)
    model.decode(model.encode(x))
    state = nnx.to_flat_state(nnx.state(model, nnx.Intermediate))
    return {".".join(map(str, path[:-1])): leaf.get_value() for path, leaf in state}


def _paths(model: Any) -> list[str]:
    """Paths of the layers that are quantised."""
    layers = nnx.iter_modules(model)
    return [".".join(map(str, path)) for path, layer in layers if _fits(path, layer)]


def _fits(path: tuple[Any, ...], layer: Any) -> bool:
    whole = isinstance(layer, nnx.Linear) or (
        isinstance(layer, nnx.Conv) and layer.feature_group_count == 1
    )
    return whole and INSIDE.fullmatch(".".join(map(str, path))) is not None


def _replace(model: Any, make: Callable[[Any], nnx.Module]) -> None:
    modules = dict(nnx.iter_modules(model))
    for path, layer in modules.items():
        if _fits(path, layer):
            # An nnx.List names its elements by their numbers.
            setattr(modules[path[:-1]], str(path[-1]), make(layer))
