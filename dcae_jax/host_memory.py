# SPDX-License-Identifier: Apache-2.0
"""What the C library does with memory that programs on the CPU give back."""

import ctypes
import functools

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD = 64 << 20  # bytes asked of the kernel beyond what is needed; untouched ones cost nothing


@functools.cache
def keep() -> bool:
    """Lets this process keep freed memory for its next allocation, as far as glibc is in use.

    XLA's buffers on a CPU are allocated anew by each call of a program. By default glibc returns
    blocks of that size to the kernel when they are freed, and every page of them is faulted in and
    cleared again at the next call, which takes a quarter of the time of f32c32's encoder
    (docs/benchmarks.md). The process stays as large as its largest moment. To be called before JAX
    starts its threads; those that run already keep giving back. Returns whether the setting was
    taken; elsewhere than with glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS, Windows
        return False
    return all(
        (
            mallopt(_M_MMAP_MAX, 0),
            mallopt(_M_TRIM_THRESHOLD, -1),
            mallopt(_M_TOP_PAD, _TOP_PAD),
            mallopt(_M_ARENA_MAX, 1),  # what one thread frees, another one's program can take
        )
    )
