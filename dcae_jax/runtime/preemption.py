# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, with which clouds and schedulers announce that a machine is taken away."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax

from dcae_jax.runtime import distributed

STATUS = 75  # exit status of a job that stopped early and resumes with the same command


@contextlib.contextmanager
def flag(all_processes: bool = False) -> Iterator[threading.Event | distributed.PreemptionSignal]:
    """An event that SIGTERM sets meanwhile, so that a job can stop where it is safe.

    all_processes: all processes of the run ask `is_set` equally often, and are told alike.
    """
    if all_processes and jax.process_count() > 1:
        yield distributed.PreemptionSignal()
        return
    event, old = threading.Event(), None
    if threading.current_thread() is threading.main_thread():
        old = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)
