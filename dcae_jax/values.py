# SPDX-License-Identifier: Apache-2.0
"""What the value of a key may be: types inside tuples, finite numbers, and bounds.

The types of single values are those of config.py's defaults, which ml_collections keeps.
"""

import math
from typing import Any

MOST = 2**31 - 1  # counters and sizes are int32 on the devices

# Key -> (least, most), both allowed.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "label_dropout": (0, 1),
    "model.latent_channels": (0, 2**16),
    "model.scaling_factor": (0, 1e6),
    "model.depth": (0, 1000),
    "model.width": (0, 2**16),
    "model.heads": (0, 2**12),
    "model.latent_size": (0, 2**12),
    "model.num_classes": (0, MOST),
    "optimizer.warmup_from": (0, 1),
    "data.rotation": (0, 180),
    "data.color_jitter": (0, 1),
    "mesh.data": (-1, MOST),
    "mesh.fsdp": (-1, MOST),
    "mesh.tensor": (-1, MOST),
    "mesh.spatial": (-1, MOST),
    "plan.watts": (0, 1e6),
}
# Key -> (bound that it must be above, bound that it must be below).
BETWEEN: dict[str, tuple[float, float]] = {
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.eps": (0, 1),
    "loss.gan_learning_rate": (0, math.inf),
}
# Key -> (least, below).
HALF_OPEN: dict[str, tuple[float, float]] = {
    "ema_decay": (0, 1),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "data.held_out": (0, 1),
}
# Key of a tuple -> (type of its entries, least, most).
NUMBERS: dict[str, tuple[type, float, float]] = {
    "resolutions": (int, 1, 2**16),
    "evaluate.resolutions": (int, 1, 2**16),
    "model.widths": (int, 1, 2**16),
    "model.encoder_depths": (int, 0, 1000),
    "model.decoder_depths": (int, 0, 1000),
    "profile_steps": (int, 1, MOST),
    "sample.labels": (int, 0, MOST),
    "data.crop_area": (float, 0, 1),
    "sample.guidance_interval": (float, 0, 1),
}
TEXTS = ("trainable", "allow_change", "optimizer.decay", "plan.overrides", "plan.topologies")
PAIRS = ("data.crop_area", "sample.guidance_interval", "profile_steps")


def problem(flat: dict[str, Any]) -> str:
    """What is wrong with {key: value}, naming the key and the remedy; '' if nothing is."""
    for key, value in flat.items():
        if isinstance(value, list | tuple):
            text = _tuple_problem(key, tuple(value))
        else:
            text = _number_problem(key, value)
        if text:
            return text
    return ""


def _number_problem(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        wanted = key in BOUNDS or key in BETWEEN or key in HALF_OPEN
        return f"{key}={value!r} must be a number" if wanted else ""
    if not math.isfinite(value):
        return f"{key}={value} is not finite; give a number"
    if key in BOUNDS:
        low, high = BOUNDS[key]
        if not low <= value <= high:
            return f"{key}={value} must be in [{low}, {high}]"
    if key in BETWEEN:
        low, high = BETWEEN[key]
        if not low < value < high:
            return f"{key}={value} must be above {low}" + (
                f" and below {high}" if math.isfinite(high) else ""
            )
    if key in HALF_OPEN:
        low, high = HALF_OPEN[key]
        if not low <= value < high:
            return f"{key}={value} must be in [{low}, {high})"
    if isinstance(value, int) and value > MOST and key != "seed":
        return f"{key}={value} is too large; the most is {MOST}"
    return ""


def _tuple_problem(key: str, value: tuple) -> str:
    if key in PAIRS and len(value) not in ((0, 2) if key == "profile_steps" else (2,)):
        return f"{key}={value!r} must be two numbers"
    if key in NUMBERS:
        kind, low, high = NUMBERS[key]
        for entry in value:
            right = isinstance(entry, int if kind is int else int | float)
            if not right or isinstance(entry, bool) or not low <= entry <= high:
                what = "whole numbers" if kind is int else "numbers"
                return f"{key}={value!r}: {entry!r} is none of {what} in [{low}, {high}]"
    if key in TEXTS:
        for entry in value:
            if not isinstance(entry, str) or not entry:
                return f"{key}={value!r}: {entry!r} is no text; write ('...',)"
    if key == "sharding":
        for entry in value:
            texts = isinstance(entry, list | tuple) and len(entry) == 2
            if not texts or not all(isinstance(part, str) for part in entry):
                return f"{key}: {entry!r} is no pair (path pattern, rule)"
    if key == "data.parts":
        for entry in value:
            if not isinstance(entry, list | tuple) or len(entry) != 3 or isinstance(entry[0], str):
                return f"{key}: {entry!r} must be (weight, source, path)"
    return ""
