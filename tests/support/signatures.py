# SPDX-License-Identifier: Apache-2.0
"""Checks the shapes and dtypes in signatures at every call, in the process that runs the tests."""

from typing import get_args

import beartype
import numpy as np
from jaxtyping import AbstractArray, install_import_hook

MODULES = (
    "dcae_jax.models",
    "dcae_jax.diffusion",
    "dcae_jax.training.losses",
    "dcae_jax.evaluation.metrics",
)


def install():
    """Before the first import of those modules."""
    install_import_hook(MODULES, f"{__name__}.check")


def check(function):
    """beartype for the hints with shapes. Pyright checks the others; tests pass stand-ins there."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _arrays(hint)}
    for array in sum(map(_arrays, hints.values()), []):
        if not isinstance(array.array_type, tuple):
            array.array_type = (array.array_type, np.ndarray)  # as JAX takes NumPy's arrays
    function.__annotations__ = hints
    return beartype.beartype(function)


def _arrays(hint):
    """The jaxtyping hints in a hint, such as a union's."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return [hint]
    return sum(map(_arrays, get_args(hint)), [])
