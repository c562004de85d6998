# SPDX-License-Identifier: Apache-2.0
"""Every key of the schema has a reader."""

import ast
import dataclasses
import functools
import pathlib

import pytest

import dcae_jax
from dcae_jax.config import schema

PACKAGE = pathlib.Path(dcae_jax.__file__).parent
SECTIONS = {
    field.type.__name__: field.name
    for field in dataclasses.fields(schema.Config)
    if dataclasses.is_dataclass(field.type)
}
PREFIX = {name: f"{section}." for name, section in SECTIONS.items()}
PREFIX |= dict.fromkeys(("Config", "Job", "Training", "Diffusion"), "")  # their keys have none
KEYS = [
    f"{PREFIX[name]}{key}"
    for name in PREFIX
    for key in schema.known_keys(getattr(schema, name))
    if PREFIX[name] or name == "Config" and key not in SECTIONS.values()
]


def reads(sources):
    """Keys that the sources read, each as an attribute of an expression of its section's class.

    The class of a name is the one that it is annotated with, or that of what it was assigned; of an
    attribute or a call, what the class or the function is annotated with. getattr(section, key)
    reads the keys of a loop `for key in ("...", "...")` around it.
    """
    trees = [ast.parse(source) for source in sources]
    for tree in trees:  # another class of a section's name
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)} & PREFIX.keys()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in own:
                node.id = f"another {node.id}"
            elif isinstance(node, ast.ClassDef) and node.name in own:
                node.name = f"another {node.name}"
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def named(annotation):
        """The class of `Model`, `schema.Model`, `Model | None`; None of a container of them."""
        if isinstance(annotation, ast.BinOp):
            return named(annotation.left) if ast.unparse(annotation.right) == "None" else None
        name = getattr(annotation, "attr", getattr(annotation, "id", None))
        return name if name in classes or name in PREFIX else None

    fields = {"Config": {section: name for name, section in SECTIONS.items()}}
    for name, node in classes.items():
        for part in node.body:
            if isinstance(part, ast.AnnAssign):
                fields.setdefault(name, {})[part.target.id] = named(part.annotation)
    returned = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            returned.setdefault(node.name, set()).add(named(node.returns))
    found = set()

    def class_of(node, names):
        if isinstance(node, ast.Name):
            kind = names.get(node.id)
            return kind if isinstance(kind, str) else None
        if isinstance(node, ast.Attribute):
            return fields.get(class_of(node.value, names), {}).get(node.attr)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            kinds = returned.get(name, {named(node.func)})  # a function, else a class itself
            return next(iter(kinds)) if len(kinds) == 1 else None
        return None

    def assign(target, value, names):
        if isinstance(target, ast.Name):
            names[target.id] = class_of(value, names)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, of in zip(target.elts, value.elts, strict=False):
                assign(part, of, names)

    def visit(node, names, inside=None):
        if isinstance(node, ast.ClassDef):
            inside = node.name
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = {a.arg: inside if a.arg == "self" else named(a.annotation) for a in given}
            names = names | own
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            words = getattr(node.iter, "elts", ())
            names[node.target.id] = [w.value for w in words if isinstance(w, ast.Constant)]
        elif isinstance(node, ast.Attribute) and class_of(node.value, names) in PREFIX:
            if node.attr not in SECTIONS.values() or PREFIX[class_of(node.value, names)]:
                found.add(f"{PREFIX[class_of(node.value, names)]}{node.attr}")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            if (kind := class_of(node.args[0], names)) in PREFIX:
                words = names.get(getattr(node.args[1], "id", "")) or ()
                found.update(f"{PREFIX[kind]}{word}" for word in words)
        # A comprehension binds its names before it reads them.
        for child in sorted(
            ast.iter_child_nodes(node), key=lambda n: not isinstance(n, ast.comprehension)
        ):
            visit(child, names, inside)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                assign(target, node.value, names)

    for tree in trees:
        visit(tree, {})
    return found


@functools.cache
def _package_reads():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "config" / "schema.py"]
    return reads(path.read_text() for path in files)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read(key):
    """Catches a key that users set and nothing looks at, also where another section has a key of
    the same name."""
    assert key in _package_reads()


@pytest.mark.parametrize("section", sorted(set(PREFIX.values())))
def test_an_invented_key_of_a_section_has_no_reader(section):
    """Catches a search that takes any word of the package for a key: all of its attributes, names
    and texts are tried as keys of each section."""
    nodes = [n for p in PACKAGE.rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
    words = {getattr(n, name, None) for n in nodes for name in ("attr", "id", "arg", "value")}
    words = {word for word in words if isinstance(word, str)} | {"invented"}
    invented = {f"{section}{word}" for word in words} - set(KEYS)
    assert len(invented) > 1000 and not invented & _package_reads()


def test_a_key_is_read_from_its_own_section_alone():
    """Catches a key of one section counted as read because another has one of the same name, or
    because a local name or a class is called like the section."""
    source = """
class Data: steps: int
def f(config: Config, given: schema.Loss, other, data: Data):
    config.sample.steps, given.l1_weight, other.l1_weight, data.path, data.steps, loss.eps
    for key in ("b1", "b2"): getattr(config.optimizer, key)
    o, d = config.optimizer, config.data
    return o.eps, d.split, "optimizer.decay", config.mesh.data
"""
    optimizer = {"optimizer.b1", "optimizer.b2", "optimizer.eps"}
    assert reads([source]) == optimizer | {
        "sample.steps", "loss.l1_weight", "data.split", "mesh.data"
    }  # fmt: skip
