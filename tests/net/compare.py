# SPDX-License-Identifier: Apache-2.0
"""What differs between two results of a case, beyond float32's rounding."""

import math
from collections.abc import Iterator
from typing import Any

# Of logged numbers: at step 1, and at step 20; a rounding grows from step to step.
FIRST, LAST = 2e-5, 1e-3
# Of a tensor's change since the start, relative to the rms of that change.
CHANGE = 2e-2
# A key's bias adds the same to a query's every score, which the softmax cancels: its gradient is
# rounding alone, which Adam scales to whole steps. Only its shape can be compared.
CANCELLED = "attn.qkv.bias[k]"
# Of an array that was computed at once, relative to its rms.
ARRAY = 5e-5
# Of one that was rounded, to levels of images or to a half-precision number, or whose solver
# chooses its steps: each value that falls on the other side counts.
ROUNDED = 1e-3
# Of numbers without steps.
VALUE = 1e-4
# Below this, in units of the quantity, everything is rounding.
FLOOR = 1e-6


def differences(recorded: dict[str, Any], found: dict[str, Any], exact: bool) -> list[str]:
    """One line for each difference. exact: digests of bytes are compared too."""
    if "error" in found:
        return [found["error"]]
    lines = []
    kinds = {"exact": _exact, "rows": _rows, "tensors": _tensors, "recipes": _recipes}
    for kind, compare in kinds.items():
        lines += compare(kind, recorded.get(kind), found.get(kind))
    lines += _arrays("arrays", recorded.get("arrays"), found.get("arrays"))
    lines += _values("values", recorded.get("values"), found.get("values"))
    if exact:
        lines += _exact("sha256", recorded.get("sha256"), found.get("sha256"))
    return lines


def _exact(where: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from _exact(f"{where}: {key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{where}:\n  recorded {a!r}\n  found    {b!r}"


def _recipes(where: str, a: dict | None, b: dict | None) -> Iterator[str]:
    """Configurations, recorded as their differences from ':', the default; new keys are fine."""
    a, b = a or {}, b or {}
    for name in a:
        if name not in b:
            yield f"{where}: {name} is gone"
            continue
        before, now = ({**side[":"], **side[name]} for side in (a, b))
        for key, value in before.items():
            if now.get(key) != value:
                yield f"{where}: {name}: {key} was {value!r}, is {now.get(key)!r}"


def _near(a: float, b: float, rtol: float, atol: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= atol + rtol * abs(a)


def _rows(where: str, a: list | None, b: list | None) -> Iterator[str]:
    a, b = a or [], b or []
    if [row["step"] for row in a] != [row["step"] for row in b]:
        yield f"{where}: steps {[row['step'] for row in a]} were {[row['step'] for row in b]}"
        return
    for before, now in zip(a, b, strict=True):
        if before.keys() != now.keys():
            yield f"{where}: metrics of step {now['step']} differ: {before.keys() ^ now.keys()}"
            return
        growth = (LAST / FIRST) ** (max(0, before["step"] - 1) / 19)
        for key, value in before.items():
            if not _near(value, now[key], FIRST * growth, FLOOR * growth):
                yield f"{where}: step {now['step']}: {key} was {value:.9g}, is {now[key]:.9g}"


def _tensors(
    where: str, a: dict | None, b: dict | None, tolerance: float = CHANGE
) -> Iterator[str]:
    a, b = a or {}, b or {}
    if "shape" not in a or "shape" not in b:
        if a.keys() != b.keys():
            yield f"{where}: {sorted(a.keys() ^ b.keys())} on one side only"
        for key in a.keys() & b.keys():
            yield from _tensors(f"{where}: {key}", a[key], b[key], tolerance)
        return
    if a["shape"] != b["shape"]:
        yield f"{where}: shape was {a['shape']}, is {b['shape']}"
        return
    if where.endswith(CANCELLED):
        return
    change = a["change"]
    if change == 0 or b["change"] == 0:
        if change != b["change"]:
            yield f"{where}: changed by {change:.3g}, now by {b['change']:.3g}"
        return
    atol = tolerance * change + 1e-9
    pairs = [("mean", a["mean"], b["mean"]), ("rms", a["rms"], b["rms"])]
    pairs += [("change", change, b["change"])]
    pairs += [
        ("projection", *pair) for pair in zip(a["projections"], b["projections"], strict=True)
    ]
    for name, before, now in pairs:
        if not _near(before, now, 0, atol):
            yield f"{where}: {name} was {before:.9g}, is {now:.9g} (change {change:.3g})"
            return


def _arrays(where: str, a: dict | None, b: dict | None) -> Iterator[str]:
    a, b = a or {}, b or {}
    for rounded, tolerance in ((True, ROUNDED), (False, ARRAY)):
        some = [{k: v for k, v in side.items() if _is_rounded(k) == rounded} for side in (a, b)]
        yield from _tensors(where, *some, tolerance=tolerance)


def _is_rounded(name: str) -> bool:
    """Images, latents in a file (by number), and what a model's own sampler makes."""
    return name.isdigit() or name in ("images", "npz", "png", "grid", "own")


def _values(where: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _values(f"{where}: {key}", a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from _values(f"{where}[{i}]", *pair)
    elif isinstance(a, float | int) and isinstance(b, float | int):
        if not _near(a, b, VALUE, FLOOR):
            yield f"{where} was {a:.9g}, is {b:.9g}"
    elif a != b:
        yield f"{where} was {a!r}, is {b!r}"
