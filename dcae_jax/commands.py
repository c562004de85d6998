# SPDX-License-Identifier: Apache-2.0
"""Sub-commands of `dcae-jax` that are not jobs with a configuration."""

import difflib
import importlib

from dcae_jax.errors import UserError

# Sub-command -> its module, with main(arguments) -> exit status.
COMMANDS = {
    "app": "dcae_jax.serve.app",
    "checkpoint": "dcae_jax.checkpoints.__main__",
    "convert": "dcae_jax.pretrained.torch_io",
    "decode": "dcae_jax.serve.decode",
    "demo": "dcae_jax.demo.page",
    "encode": "dcae_jax.serve.encode",
    "models": "dcae_jax.jobs.variants",
    "reconstruct": "dcae_jax.serve.reconstruct",
    "sample": "dcae_jax.serve.sample",
    "status": "dcae_jax.jobs.status",
}


def run(name: str, arguments: list[str]) -> int:
    """Runs a sub-command; returns the exit status. Raises UserError."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}."
        raise UserError(f"{name!r} is not a command; {hint} A job starts with --config=FILE")
    return importlib.import_module(COMMANDS[name]).main(arguments)
