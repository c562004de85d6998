# SPDX-License-Identifier: Apache-2.0
"""glibc malloc: settings for jobs at their start; what the library does changes none."""

import contextlib
import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep() -> bool:
    """Lets this process keep freed memory for its next allocation; False without glibc.

    XLA allocates its buffers on a CPU anew at each call. By default glibc returns blocks of that
    size to the kernel when they are freed, and each page is faulted in and cleared again: a fifth
    of the CPU time of f32c32's encoder (docs/benchmarks.md). The process stays as large as its
    largest moment. To be called before JAX starts its threads. One arena: what one thread frees,
    another one's program can take.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # The padding is beyond the need; untouched, it is free.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all(mallopt(*setting) for setting in settings)


def trim() -> None:
    """Returns to the system, once, what is free; changes no setting. Nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
