# SPDX-License-Identifier: Apache-2.0
"""glibc malloc settings: jobs set them at their start, library calls never do."""

import contextlib
import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep() -> bool:
    """Makes this process keep freed memory for later allocations; False without glibc.

    On a CPU, XLA allocates its buffers at each call. By default glibc returns freed blocks of that
    size to the kernel, and each page is faulted in and zeroed again: a fifth of the CPU time of
    f32c32's encoder (docs/benchmarks.md). The process stays at its peak size. Call this before JAX
    starts its threads. With one arena, a thread can reuse what another one freed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # The padding is larger than needed; untouched pages cost nothing.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all(mallopt(*setting) for setting in settings)


def trim() -> None:
    """Returns free memory to the system, once; changes no setting. No-op without glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
