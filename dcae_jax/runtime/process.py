# SPDX-License-Identifier: Apache-2.0
"""What a command sets up for its own process, and no library call does: logs, compile cache."""

import argparse
import logging
import os
import sys
from typing import NoReturn

from dcae_jax.errors import UserError

# Exit statuses, beside preemption.STATUS.
DONE = 0
FAILED = 1  # the machine failed, or training diverged
MISTAKE = 2  # of the user


def set_up_logging() -> None:
    """Plain lines on stderr. Whatever a library installed at its import is replaced."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # Orbax and Grain log through absl, each step of their own work and a page for each thread
    # that fails; what fails still raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_closed_loops


def _without_closed_loops(failure: "sys.UnraisableHookArgs") -> None:
    """Leaves out what TensorStore's threads print, array by array, after a save has failed."""
    value = failure.exc_value
    if not (isinstance(value, RuntimeError) and str(value) == "Event loop is closed"):
        sys.__unraisablehook__(failure)


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a sub-command's arguments. A mistake in them raises UserError, on one line.

    description: a module's docstring, whose first lines are an example of each use.
    """
    made = argparse.ArgumentParser(
        prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def fail(message: str) -> NoReturn:
        raise UserError(f"{prog}: {message}; see {prog} --help")

    made.error = fail
    return made


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "dcae_jax", "xla"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # By default what compiles in less than a second is not kept, and a start has many.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
