# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that are generated: the home page, and every configuration key.

mkdocs calls `on_files`. Nothing of dcae_jax is imported: the keys are parsed.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
SCHEMA = ROOT / "dcae_jax" / "config" / "schema.py"
FLAT = {"Job": "Every job", "Training": "Training", "Diffusion": "Diffusion"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def on_files(files, config):
    from mkdocs.structure.files import File

    generated = {"index.md": home(), "reference/config.md": config_page(SCHEMA.read_text())}
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    return files


def home() -> str:
    """README.md with its links as seen from docs/; links to files outside become plain text."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", _inside, text)


def _inside(link: re.Match) -> str:
    text, target = link.groups()
    known = target.startswith("https://") or (ROOT / "docs" / target.split("#")[0]).is_file()
    return link[0] if known else text


def config_page(schema: str) -> str:
    """A table of each section's keys: name, type with bounds, default, meaning."""
    tree = ast.parse(schema)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    constants: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            constants[ast.unparse(node.targets[0])] = _value(node.value, constants)
    nested = {
        ast.unparse(node.annotation): f"config.{ast.unparse(node.target)}"
        for node in classes["Config"].body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in classes
    }
    page = [
        "# Configuration keys",
        "A config file of `configs/` overrides some of these, and the command line overrides it: "
        "`--config.batch_size=64`, `--config.optimizer.learning_rate=1e-4`. A tuple is written as "
        'in Python: `--config.resolutions="(256,512)"`.',
    ]
    for name in (*FLAT, "Config", *nested):
        rows = [_row(field, constants) for field in classes[name].body if _is_key(field)]
        about = ast.get_docstring(classes[name]) or ""
        about = about.removeprefix(f"{nested.get(name, '')}: ")
        title = nested.get(name) or FLAT.get(name, "Sharding")
        prefix = "" if name == "Config" else f"{_links(about[0].upper() + about[1:])}\n\n"
        page.append(f"## {title}\n\n{prefix}| key | type | default | meaning |\n|---|---|---|---|")
        page[-1] += "".join(f"\n| {' | '.join(row)} |" for row in rows)
    return "\n\n".join(page) + "\n"


def _is_key(field: ast.stmt) -> bool:
    value = field.value if isinstance(field, ast.AnnAssign) else None
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "key"


def _row(field: ast.AnnAssign, constants: dict[str, object]) -> tuple[str, ...]:
    call = field.value
    default, meaning = (_value(argument, constants) for argument in call.args)
    given = {word.arg: _value(word.value, constants) for word in call.keywords}
    rules = [f"{BOUNDS[name]} {given[name]}" for name in BOUNDS if name in given]
    rules += [f"length {' or '.join(map(str, given['length']))}"] if "length" in given else []
    kind = ast.unparse(field.annotation)
    if kind.startswith("Literal"):
        kind = ", ".join(repr(choice) for choice in _value(field.annotation.slice, constants))
    bounds = f", {', '.join(rules)}" if rules else ""
    return (
        f"`{ast.unparse(field.target)}`",
        f"`{kind}`{_cell(bounds)}",
        f"`{default!r}`",
        _links(_cell(meaning)),
    )


def _value(node: ast.expr, constants: dict[str, object]) -> object:
    """The value of a constant expression of schema.py."""
    return eval(ast.unparse(node), {"__builtins__": {}}, dict(constants))


def _cell(text: str) -> str:
    """Plain text for a cell of a table. In a code span neither character is special."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _links(text: str) -> str:
    return re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", text)
