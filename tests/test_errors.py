# SPDX-License-Identifier: Apache-2.0
"""Optional packages: whatever imports one says in one line how to install it."""

import ast
import importlib.util
import pathlib
import re
import sys
import tomllib

import pytest
from support import ROOT

from dcae_jax import errors, files
from dcae_jax.data import huggingface
from dcae_jax.errors import UserError
from dcae_jax.models import quantized
from dcae_jax.planner import chips
from dcae_jax.pretrained import hub, torch_io
from dcae_jax.serve import app

PROJECT = tomllib.loads(pathlib.Path(ROOT, "pyproject.toml").read_text())["project"]
# Import name -> name on the index, where the two differ.
NAMES = {"absl": "absl-py", "orbax": "orbax-checkpoint", "PIL": "pillow"}
NAMES |= {"skimage": "scikit-image", "sklearn": "scikit-learn"}
# Asked for by packages that are requirements themselves.
BEHIND = {"absl-py", "ml-dtypes", "etils", "fsspec"}

USES = {
    "gradio": lambda path: app.main(["runs/phase3"]),
    "gcsfs": lambda path: files.check("gs://bucket/run", "--workdir"),
    "s3fs": lambda path: files.check("s3://bucket/run", "--workdir"),
    "huggingface_hub": lambda path: hub.fetch("someone/model"),
    "pyarrow": lambda path: huggingface.huggingface(_touch(path / "a.parquet"), "train"),
    "qwix": lambda path: quantized.form("int8"),
    "libtpu": lambda path: chips.check_compiler("v5e:2x2"),
    "torch": lambda path: torch_io.read_state_dict(_touch(path / "weights.pth")),
    "kubernetes": None,  # JAX asks for it: tests/runtime/test_distributed.py
}


def _touch(path):
    path.write_bytes(b"")
    return path


def _names(requirements):
    """Names on the index, as the index compares them."""
    found = (re.match(r"[\w.-]+", text)[0] for text in requirements)
    return {name.lower().replace("_", "-") for name in found}


def test_every_optional_package_has_a_use_here():
    """Catches a package that OPTIONAL gained and the test below does not know."""
    assert USES.keys() == errors.OPTIONAL.keys()


@pytest.mark.parametrize("module", [module for module, use in USES.items() if use])
def test_a_missing_optional_package_is_one_line_with_its_install_command(
    module, tmp_path, monkeypatch
):
    """Catches an ImportError, or the name of an extra, which no index knows beside a clone."""
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else there(name)
    )
    with pytest.raises(UserError) as caught:
        USES[module](tmp_path)
    said = str(caught.value)
    assert f"; {errors.install(module)}" in said and "\n" not in said and "dcae_jax[" not in said


def test_install_commands_name_what_an_extra_installs():
    """Catches a name that is not a package, and an extra that lacks what the code asks for."""
    groups = PROJECT["optional-dependencies"]
    extras = _names(text for name, group in groups.items() if name != "dev" for text in group)
    for module, package in errors.OPTIONAL.items():
        if module != "kubernetes":  # of JAX on GPUs in Kubernetes, without TPU's own discovery
            assert _names([package.strip("'")]) <= extras, package


def _imports(node, inside=()):
    """(top-level package, functions around it) of each import below `node`, but of type checks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").split(".")[0], inside
        is_function = isinstance(child, ast.FunctionDef)
        yield from _imports(child, (*inside, child) if is_function else inside)


def test_whatever_is_no_requirement_is_asked_for_before_it_is_imported():
    """Catches a package imported by a plain installation that has no such package."""
    needed = _names(PROJECT["dependencies"]) | BEHIND
    asks = re.compile(r"errors\.require\(.*?\)", re.DOTALL)
    for path in pathlib.Path(ROOT, "dcae_jax").rglob("*.py"):
        text = path.read_text()
        asked = " ".join(asks.findall(text))
        for module, functions in _imports(ast.parse(text)):
            name = NAMES.get(module, module).lower().replace("_", "-")
            if module in sys.stdlib_module_names or module == "dcae_jax" or name in needed:
                continue
            assert functions, f"{path} imports {module}, which is optional, when it is imported"
            assert f'"{module}"' in asked, f"{path} imports {module} without errors.require"
