# SPDX-License-Identifier: Apache-2.0
"""python -m dcae_jax.main --config=configs/phase1.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

Several processes: TPU pods, GKE, Slurm and Open MPI are recognised; elsewhere start each with
--coordinator=HOST:PORT --num_processes=N --process_id=I (docs/scaling_mesh.md).

Exit status: 0 done; 1 the machine failed or training diverged; 2 a mistake in the command, told
in one line; 75 saved after SIGTERM, and the same command resumes.
"""

import importlib
import logging
import os
import signal
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from dcae_jax import config as config_lib
from dcae_jax import failures, host_memory, preemption
from dcae_jax.config import UserError

# Job -> module and function (config, workdir) -> exit status.
JOBS = {
    "train": ("train", "run"),
    "phases": ("train", "run_phases"),
    "encode": ("encode", "run"),
    "sample": ("sample", "run"),
    "evaluate": ("evaluate", "run"),
    "export": ("export", "run"),
    "plan": ("plan", "run"),
}

FAILED, MISTAKE = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Runs the job that config.job names; returns the exit status."""
    set_up_logging()
    host_memory.keep()  # before JAX starts threads, each of which would have memory of its own
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(f"{__doc__}\nEvery KEY, with its meaning: {config_lib.__file__}\n")
        return 0
    try:
        from dcae_jax import hosts

        given, argv = hosts.take_flags(argv)
        config, workdir = parse(argv)
        use_compile_cache()
        hosts.initialize(given, preemptible=config.job in ("train", "phases", "sample"))
        hosts.assert_same_config(config_lib.flatten(config) | {"workdir": workdir})
        module, function = JOBS[config.job]
        return getattr(importlib.import_module(f"dcae_jax.{module}"), function)(config, workdir)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except Exception as error:
        line = failures.explain(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return FAILED


def set_up_logging() -> None:
    """Plain lines on stderr. Whatever a library installed at its import is replaced."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # Orbax and Grain log through absl, each step of their own work and a page for each thread
    # that fails; what fails still raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def parse(argv: list[str]) -> tuple[Any, str]:
    """(config, workdir) of a command line. Raises UserError for whatever is wrong with it."""
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file(
        "config", None, "a file of configs/, with :VARIANT", values, sys_argv=argv
    )
    workdir = flags.DEFINE_string("workdir", None, "folder for the run's files", values)
    try:
        rest = values(argv)
        config = flag.value
        if config is None:
            raise UserError("--config is missing; name a file, as in --config=configs/phase1.py")
        job = config.job
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(config_lib.explain(error, argv)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --config.KEY=VALUE")
    if not workdir.value and not (job == "export" and config.export.out):
        raise UserError("--workdir is missing; name a folder for the run's files")
    if job not in JOBS:
        raise UserError(f"job={job!r} is not known; choose one of {', '.join(JOBS)}")
    return config, os.path.abspath(os.path.expanduser(workdir.value or config.export.out))


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "dcae_jax", "xla"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # By default what compiles in less than a second is not kept, and a start has many.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    status = main()
    if status == preemption.STATUS:
        # All is saved. A second signal while Python winds up must not change what is told.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)
