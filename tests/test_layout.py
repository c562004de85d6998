# SPDX-License-Identifier: Apache-2.0
"""The order of the house: a file imports only from lower floors."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "dcae_jax"

# From the top. A file may import what stands on lower lines, never its own line or above.
FLOORS = [
    ["demo"],
    ["main", "demo_diffusion"],
    ["plan"],
    ["program"],
    ["train", "encode"],
    ["preflight"],
    ["evaluate", "sample", "export"],
    ["judge_samples"],
    ["judging"],
    ["api"],
    ["checkpoint"],
    ["published"],
    ["torch_io"],
    ["steps"],
    ["state", "matching"],
    ["sampling"],
    ["losses", "diffusion"],
    ["models.dcae_names"],
    ["models.dcae", "models.sdvae", "models.uvit", "models.dit"],
    ["models.blocks"],
    ["models.lpips", "models.inception", "models.patchgan"],
    ["models.transformer"],
    ["models.layers", "models.names"],
    ["models.weights"],
    ["integrity", "divergence"],
    ["data", "sharding", "optim", "metrics", "tiling", "chips", "hlo"],
    ["sources", "crops"],
    ["latents"],
    ["preemption"],
    ["hosts", "report", "lock", "failures", "host_memory"],
    ["config"],
    ["values"],
]


def _name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path):
    """Modules of the package that `path` imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            if name and name.startswith("dcae_jax."):
                yield name.removeprefix("dcae_jax.")


def test_each_file_imports_only_lower_floors():
    """Catches a lower file that reaches up, after which nothing can be read by itself."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = _name(path)
        if name.endswith("__init__"):
            continue
        assert name in floor, f"{name} stands on no floor: give it a line in FLOORS"
        for imported in _imports(path):
            if imported in floor and floor[imported] <= floor[name]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_nothing_imports_tensorflow_or_torch_when_it_is_imported():
    """Catches a heavy framework becoming a requirement of a plain training run."""
    allowed = {"torch_io"}  # inside its functions
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        anywhere = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        for node in top if _name(path) in allowed else anywhere:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                assert (name or "").split(".")[0] not in ("torch", "tensorflow"), (path, name)
