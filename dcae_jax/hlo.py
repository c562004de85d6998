# SPDX-License-Identifier: Apache-2.0
"""What a compiled program says of itself in its text: collectives, each as often as it runs."""

import collections
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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of the collectives that a chip runs in one call of the program.

    text: of the optimised HLO module. Bytes are of the whole array of each collective as one chip
    sees it: the larger of what it gives and what it gets. What is in a loop counts as often as the
    loop turns where XLA knows how often, else once.
    """
    bodies = _computations(text)
    totals: dict[str, Any] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for name, times in _calls(bodies).items():
        sizes: dict[str, int] = {}
        for result, rest in bodies[name]:
            shape, opcode, operands = _parts(rest)
            sizes[result] = _bytes(shape)
            kind = opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            given = sum(sizes.get(operand, 0) for operand in operands)
            # The result of an asynchronous one holds its operands too.
            got = sizes[result] - given if opcode.endswith("-start") else sizes[result]
            if opcode == "all-reduce-start":
                got = sizes[result]
            totals[kind]["count"] += times
            totals[kind]["bytes"] += times * max(given, got)
    return {kind: dict(total) for kind, total in sorted(totals.items())}


def _computations(text: str) -> dict[str, list[tuple[str, str]]]:
    """{computation: [(instruction, what stands right of the equals sign)]}; entry: ''."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            if header:
                current = found.setdefault("" if line.startswith("ENTRY") else header[1], [])
        elif current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                current.append((instruction[1], instruction[2]))
    return found


def _calls(bodies: dict[str, list[tuple[str, str]]]) -> dict[str, int]:
    """{computation: how often it runs in one call of the entry}."""
    times: dict[str, int] = collections.Counter()

    def visit(name: str, often: int) -> None:
        times[name] += often
        for _, rest in bodies[name]:
            called = _CALLED.findall(rest)
            for group in _BRANCHES.findall(rest):
                called += [part.strip().lstrip("%") for part in group.split(",")]
            known = _TRIPS.search(rest)
            for other in called:
                if other in bodies:
                    visit(other, often * (int(known[1]) if known else 1))

    visit("", 1)
    return times


def _parts(rest: str) -> tuple[str, str, list[str]]:
    """(shape, opcode, names of the operands) of an instruction."""
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple, which may hold tuples and layouts with brackets
        depth, end = 1, 1
        while depth and end < len(rest):
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
    shape, after = rest[:end], rest[end:].lstrip()
    opcode, _, inside = after.partition("(")
    return shape, opcode, re.findall(r"%([\w.\-]+)", inside.split(")", 1)[0])


def _bytes(shape: str) -> int:
    """Bytes of an array's or a tuple's shape; layouts in braces are not shapes."""
    total = 0
    for kind, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits[0]) if digits else 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total
