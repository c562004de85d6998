# SPDX-License-Identifier: Apache-2.0
"""Runs the fast tests with the oldest versions that pyproject.toml allows.

    python scripts/oldest.py VENV [PYTEST ARGUMENT ...]

Makes the virtual environment VENV (or goes on with one that is there), writes the lower bounds as
pip constraints into VENV/oldest.txt, installs the package with them and starts pytest there. What
has no lower bound, and what the dependencies themselves ask for, is the newest that pip finds.
"""

import os
import re
import subprocess
import sys
import tomllib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def lower_bounds(project: dict) -> list[str]:
    """['jax==0.10.0', ...]: each '>=' of the dependencies and of the extra `dev` as '=='."""
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    found = (re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", line.split(";")[0]) for line in wanted)
    return [f"{match[1]}=={match[2]}" for match in found if match]


def main(venv: str, arguments: list[str]) -> int:
    """Returns pytest's exit status."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    python = os.path.join(os.path.abspath(venv), "bin", "python")
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    constraints = os.path.join(os.path.abspath(venv), "oldest.txt")
    with open(constraints, "w", encoding="utf-8") as file:
        file.write("\n".join(lower_bounds(project)) + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", constraints, "-e", f"{ROOT}[dev]"], check=True)
    chosen = arguments or ["-n", "2", "--dist", "loadgroup", "-m", "not slow and not torch"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    return subprocess.run([python, "-m", "pytest", *chosen], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
