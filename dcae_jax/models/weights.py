# SPDX-License-Identifier: Apache-2.0
"""The bridge between NNX modules and flat dicts of weights.

Training, checkpoints and exports hold {'decoder.stages.1.0.conv.kernel': array}: attribute names
and list indices joined by dots. Modules exist only while a function is traced.
"""

import contextvars
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Array = jax.Array
AnyArray = jax.Array | np.ndarray  # on devices or on the host
Weights = dict[str, Array]
AnyWeights = Mapping[str, AnyArray]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Weights, Weights]:
    """Returns (graphdef, parameters, statistics), the latter two by path.

    Statistics are the running mean and variance of BatchNorm.
    """
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, _flat(params), _flat(stats)


def merge(graphdef: nnx.GraphDef, weights: Mapping[str, Array]) -> Any:
    """The module of `graphdef` holding `weights` (parameters and statistics together)."""
    paths = [(_path(name), value) for name, value in weights.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(paths))


class _HostStream(nnx.RngStream):
    """Keys from NumPy, two uint32 words each as jax.random takes them.

    nnx's own stream runs two compiled operations per key, which dominates the initialisation of a
    model with hundreds of kernels.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(0, tag="default")
        self.seed, self.numbers = seed, itertools.count()

    def __call__(self) -> Any:
        return np.random.SeedSequence((self.seed, next(self.numbers))).generate_state(2)


def host_rngs(seed: int) -> nnx.Rngs:
    """`nnx.Rngs(seed)`, with other keys, for a module created outside a trace."""
    rngs = nnx.Rngs(0)
    rngs.default = _HostStream(seed)  # pyright: ignore[reportAttributeAccessIssue]
    return rngs


_only_shapes = contextvars.ContextVar("only_shapes", default=False)


def only_shapes() -> bool:
    """Whether `abstract` is running, where parameter values are never read."""
    return _only_shapes.get()


def zeros_view(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Zeros that share one element's memory: a parameter's value where only shapes matter."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def abstract(create: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """The module that `create` makes, with shapes in place of arrays. Allocates nothing."""
    token = _only_shapes.set(True)
    try:
        return nnx.eval_shape(lambda: create(host_rngs(0)))
    finally:
        _only_shapes.reset(token)


def shapes(create: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters and statistics of the model that `create` makes."""
    _, params, stats = split(abstract(create))
    return {path: tuple(leaf.shape) for path, leaf in {**params, **stats}.items()}


def num_parameters(weights: Mapping[str, Any], prefix: str | tuple[str, ...] = "") -> int:
    """The number of values in `weights` (arrays or their shapes) with this path prefix."""
    return sum(leaf.size for path, leaf in weights.items() if path.startswith(prefix))


def _flat(state: nnx.State) -> Weights:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
