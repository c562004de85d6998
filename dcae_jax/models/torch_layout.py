# SPDX-License-Identifier: Apache-2.0
"""Our weights under the names and in the shapes that PyTorch models give them, and back.

A model's `*_torch.py` has a table of what each of its layers is called elsewhere; this file moves
the numbers. Nothing is rounded: float32 goes there and back bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcae_jax.errors import UserError

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, Any]  # {PyTorch's name: something with a shape that np.asarray reads}

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "table": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; nothing here depends on it
STACKED = "*"  # in our path, where PyTorch has the number of the block


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one of our layers is called in PyTorch.

    With several names, each of those layers has an equal run of our output channels. `linear`: its
    kernel is a matrix [out, in] there, where a 1x1 convolution would be [out, in, 1, 1].

    The layers of stacked blocks ('blocks.*.attn.qkv') have {} in their names for the number of the
    block. A parameter of the model itself, with no dot in its path, has a leading axis of 1 there.
    """

    names: tuple[str, ...]
    linear: bool = False


Table = Mapping[str, Layer]


def linear_table(table: Mapping[str, str]) -> dict[str, Layer]:
    """{our layer: its name in PyTorch} as a Table of layers without 1x1 convolutions."""
    return {ours: Layer((theirs,), linear=True) for ours, theirs in table.items()}


def below(tensors: Tensors, prefix: str) -> dict[str, Any]:
    """The tensors whose names start with `prefix`, named without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def shapes_there(shapes: Shapes, table: Table) -> Shapes:
    """{their name: shape} of a model whose own are {our path: shape}, counters left out."""
    hollow = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    tensors = to_torch(hollow, table, shapes)
    return {name: value.shape for name, value in tensors.items() if not name.endswith(COUNTER)}


def to_torch(weights: Mapping[str, Any], table: Table, shapes: Shapes) -> dict[str, np.ndarray]:
    """{our path: array} -> {their name: array}, the counters of BatchNorm as zeros.

    Raises UserError unless the weights have the `shapes` of the model.
    """
    problem = difference({path: tuple(value.shape) for path, value in weights.items()}, shapes)
    if problem:
        raise UserError(f"these weights are of another model: {problem}")
    out = {}
    for path in shapes:
        value = np.asarray(weights[path])
        for index, names, linear in _blocks(path, value.shape, table):
            theirs = _axes_there(path, value if index is None else value[index], linear)
            for name, part in zip(names, np.split(theirs, len(names)), strict=True):
                out[name] = part
                if name.endswith(".running_mean"):
                    out[name.removesuffix("running_mean") + COUNTER] = np.zeros((), np.int64)
    return out


def from_torch(
    tensors: Tensors, table: Table, shapes: Shapes, cause: Callable[[Shapes], str]
) -> dict[str, np.ndarray]:
    """{their name: array} -> {our path: float32 array}, for a model of the given `shapes`.

    Half precision is widened. A float32 tensor that is one of our arrays stays a view. Raises
    UserError when a tensor is missing, unknown or misshapen, where `cause` says from the shapes
    found what the likely reason is, and when one is not of floats.
    """
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.endswith(f".{COUNTER}")
    }
    problem = difference(found, shapes_there(shapes, table))
    if problem:
        raise UserError(f"{problem}: {cause(found)}")
    out = {}
    for path, shape in shapes.items():
        value = np.empty(shape if STACKED in path else (), np.float32)
        for index, names, _ in _blocks(path, shape, table):
            parts = [_floats(name, tensors[name]) for name in names]
            theirs = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if index is None:
                value = _axes_here(path, theirs, shape).astype(np.float32, copy=False)
            else:
                value[index] = _axes_here(path, theirs, shape[1:])
        out[path] = value
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


def has(shapes: Shapes, ranks: Mapping[str, int]) -> bool:
    """Whether there is each name of `ranks`, with so many axes and none of them empty."""
    return all(
        len(shapes.get(name, ())) == rank and math.prod(shapes[name])
        for name, rank in ranks.items()
    )


def _blocks(
    path: str, shape: tuple[int, ...], table: Table
) -> Iterator[tuple[int | None, list[str], bool]]:
    """(index in our array or None, their names, linear) of each layer that `path` stands for."""
    prefix, _, leaf = path.rpartition(".")
    layer = table[prefix or leaf]
    names = [f"{name}.{LEAVES[leaf]}" if prefix else name for name in layer.names]
    if STACKED not in path.split("."):
        yield None, names, layer.linear
        return
    for i in range(shape[0]):
        yield i, [name.format(i) for name in names], layer.linear


def _axes_there(path: str, value: np.ndarray, linear: bool) -> np.ndarray:
    """One of our arrays with the axes of PyTorch: a view, where the memory allows it."""
    if "." not in path:
        return value[None]
    if not path.endswith(".kernel"):
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)  # [h, w, in, out] -> [out, in, h, w]
    if value.ndim == 3:  # [groups, in / groups, out / groups] -> [out, in / groups, 1, 1]
        groups, inputs, outputs = value.shape
        return value.transpose(0, 2, 1).reshape(groups * outputs, inputs, 1, 1)
    return value.T if linear else value.T[:, :, None, None]


def _axes_here(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_axes_there`; shape: that of our array."""
    if "." not in path:
        return value[0]
    if not path.endswith(".kernel"):
        return value
    if len(shape) == 4:
        return value.transpose(2, 3, 1, 0)
    if len(shape) == 3:
        return value.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1)
    return value.reshape(shape[::-1]).T


def _floats(name: str, tensor: Any) -> np.ndarray:
    value = np.asarray(tensor)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{name} has dtype {value.dtype}; convert quantised weights to floats")
    return value


# --- diffusers' config.json -----------------------------------------------------------------------


def bad_field(key: str, value: Any, why: str) -> UserError:
    return UserError(f"config.json: {key}={value!r}: {why}")


def checked_scaling(config: Mapping[str, Any]) -> float:
    """The scaling factor of a config.json. Raises UserError."""
    scaling = config["scaling_factor"]
    if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not scaling > 0:
        raise bad_field("scaling_factor", scaling, "must be a number above 0")
    return float(scaling)


# --- the metric networks' own files ---------------------------------------------------------------


def check_shapes(
    weights: Mapping[str, np.ndarray], shapes: Shapes, path: str | Path, title: str
) -> None:
    """Raises ValueError, with the first name, unless the weights have these names and shapes."""
    for name in sorted(shapes.keys() | weights.keys()):
        found = weights[name].shape if name in weights else None
        if found != shapes.get(name):
            raise ValueError(
                f"{path}: {name} has shape {found}, {title} needs {shapes.get(name)}; "
                "convert the original file again"
            )


def read_converted(
    path: str | Path, what: str, wanted: str, networks: tuple[str, ...]
) -> tuple[str, dict[str, np.ndarray]]:
    """(network, weights) of a file that `dcae-jax convert` wrote.

    what, wanted: what an error calls such a file, and the network that was asked for. networks:
    the names of those that will do. Raises ValueError for any other file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            network = (file.metadata() or {}).get("network", "unknown")
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, AttributeError) as error:  # NumPy has no such type
        raise ValueError(
            f"{path} is not a readable {what} file ({error}); make it with `dcae-jax convert`"
        ) from error
    if network not in networks:
        raise ValueError(
            f"{path} holds the network {network!r}, not {wanted}; "
            "convert the right file with `dcae-jax convert`"
        )
    return network, weights
