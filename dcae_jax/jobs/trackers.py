# SPDX-License-Identifier: Apache-2.0
"""Trackers of metric rows: the one of `config.tracker` is the user's own (docs/training.md)."""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dcae_jax import config as config_lib
from dcae_jax.config import Config
from dcae_jax.errors import UserError

Tracker = Callable[[int, Mapping[str, float]], None]  # takes a row: (step, {name: value})


def configured(config: Config, workdir: str) -> tuple[Tracker, ...]:
    """The tracker that config.tracker names, on process 0. Raises UserError.

    FILE.py:FUNCTION is called with (configuration as JSON values, workdir) and returns the tracker.
    """
    if not config.tracker or jax.process_index():
        return ()
    start = _function(config.tracker)
    try:
        track = start(config_lib.to_json(config), workdir)
    except Exception as error:
        raise UserError(f"tracker={config.tracker!r} failed: {error!r}; repair it") from error
    return (_forgiving(track, config.tracker),)


def _function(name: str) -> Callable[[dict[str, Any], str], Tracker]:
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("tracker", os.path.expanduser(path))
    if not os.path.isfile(os.path.expanduser(path)) or spec is None or spec.loader is None:
        raise UserError(f"tracker={name!r} is not FILE.py:FUNCTION of a file that exists")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"tracker={name!r} cannot be imported: {error!r}; repair it") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"tracker={name!r}: {path} has no function {function!r}")
    return getattr(module, function)


def _forgiving(track: Tracker, name: str) -> Tracker:
    """`track`, whose errors are logged, the first with its reason: they never end a run."""
    failed = 0

    def tried(step: int, row: Mapping[str, float]) -> None:
        nonlocal failed
        try:
            track(step, row)
        except Exception as error:
            failed += 1
            if failed == 1:
                logging.warning("tracker=%r failed at step %d: %r; training on", name, step, error)

    return tried
