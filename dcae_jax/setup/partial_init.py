# SPDX-License-Identifier: Apache-2.0
"""Partial initialisation: copies the weights that a model shares with another one."""

import dataclasses
from collections.abc import Iterable

from dcae_jax.errors import UserError
from dcae_jax.models.weights import AnyWeights
from dcae_jax.training import optim
from dcae_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class PartialInit:
    """Initial weights by path, and their origin."""

    weights: AnyWeights
    filled: frozenset[str]  # copied from the other model
    fresh: frozenset[str]  # kept as initialised
    unused: frozenset[str]  # of the other model


def fill(fresh: AnyWeights, source: AnyWeights, init_parts: Iterable[str]) -> PartialInit:
    """Replaces each weight of `fresh` that `source` has under the same path with the same shape.

    init_parts: patterns (full match) of paths that must be replaced. Raises UserError if one is
    not.
    """
    filled = {
        path: source[path]
        for path, value in fresh.items()
        if path in source and tuple(source[path].shape) == tuple(value.shape)
    }
    required = optim.match(init_parts, fresh, "init_parts")
    try:
        state_lib.check_weights(
            {path: source[path] for path in required if path in source},
            {path: fresh[path] for path in required},
        )
    except UserError as error:
        raise UserError(f"{error}, or list fewer parts in init_parts") from error
    return PartialInit(
        weights={**fresh, **filled},
        filled=frozenset(filled),
        fresh=frozenset(fresh.keys() - filled.keys()),
        unused=frozenset(source.keys() - filled.keys()),
    )
