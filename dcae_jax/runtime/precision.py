# SPDX-License-Identifier: Apache-2.0
"""Matmul precision of float32, decided in one place.

By default XLA runs float32 matmuls in TF32 on GPUs (10 mantissa bits) and in bfloat16 on TPUs (7).
Everything that is reported, stored or compared uses full float32 (23 bits); training does not.
"""

import contextlib

import jax


def of(dtype: str) -> contextlib.AbstractContextManager[object]:
    """A context to enter inside a jitted function that computes in `dtype`.

    There it is part of the traced program and affects nothing outside it. 'bfloat16' keeps the
    platform's default.
    """
    if dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
