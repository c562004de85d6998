# SPDX-License-Identifier: Apache-2.0
"""What the record says in words that were changed on purpose since: (then, now, why).

The record itself is never edited for these. An entry that no recorded message has is an error.
"""

import json
from typing import Any

WORDS = (
    # Modules and files moved.
    ("dcae_jax/config.py", "dcae_jax/config/schema.py"),
    # Sub-commands of the one command line.
    ("python -m dcae_jax.torch_io", "dcae-jax convert"),
    # The key `phase` is gone: what starts from weights says so itself.
    ("and phase 1 starts from weights", "and this configuration starts from weights"),
    ("and phase 2 starts from weights", "and this configuration starts from weights"),
    ("and phase 3 starts from weights", "and this configuration starts from weights"),
    # Every key has its choices and bounds in one place, which are told before what it needs.
    (
        "data.source='photos': objective='guess' learns latents; run configs/encode.py, then set "
        "data.source=latents and data.path to its workdir",
        "objective='guess' is not known; choose one of , epsilon, learned_sigma, flow",
    ),
    (
        "mesh (data=-2, fsdp=1, tensor=1, spatial=1): sizes must be positive, and one at most may "
        "be -1",
        "mesh.data=-2 must be in [-1, 2147483647]",
    ),
    # A section's keys stand in its own order, no longer in the alphabet's.
    (
        "{'data': -1, 'fsdp': 1, 'spatial': 2, 'tensor': 1}",
        "{'data': -1, 'fsdp': 1, 'tensor': 1, 'spatial': 2}",
    ),
)
# safetensors are read by the library of that name, whose reasons are its own: REASON.
REASONS = (
    (
        "SPACE/empty.safetensors cannot be read (cannot mmap an empty file); check the path",
        "SPACE/empty.safetensors is no readable safetensors (REASON); fetch it again",
    ),
    (": only 3 bytes;", " (REASON);"),
    (": its header claims 1000000000 bytes;", " (REASON);"),
    (": its header of 100 bytes is cut off at 10;", " (REASON);"),
    (": its header is no JSON;", " (REASON);"),
    (": its header is no JSON object;", " (REASON);"),
    (": a has shape [1e+99];", " (REASON);"),
    (": a of shape [3] takes 12 bytes, not [0, 8];", " (REASON);"),
    (": a ends at byte 1200 of 16: cut off;", " (REASON);"),
    (": a has dtype 'F7';", " (REASON);"),
    (": a and b overlap;", " (REASON);"),
)


def today(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded case in the words of today."""
    return {**recorded, "exact": _words(recorded["exact"])} if "exact" in recorded else recorded


def _words(tree: Any) -> Any:
    if isinstance(tree, str):
        for then, now in (*WORDS, *REASONS):
            tree = tree.replace(then, now)
        return tree
    if isinstance(tree, dict):
        return {key: _words(value) for key, value in tree.items()}
    return [_words(value) for value in tree] if isinstance(tree, list) else tree


def unused(record: dict[str, Any]) -> list[str]:
    """Entries that change nothing in the record."""
    text = json.dumps([result.get("exact") for result in record.values()])
    return [then for then, _ in (*WORDS, *REASONS) if json.dumps(then)[1:-1] not in text]
