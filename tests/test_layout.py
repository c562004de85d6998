# SPDX-License-Identifier: Apache-2.0
"""The rooms are one chain, and no module needs PyTorch or TensorFlow."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LINT = shutil.which("lint-imports", path=str(pathlib.Path(sys.executable).parent))


@pytest.mark.skipif(not LINT, reason="import-linter is not installed")
def test_each_room_imports_only_lower_rooms():
    """Catches a room that imports one above it, or that no layer of pyproject.toml names."""
    done = subprocess.run([LINT, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_imports_tensorflow_or_torch_when_it_is_imported():
    """Catches a heavy framework becoming a requirement of a plain training run."""
    for path in (ROOT / "dcae_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        within = path.name == "torch_io.py"  # may import torch inside its functions
        for node in tree.body if within else ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"torch", "tensorflow"}
            assert not heavy, f"{path} imports {heavy}"
