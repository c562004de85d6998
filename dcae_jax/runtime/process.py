# SPDX-License-Identifier: Apache-2.0
"""Process set-up of a command (logging, compile cache), which no library call does.

Also its exit status, and the one line for an error that is not a bug.
"""

import argparse
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from dcae_jax import errors, files
from dcae_jax.errors import UserError

# Exit statuses, beside preemption.STATUS.
DONE = 0
FAILED = 1  # the machine failed, or training diverged
MISTAKE = 2  # user error
INTERRUPTED = 130  # Ctrl-C with nothing saved: 128 + SIGINT, as in shells
UNREAD = 141  # whoever read the output has stopped, as `| head` does: 128 + SIGPIPE

_started: float | None = None


def failure(error: BaseException) -> int:
    """Writes one line about `error` to stderr and returns the exit status. A bug is re-raised."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("interrupted; rerun the same command\n")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        return UNREAD
    status, line = FAILED, errors.explain(error)
    if isinstance(error, errors.UserError):
        status, line = MISTAKE, str(error)
    if line is None:
        raise error
    sys.stderr.write(f"error: {line}\n")
    return status


def age() -> float:
    """Seconds since this process started, to 10 ms; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):  # not Linux
        return 0.0


def note_start() -> None:
    """Notes that this process runs a command, whose time counts from the process's start."""
    global _started
    _started = time.perf_counter() - age()


def take_start() -> float:
    """When the command began, by time.perf_counter, for the first job of it that asks; else now."""
    global _started
    started, _started = _started, None
    return time.perf_counter() if started is None else started


def has_tpu() -> bool:
    """Whether this machine has TPU chips."""
    return _has_device("accel[0-9]*", "vfio/[0-9]*")


def _has_device(*patterns: str) -> bool:
    return any(any(Path("/dev").glob(pattern)) for pattern in patterns)


def set_up_logging() -> None:
    """Logs plain lines to stderr. Replaces handlers that libraries installed on import."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    if not has_tpu() and "JAX_LOGGING_LEVEL" not in os.environ:
        # JAX looks for a TPU on every machine and logs at INFO that there is none.
        logging.getLogger("jax").setLevel(logging.WARNING)
    # Orbax and Grain log through absl: each internal step, and a page for each thread that fails.
    # Failures still raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_closed_loops


def _without_closed_loops(failure: "sys.UnraisableHookArgs") -> None:
    """Suppresses what TensorStore's threads print for each array after a failed save."""
    value = failure.exc_value
    if not (isinstance(value, RuntimeError) and str(value) == "Event loop is closed"):
        sys.__unraisablehook__(failure)


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a sub-command's arguments. Wrong arguments raise a one-line UserError.

    description: a module's docstring, with an example of each use.
    """
    made = argparse.ArgumentParser(
        prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def fail(message: str) -> NoReturn:
        raise UserError(f"{prog}: {message}; see {prog} --help")

    made.error = fail
    return made


def choose_platform(cpu: bool = False) -> None:
    """Restricts JAX to the CPU if `cpu`, or if this machine has libtpu but no accelerator.

    libtpu, installed for the job `plan`, would print a page of errors about the missing TPU.
    """
    import jax

    useless = importlib.util.find_spec("libtpu") is not None and not has_tpu()
    useless = useless and not _has_device("nvidia[0-9]*", "kfd", "dxg")
    if cpu or (useless and not os.environ.get("JAX_PLATFORMS")):
        jax.config.update("jax_platforms", "cpu")


def use_compile_cache() -> None:
    """Caches compiled programs in the user's cache folder, unless JAX has another one set."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", files.cache_folder("xla"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # By default JAX does not cache what compiles in under a second, and a start has many.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
