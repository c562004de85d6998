# SPDX-License-Identifier: Apache-2.0
"""Keys that a resumed run must share with the run it continues."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dcae_jax.config.schema import Config, Model

IDENTITY = (
    "model",
    "trainable",
    "loss",
    "distill",
    "structured",
    "augment",
    "optimizer",
    "ema_decay",
    "ema_warmup",
    "accumulate",
    "data",
    "seed",
    "batch_size",
    "resolution",
    "resolutions",
    "dtype",
    "patch_size",
    "objective",
    "label_dropout",
    "meanflow",
)
# ... except these, which only change how fast the same batches are read.
NOT_IDENTITY = ("data.workers", "data.threads", "data.prefetch")
SCHEDULE = "optimizer.schedule"


def to_json(config: Config | Model) -> dict[str, Any]:
    """The configuration (or a section) as JSON values: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'loss.l1_weight': 1.0, ...} of nested mappings."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def identity_changes(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of the identity keys that differ between two `to_json` results.

    `steps` is one of them under a cosine schedule, which ends there. A key that `before` lacks has
    its default there: an older version wrote it, which trained as the default of a new key does.
    """
    flat_before, flat_now = flatten(to_json(Config())) | flatten(before), flatten(now)
    cosine = "cosine" in (flat_before.get(SCHEDULE), flat_now.get(SCHEDULE))
    identity = (*IDENTITY, "steps") if cosine else IDENTITY
    changes = {}
    for key in sorted(flat_before.keys() | flat_now.keys()):
        if not any(key == top or key.startswith(f"{top}.") for top in identity):
            continue
        if key not in NOT_IDENTITY and flat_before.get(key) != flat_now.get(key):
            changes[key] = (flat_before.get(key), flat_now.get(key))
    return changes
