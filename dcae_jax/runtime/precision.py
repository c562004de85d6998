# SPDX-License-Identifier: Apache-2.0
"""Matmul precision of float32, decided in one place.

By default XLA multiplies float32 in TF32 on GPUs (10 bits of mantissa) and in bfloat16 on TPUs (7).
Whatever is reported, stored or compared is computed with float32's own 23; training is not.
"""

import contextlib

import jax


def of(dtype: str) -> contextlib.AbstractContextManager[object]:
    """A context to enter inside a jitted function that computes in `dtype`.

    Entered there and not around the call, it is part of the program, whoever traces it, and no
    operation outside the program is touched. 'bfloat16': the platform's own precision.
    """
    if dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
