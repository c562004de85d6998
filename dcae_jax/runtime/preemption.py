# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a job at a safe point: SIGTERM from a cloud or scheduler, and Ctrl-C."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import jax

from dcae_jax.runtime import distributed, process

STATUS = 75  # exit status of a job that stopped early and resumes with the same command


@contextlib.contextmanager
def flag(all_processes: bool = False) -> Iterator[threading.Event | distributed.PreemptionSignal]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C exits at once.

    all_processes: all processes of the run call `is_set` equally often and get the same answer.
    """
    event = threading.Event()
    several = all_processes and jax.process_count() > 1
    asked = distributed.PreemptionSignal() if several else event
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    if several:  # JAX handles SIGTERM and notifies the other processes
        handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
    else:
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda *_: event.set())
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with _answer_interrupts():
            yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _answer_interrupts() -> Iterator[None]:
    """Responds to Ctrl-C at once: the first logs a line, the second ends the process.

    Python runs a signal handler between two bytecode instructions of the main thread, which may be
    minutes apart during a compile. A thread that reads the signal's number from a pipe does not
    wait for that.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def answer() -> None:
        seen = 0
        while number := os.read(read, 1):  # b"" once the other end is closed
            seen += number[0] == signal.SIGINT
            if number[0] == signal.SIGINT and seen == 1:
                logging.warning("Ctrl-C: saving, then stopping; press it again to exit at once")
            elif seen > 1:
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(process.INTERRUPTED)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(write)
        thread.join()
        os.close(read)
