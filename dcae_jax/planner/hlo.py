# SPDX-License-Identifier: Apache-2.0
"""Loops and collectives of a compiled program, parsed from its text; XLA's analysis omits them."""

import collections
import dataclasses
import math
import re
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")


def collective_bytes(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of the collectives that one chip runs per call of the program.

    text: the optimised HLO module. The bytes of a collective are the larger of its input and its
    output on one chip. A collective in a loop counts once per iteration if the trip count is known,
    else once; see `_rounds`.
    """
    bodies = _computations(text)
    totals: dict[str, Any] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for name, times in _times(bodies, fusions=True).items():
        sizes = {op.name: _bytes(op.shape) for op in bodies[name]}
        for op in bodies[name]:
            kind = op.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            given = sum(sizes.get(operand, 0) for operand in op.operands)
            got = sizes[op.name]
            if op.opcode != kind and op.shape.startswith("("):
                got -= given  # an asynchronous result also holds its operands
            totals[kind]["count"] += times
            totals[kind]["bytes"] += times * max(given, got)
    return {kind: dict(total) for kind, total in sorted(totals.items())}


def repeated_bytes(text: str) -> int:
    """Bytes that loops read and write in their iterations after the first.

    XLA's bytes accessed count a loop's body once. As in XLA, each instruction counts what it reads
    and writes; a slice counts only the slice.
    """
    bodies = _computations(text)
    return sum(
        (times - 1) * accessed_bytes(bodies, name)
        for name, times in _times(bodies, fusions=False).items()
        if times > 1
    )


def accessed_bytes(bodies: "_Bodies", name: str) -> int:
    """Bytes that the instructions of one computation read and write."""
    sizes = {op.name: _bytes(op.shape) for op in bodies[name]}
    return sum(_accessed(op, bodies, sizes) for op in bodies[name])


def _accessed(op: "_Op", bodies: "_Bodies", sizes: dict[str, int]) -> int:
    if op.opcode in _FREE or op.opcode.endswith("-done"):
        return 0
    if op.opcode == "custom-call" and not op.operands:  # allocates memory for a loop to fill
        return 0
    given = [sizes.get(operand, 0) for operand in op.operands]
    if op.opcode.endswith("-start") and op.shape.startswith("("):  # also holds its operands
        return sizes[op.name]
    if op.opcode in _SLICES:
        return 2 * sizes[op.name]
    if op.opcode == "dynamic-update-slice":
        return 2 * given[1]
    if op.opcode != "fusion" or not _fused(op, bodies):
        return sizes[op.name] + sum(given)
    uses = [_use(op, number, size, bodies) for number, size in enumerate(given)]
    read, kept = (sum(part) for part in zip(*uses, strict=True)) if uses else (0, 0)
    return read + max(sizes[op.name] - kept, 0)


def _fused(op: "_Op", bodies: "_Bodies") -> "list[_Op]":
    return next((bodies[name] for name in op.called if name in bodies), [])


def _use(fusion: "_Op", number: int, size: int, bodies: "_Bodies") -> tuple[int, int]:
    """(bytes read of a fusion's operand, bytes of it that are unchanged in the result).

    A sliced operand counts only the slice, an operand updated in place only the update, also in
    nested fusions.
    """
    inner = _fused(fusion, bodies)
    names = [op.name for op in inner if op.opcode == "parameter" and int(op.inside) == number]
    read = kept = 0
    while names:
        name = names.pop()
        for user in inner:
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in _SLICES:
                read += _bytes(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                update = next(op for op in inner if op.name == user.operands[1])
                kept += size - _bytes(update.shape)
            elif user.opcode == "fusion" and _fused(user, bodies):
                for place, operand in enumerate(user.operands):
                    if operand == name:
                        part = _use(user, place, size, bodies)
                        read, kept = read + part[0], kept + part[1]
            else:
                return size, 0
    return min(read, size), min(kept, size)


_SLICES = ("slice", "dynamic-slice")
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
)


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations
    condition: str  # of a loop: its condition computation
    rounds: int  # a loop's trip count from XLA; 0 if unknown
    inside: str  # the text in parentheses: a parameter's number, a constant's value
    counts_up: bool  # a comparison with LT


_Bodies = dict[str, list[_Op]]


def _computations(text: str) -> _Bodies:
    """{computation: its instructions}; the entry is ''."""
    found: _Bodies = {}
    current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            if header:
                current = found.setdefault("" if line.startswith("ENTRY") else header[1], [])
        elif current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                current.append(_op(instruction[1], instruction[2]))
    return found


def _op(name: str, rest: str) -> _Op:
    """An instruction; `rest` is the text after its equals sign."""
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple, which may contain tuples and layouts with parentheses
        depth, end = 1, 1
        while depth and end < len(rest):
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
    opcode, _, inside = rest[end:].lstrip().partition("(")
    inside = inside.split(")", 1)[0]
    called = _CALLED.findall(rest)
    for group in _BRANCHES.findall(rest):
        called += [part.strip().lstrip("%") for part in group.split(",")]
    known, condition = _ROUNDS.search(rest), _CONDITION.search(rest)
    return _Op(
        name=name,
        shape=rest[:end],
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        called=tuple(called),
        condition=condition[1] if condition else "",
        rounds=int(known[1]) if known else 0,
        inside=inside,
        counts_up="direction=LT" in rest,
    )


def _rounds(op: _Op, bodies: _Bodies) -> int:
    """A loop's trip count; 1 if `op` is not a loop or its count is unknown.

    XLA for TPUs writes no trip counts into its text. JAX's `scan` and `fori_loop` with fixed bounds
    count up by one, from 0 in this project, to a constant in the loop's condition.
    """
    if op.rounds or op.opcode != "while" or op.condition not in bodies:
        return op.rounds or 1
    inside = {other.name: other for other in bodies[op.condition]}
    last = bodies[op.condition][-1]
    bounds = [inside[name] for name in last.operands if name in inside]
    counted = last.opcode == "compare" and last.counts_up and len(bounds) == 2
    if not counted or bounds[1].opcode != "constant" or not bounds[1].inside.isdigit():
        return 1
    return max(int(bounds[1].inside), 1)


def _times(bodies: _Bodies, *, fusions: bool) -> dict[str, int]:
    """{computation: how often it runs per call of the entry}, with or without fused ones."""
    times: dict[str, int] = collections.Counter()

    def visit(name: str, often: int) -> None:
        times[name] += often
        for op in bodies[name]:
            if fusions or op.opcode in ("while", "conditional", "call", "async-start"):
                for other in op.called:
                    if other in bodies:
                        visit(other, often * _rounds(op, bodies))

    visit("", 1)
    return times


def _bytes(shape: str) -> int:
    """Bytes of an array's or a tuple's shape; layouts in braces are not shapes."""
    total = 0
    for kind, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits[0]) if digits else 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total
