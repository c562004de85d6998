# SPDX-License-Identifier: Apache-2.0
"""Our weights under the names and in the shapes that PyTorch models give them, and back.

A model's file says what each of its layers is called elsewhere (`Layer`); this one moves the
numbers. Nothing is rounded: float32 goes there and back bit for bit. Where it can, it returns
views, so that reading a memory-mapped file of weights costs their size once.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from dcae_jax.config import UserError

Shapes = dict[str, tuple[int, ...]]

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; nothing here depends on it


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one of our layers is called elsewhere.

    With several names, each of those layers has an equal run of our output channels. `linear`:
    its kernel is a matrix [out, in] there, where a 1x1 convolution would be [out, in, 1, 1].
    """

    names: tuple[str, ...]
    linear: bool = False


def shapes_there(shapes: Shapes, table: dict[str, Layer]) -> Shapes:
    """{their name: shape} of a model whose own are {our path: shape}, counters left out."""
    out = {}
    for path, shape in shapes.items():
        layer, leaf = _layer(path, table)
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) == 3:
            shape = (shape[0] * shape[2], shape[1], 1, 1)
        elif len(shape) == 2:
            shape = shape[::-1] if layer.linear else (*shape[::-1], 1, 1)
        part = (shape[0] // len(layer.names), *shape[1:])
        out.update({f"{name}.{leaf}": part for name in layer.names})
    return out


def to_torch(weights: Mapping, table: dict[str, Layer], shapes: Shapes) -> dict[str, np.ndarray]:
    """{our path: array} -> {their name: array}, the counters of BatchNorm as zeros.

    Raises UserError unless the weights have the `shapes` of the model.
    """
    problem = difference({path: tuple(value.shape) for path, value in weights.items()}, shapes)
    if problem:
        raise UserError(f"these weights are of another model: {problem}")
    out = {}
    for path, value in weights.items():
        layer, leaf = _layer(path, table)
        value = np.asarray(value)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)  # [k, k, in, out] -> [out, in, k, k]
        elif value.ndim == 3:  # [groups, in / groups, out / groups] -> [out, in / groups, 1, 1]
            groups, inputs, outputs = value.shape
            value = value.transpose(0, 2, 1).reshape(groups * outputs, inputs, 1, 1)
        elif value.ndim == 2:
            value = value.T if layer.linear else value.T[:, :, None, None]
        for name, part in zip(layer.names, np.split(value, len(layer.names)), strict=True):
            out[f"{name}.{leaf}"] = part
            if leaf == "running_mean":
                out[f"{name}.{COUNTER}"] = np.zeros((), np.int64)
    return out


def from_torch(
    tensors: Mapping,
    table: dict[str, Layer],
    shapes: Shapes,
    cause: Callable[[Shapes], str],
) -> dict[str, np.ndarray]:
    """{their name: array} -> {our path: float32 array}, for a model of the given `shapes`.

    Half precision is widened. Raises UserError, before anything is converted, when a tensor is
    missing, unknown, misshapen or not of floats; `cause` says from the shapes found what the
    likely reason is.
    """
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.endswith(f".{COUNTER}")
    }
    problem = difference(found, shapes_there(shapes, table))
    if problem:
        raise UserError(f"{problem}: {cause(found)}")
    for name in found:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise UserError(
                f"{name} has dtype {tensors[name].dtype}; convert quantised weights to floats"
            )
    out = {}
    for path, shape in shapes.items():
        layer, leaf = _layer(path, table)
        parts = [tensors[f"{name}.{leaf}"] for name in layer.names]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(shape) == 4:
            value = value.transpose(2, 3, 1, 0)
        elif len(shape) == 3:
            value = value.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1)
        elif len(shape) == 2:
            value = value.reshape(shape[::-1]).T
        out[path] = value.astype(np.float32, copy=False)
    return out


def difference(found: Shapes, wanted: Shapes) -> str:
    """'' or one line that counts what is missing, unexpected and misshapen, with first names."""
    wrong = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": wrong,
    }
    return ", ".join(
        f"{len(items)} {kind} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
        for kind, items in kinds.items()
        if items
    )


def _layer(path: str, table: dict[str, Layer]) -> tuple[Layer, str]:
    prefix, leaf = path.rsplit(".", 1)
    return table[prefix], LEAVES[leaf]
