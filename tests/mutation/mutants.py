# SPDX-License-Identifier: Apache-2.0
"""Small faults in a module's arithmetic: other constants, operators, comparisons; terms dropped."""

import ast
import copy
import dataclasses
from collections.abc import Iterator

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
CALLS = {"min": "max", "minimum": "maximum", "mean": "sum", "floor": "ceil", "expm1": "exp"}
CALLS |= {"log1p": "log"}
CALLS |= {new: old for old, new in CALLS.items()}
DROPPED = {"sqrt", "square", "abs", "exp", "log", "clip", "maximum", "minimum", "stop_gradient"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: the node (in the order of ast.walk), which of its faults, and both in words."""

    node: int
    variant: int
    line: int
    words: str


def of(source: str) -> list[Mutant]:
    """All mutants of a module; texts, annotations and error messages are left alone."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    skipped = set()
    for node in nodes:
        if isinstance(node, ast.Raise | ast.JoinedStr):
            parts = [node]
        else:
            names = ("annotation", "returns", "decorator_list")
            parts = [part for name in names for part in _list(getattr(node, name, None))]
        skipped.update(id(inner) for part in parts for inner in ast.walk(part))
    axes = [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "axis"]
    skipped.update(id(n) for n in axes if isinstance(n, ast.Constant) and n.value is None)
    out = []
    for i, node in enumerate(nodes):
        if id(node) not in skipped:
            for j, new in enumerate(_faults(node, node in axes)):
                words = f"{ast.unparse(node)} -> {ast.unparse(new)}"
                column = getattr(node, "col_offset", 0)
                out.append(Mutant(i, j, getattr(node, "lineno", 0), f"{column}: {words}"))
    return out


def apply(source: str, mutant: Mutant) -> str:
    """The module with the fault."""
    tree = ast.parse(source)
    target = list(ast.walk(tree))[mutant.node]
    new = list(_faults(target, True))[mutant.variant]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


def _list(value: object) -> list[ast.AST]:
    return value if isinstance(value, list) else [value] if isinstance(value, ast.AST) else []


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _faults(node: ast.AST, axis: bool) -> Iterator[ast.AST]:
    """The node with one fault each."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for value in dict.fromkeys((node.value * 2, node.value + 1, 0)):
            if value != node.value:
                yield _with(node, value=value)
    elif isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            yield node.left
        if isinstance(node.op, ast.Add | ast.Mult):
            yield node.right
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield _with(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield _with(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in CALLS:
            field = "attr" if isinstance(node.func, ast.Attribute) else "id"
            yield _with(node, func=_with(node.func, **{field: CALLS[name]}))
        if name in DROPPED and node.args:
            yield node.args[0]
        if name in ("where", "select") and len(node.args) == 3:
            yield _with(node, args=[node.args[0], node.args[2], node.args[1]])
    elif axis and isinstance(node, ast.Tuple) and len(node.elts) > 1:
        yield _with(node, elts=node.elts[:-1])
