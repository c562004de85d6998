# SPDX-License-Identifier: Apache-2.0
"""What a compiled program's text says that XLA's own analysis does not: loops and collectives."""

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


def collective_bytes(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of the collectives that a chip runs in one call of the program.

    text: of the optimised HLO module. Bytes are of the whole array of each collective as one chip
    sees it: the larger of what it gives and what it gets. What is in a loop counts as often as the
    loop turns where XLA knows how often, else once.
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
                got -= given  # the result of an asynchronous one holds its operands too
            totals[kind]["count"] += times
            totals[kind]["bytes"] += times * max(given, got)
    return {kind: dict(total) for kind, total in sorted(totals.items())}


def repeated_bytes(text: str) -> int:
    """Bytes that loops read and write in their rounds after the first.

    XLA's own count of bytes accessed takes the body of a loop once. Counted as XLA does: what each
    instruction reads and writes, of a slice only the slice.
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
    given = [sizes.get(operand, 0) for operand in op.operands]
    if op.opcode == "dynamic-slice":
        return 2 * sizes[op.name]
    if op.opcode == "dynamic-update-slice":
        return 2 * given[1]
    inner = next((bodies[other] for other in op.called if other in bodies), None)
    if op.opcode != "fusion" or inner is None:
        return sizes[op.name] + sum(given)
    inside = {other.name: _bytes(other.shape) for other in inner}
    parameters = {int(other.number): other.name for other in inner if other.opcode == "parameter"}
    total, written = 0, sizes[op.name]
    for number, size in enumerate(given):
        name = parameters.get(number, "")
        users = [other for other in inner if name in other.operands]
        if users and all(user.opcode == "dynamic-slice" for user in users):
            size = sum(inside[user.name] for user in users)
        elif len(users) == 1 and users[0].opcode == "dynamic-update-slice":
            if users[0].operands[0] == name:  # in place: the update alone is read and written
                update = inside[users[0].operands[1]]
                size, written = 0, written - size + update
        total += size
    return total + max(written, 0)


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
    rounds: int  # of a loop, 1 where unknown
    number: str  # of a parameter


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
    """An instruction; `rest` is what stands right of its equals sign."""
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple, which may hold tuples and layouts with brackets
        depth, end = 1, 1
        while depth and end < len(rest):
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
    opcode, _, inside = rest[end:].lstrip().partition("(")
    inside = inside.split(")", 1)[0]
    called = _CALLED.findall(rest)
    for group in _BRANCHES.findall(rest):
        called += [part.strip().lstrip("%") for part in group.split(",")]
    known = _ROUNDS.search(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    rounds = int(known[1]) if known else 1
    return _Op(name, rest[:end], opcode, operands, tuple(called), rounds, inside)


def _times(bodies: _Bodies, *, fusions: bool) -> dict[str, int]:
    """{computation: how often it runs in one call of the entry}, with or without fused ones."""
    times: dict[str, int] = collections.Counter()

    def visit(name: str, often: int) -> None:
        times[name] += often
        for op in bodies[name]:
            if fusions or op.opcode in ("while", "conditional", "call", "async-start"):
                for other in op.called:
                    if other in bodies:
                        visit(other, often * op.rounds)

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
