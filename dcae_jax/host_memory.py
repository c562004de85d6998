# SPDX-License-Identifier: Apache-2.0
"""What the C library does with memory that programs on the CPU give back."""

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_MIB = 1 << 20
_BLOCKS = 65536  # glibc's default of M_MMAP_MAX
_ALIGNED = 64  # bytes, what XLA's CPU client asks of an array that it takes over


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's; None with another C library (musl, macOS, Windows)."""
    try:
        return ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return None


@functools.cache
def keep() -> bool:
    """Lets this process keep freed memory for its next allocation, as far as glibc is in use.

    XLA's buffers on a CPU are allocated anew by each call of a program. By default glibc returns
    blocks of that size to the kernel when they are freed, and every page of them is faulted in and
    cleared again at the next call, which takes a quarter of the time of f32c32's encoder
    (docs/benchmarks.md). The process stays as large as its largest moment. To be called before JAX
    starts its threads; those that run already keep giving back. Returns whether the setting was
    taken; elsewhere than with glibc nothing happens.

    One arena: what one thread frees, another one's program can take.
    """
    return bool(_mallopt()) and bool(_mallopt()(_M_ARENA_MAX, 1)) and _keep()


def _keep() -> bool:
    mallopt = _mallopt()
    return all(
        (
            mallopt(_M_MMAP_MAX, 0),
            mallopt(_M_TRIM_THRESHOLD, -1),
            mallopt(_M_TOP_PAD, 64 * _MIB),  # beyond the need; untouched, it is free
        )
    )


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Large blocks that are freed meanwhile, or allocated meanwhile and freed later, go back to
    the system at once.

    Orbax decodes arrays in threads. Kept, what each frees would be half the size of the weights
    and more.
    """
    mallopt = _mallopt()
    if not mallopt:
        yield
        return
    mallopt(_M_MMAP_MAX, _BLOCKS)
    mallopt(_M_MMAP_THRESHOLD, _MIB // 4)
    try:
        yield
    finally:
        # What glibc's own adjustment reaches in a program with arrays as large as weights.
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)
        if keep.cache_info().currsize:
            _keep()


def owned(value: np.ndarray) -> np.ndarray:
    """A float32 copy in C order that JAX on a CPU takes over as it is, to be written no more.

    What NumPy allocates begins where XLA cannot use it, so JAX copies it a second time and its
    threads free the first copy when they find the time.
    """
    size = 4 * math.prod(value.shape)
    room = np.empty(size + _ALIGNED, np.uint8)
    first = -room.ctypes.data % _ALIGNED
    copy = room[first : first + size].view(np.float32).reshape(value.shape)
    copy[...] = value
    return copy
