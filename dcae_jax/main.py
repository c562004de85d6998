# SPDX-License-Identifier: Apache-2.0
"""python -m dcae_jax.main --config=configs/phase1.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

Exit status: 0 done; 1 the machine failed or training diverged; 2 a mistake in the command, told
in one line; 75 saved after SIGTERM, and the same command resumes.
"""

import importlib
import logging
import os
import sys

from absl import flags
from ml_collections import config_flags

from dcae_jax.config import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/, and its :VARIANT")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and pictures")

# Job -> module and function (config, workdir) -> exit status.
JOBS = {
    "train": ("train", "run"),
    "phases": ("train", "run_phases"),
    "evaluate": ("evaluate", "run"),
}

FAILED, MISTAKE = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Runs the job that config.job names; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Libraries that report every step of their own work.
    for name in ("absl", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        config, workdir = parse(sys.argv if argv is None else argv)
        use_compile_cache()
        module, function = JOBS[config.job]
        return getattr(importlib.import_module(f"dcae_jax.{module}"), function)(config, workdir)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except Exception as error:
        if type(error).__name__ != "Diverged":
            raise
        sys.stderr.write(f"error: {error}\n")
        return FAILED


def parse(argv: list[str]):
    """(config, workdir) of a command line. Raises UserError for whatever is wrong with it."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(one_line(error)) from error
    config = CONFIG.value
    if config is None:
        raise UserError(
            "--config is missing; name a file of configs/, as in --config=configs/phase1.py"
        )
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --config.KEY=VALUE")
    if not WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run's files")
    if config.job not in JOBS:
        raise UserError(f"job={config.job!r} is not known; choose one of {', '.join(JOBS)}")
    return config, os.path.abspath(os.path.expanduser(WORKDIR.value))


def one_line(error: Exception) -> str:
    """The message of an error of the flags library, on one line."""
    return " ".join(str(error.args[0] if error.args else error).split())


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "dcae_jax", "xla"))


if __name__ == "__main__":
    sys.exit(main())
