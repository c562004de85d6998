# SPDX-License-Identifier: Apache-2.0
"""dcae-jax --config=phase1.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

dcae-jax COMMAND ...: app, checkpoint, convert, decode, demo, encode, models, reconstruct, sample or
status; see dcae-jax COMMAND --help.
`python -m dcae_jax.main` is the same. A config that is not a path is one of the bundled configs/.

Several processes: TPU pods, GKE, Slurm and Open MPI are recognised; elsewhere start each with
--coordinator=HOST:PORT --num_processes=N --process_id=I (docs/scaling_mesh.md).

Exit status: 0 done; 1 the machine failed or training diverged; 2 a mistake in the command, reported
in one line; 75 saved after SIGTERM or Ctrl-C: rerun the same command to resume; 130 ended by Ctrl-C
with nothing saved; 141 nobody reads the output any more (a pipe to head).
"""

import importlib
import signal
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from dcae_jax import commands, files
from dcae_jax import config as config_lib
from dcae_jax.config import schema, validate, validate_phases
from dcae_jax.errors import UserError
from dcae_jax.runtime import host_memory, preemption, process

# Job -> its check of the configuration, its module, and function (config, workdir) -> exit status.
JOBS = {
    "train": (validate, "train", "run"),
    "phases": (validate_phases, "train", "run_phases"),
    "encode": (validate, "encode", "run"),
    "sample": (validate, "sample", "run"),
    "evaluate": (validate, "evaluate", "run"),
    "export": (validate, "export", "run"),
    "plan": (validate, "plan", "run"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command, or the job that config.job names; returns the exit status."""
    process.note_start()
    process.set_up_logging()
    argv = sys.argv if argv is None else argv
    is_command = len(argv) > 1 and not argv[1].startswith("-")
    if {"--help", "-h"} & set(argv) and not is_command:
        sys.stdout.write(f"{__doc__}\nEvery KEY, with its meaning: {schema.__file__}\n")
        return 0
    try:
        if is_command:
            return commands.run(argv[1], argv[2:])
        host_memory.keep()  # before JAX starts threads, which would each have their own arena
        from dcae_jax.runtime import distributed as hosts

        given, argv = hosts.take_flags(argv)
        config, workdir = parse(argv)
        files.check_folder(workdir)  # before minutes of work
        process.choose_platform(cpu=config.job == "plan")
        process.use_compile_cache()
        hosts.initialize(given, preemptible=config.job in ("train", "phases", "sample"))
        hosts.assert_same_config(config_lib.flatten(config.to_dict()) | {"workdir": workdir})
        check, module, function = JOBS[str(config.job)]
        job = getattr(importlib.import_module(f"dcae_jax.jobs.{module}"), function)
        return job(check(config), workdir)
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)


def parse(argv: list[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of a command line. Raises UserError for any mistake in it."""
    values, argv = flags.FlagValues(), config_lib.locate_in(argv)
    flag = config_flags.DEFINE_config_file(
        "config", None, "a file of configs/, with :VARIANT", values, sys_argv=argv
    )
    workdir = flags.DEFINE_string("workdir", None, "folder or bucket for the run's files", values)
    try:
        rest = values(argv)
        config = flag.value
        if config is None:
            raise UserError("--config is missing; name a file, as in --config=configs/phase1.py")
        job = config.job
    except UserError:
        raise
    except config_lib.MISTAKES as error:
        raise UserError(config_lib.explain(error, argv)) from error
    if len(rest) > 1:
        hint = config_lib.key_flag(rest[1]) or "write --config.KEY=VALUE"
        raise UserError(f"{rest[1]!r} is not a flag; {hint}")
    if not workdir.value and not (job == "export" and config.export.out):
        raise UserError("--workdir is missing; name a folder for the run's files")
    files.check(workdir.value or "", "--workdir")
    if job not in JOBS:
        raise UserError(f"job={job!r} is not known; choose one of {', '.join(JOBS)}")
    return config, files.absolute(workdir.value or config.export.out)


def console() -> int:
    """The script `dcae-jax`."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the shutdown
    if status == preemption.STATUS:
        # Everything is saved. Ignore SIGTERM during shutdown so that the exit status stays 75.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(console())
