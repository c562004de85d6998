# SPDX-License-Identifier: Apache-2.0
"""Config files: loading, and one-line errors of the flags library."""

import difflib
import importlib.util
import os
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from dcae_jax.config import identity, schema
from dcae_jax.errors import UserError

PHASES = ("phase1", "phase2", "phase3")  # of the job `phases`, in order; also their folders

# The folder of the configuration files: within a wheel, or beside the package in a clone.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = next(
    (
        folder
        for place in (_PACKAGE, os.path.dirname(_PACKAGE))
        if os.path.isfile(os.path.join(folder := os.path.join(place, "configs"), "phase1.py"))
    ),
    "configs",
)

# Exceptions that parsing raises for a user's mistakes.
MISTAKES = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


def locate(file: str) -> str:
    """`file` (PATH or PATH:VARIANT), or the file of this name in SHIPPED if PATH does not exist.

    Docs and messages name configs/, a folder that a wheel's user does not have: both 'phase1.py'
    and 'configs/phase1.py' are found.
    """
    path, colon, variant = file.partition(":")
    name = path.removeprefix("configs/")
    shipped = os.path.join(SHIPPED, name)
    if os.path.exists(path) or os.path.dirname(name) or not os.path.isfile(shipped):
        return file
    return shipped + colon + variant


def locate_in(argv: Sequence[str]) -> list[str]:
    """`argv` with its --config file located."""
    located, is_file = [], False
    for argument in argv:
        flag, equals, file = argument.partition("=")
        names = flag in ("--config", "-config")
        if is_file:
            argument = locate(argument)
        elif names and equals:
            argument = f"{flag}={locate(file)}"
        is_file = names and not equals
        located.append(argument)
    return located


def load_file(path: str, variant: str | None = None) -> ConfigDict:
    """The ConfigDict of the file `path`, for a job that runs other jobs."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise UserError(f"no config file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def parse_file(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The ConfigDict of `--config=file --config.KEY=VALUE ...`. Raises UserError."""
    values = flags.FlagValues()
    argv = [
        "config",
        f"--config={locate(file)}",
        *(f"--config.{override}" for override in overrides),
    ]
    flag = config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    try:
        values(argv)
        _ = flag.value.job  # the first access raises the error of a file that did not load
        return flag.value
    except UserError:
        raise
    except MISTAKES as error:
        raise UserError(explain(error, argv)) from error


def explain(error: BaseException, argv: Sequence[str]) -> str:
    """The cause of an error of the flags library, in one line.

    The library wraps a config file's own error; the innermost one is the cause. For an unknown key
    in `argv`, suggests the nearest keys; for a flag that is a key, the flag to write.
    """
    if unknown := unknown_key(error, argv):
        return unknown
    if isinstance(error, flags.UnrecognizedFlagError) and (hint := key_flag(error.flagvalue)):
        return f"there is no flag --{error.flagname}; {hint}"
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())


def unknown_key(error: BaseException, argv: Sequence[str]) -> str:
    """The message for an unknown key, with suggestions; '' for any other error."""
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else None
    if not isinstance(inner, KeyError):
        return ""
    last = str(inner.args[0]).split("'")[1]  # the library reports no more
    keys = [a.partition("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
    key = next((key for key in keys if last in key.split(".")), last)
    if key in schema.known_keys(schema.Config):
        within = ", ".join(f"{phase}.{key}" for phase in PHASES)
        return f"there is no key {key} in a chain of phases; each has its own: {within}"
    return f"there is no key {key}; {suggest(key)}"


def key_flag(argument: str) -> str:
    """The flag to write instead of `argument` ('--KEY=VALUE') if it resembles a key; else ''."""
    name, equals, value = argument.lstrip("-").partition("=")
    near = _nearest(name.replace("-", "_"), cutoff=0.8)
    if not near:
        return ""
    return f"write --config.{near[0]}={value if equals else 'VALUE'}"


def _nearest(key: str, cutoff: float) -> list[str]:
    """The keys closest to `key`, best first."""
    known = identity.flatten(schema.default().to_dict())
    return difflib.get_close_matches(key, known, n=3, cutoff=cutoff)


def suggest(key: str) -> str:
    """A sentence with the keys nearest to an unknown `key`."""
    near = _nearest(key, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "see dcae_jax/config/schema.py for the keys"
