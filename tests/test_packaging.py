# SPDX-License-Identifier: Apache-2.0
"""What an installation is made of: the wheel, the lock, licenses, the commands of CI."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from support import ROOT

import dcae_jax

HERE = pathlib.Path(ROOT)
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
SOURCES = ("dcae_jax", "configs", "tests", "benchmarks", "launch", ".ci", ".github")
KINDS = {".py", ".sh", ".yml", ".yaml", ".toml", ".cff"}
NAMES = {"Makefile", "Dockerfile", "run", "newest"}


def _files():
    """Files that people wrote for a program to read."""
    inside = (path for name in SOURCES for path in (HERE / name).rglob("*"))
    for path in (*HERE.iterdir(), *inside):
        if path.is_file() and (path.suffix in KINDS or path.name in NAMES):
            yield path


def test_every_file_states_its_license():
    """Catches a file whose license a reader has to guess once it is copied elsewhere."""
    files = list(_files())
    assert len(files) > 200
    for path in files:
        head = path.read_text(encoding="utf-8").splitlines()[:3]
        assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), path


def test_the_license_and_citation_are_filled_in():
    """Catches a template's placeholders, and a citation of another version."""
    text = (HERE / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and not re.search(r"\[(yyyy|name)", text)
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert citation["version"] == dcae_jax.__version__
    assert citation["license"] == PROJECT["license"]
    papers = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert papers == {"arXiv:2410.10733", "arXiv:2508.00413"}


def test_the_lock_has_every_requirement_and_no_host():
    """Catches a requirement that was added without `make lock`, and an address of one machine."""
    text = (HERE / "requirements.lock").read_text()
    assert "://" not in text and "file:" not in text
    entries = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)(.*(?:\n    .*)*)", text, re.MULTILINE)
    assert entries and all("--hash=sha256:" in rest for _, _, rest in entries)
    locked = {name.lower().replace("_", "-") for name, _, _ in entries}
    extras = PROJECT["optional-dependencies"]
    for group in (PROJECT["dependencies"], extras["hub"], extras["dev"]):
        for requirement in group:
            name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
            assert name in locked or name == "dcae-jax", f"{requirement}: run `make lock`"


def test_the_commands_of_ci_are_targets_of_make():
    """Catches a workflow that runs what no developer can run."""
    targets = set(re.findall(r"^([\w-]+):", (HERE / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((HERE / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert {"make lint", "make test", "make wheel", "make newest"} == set(commands)
    pages = [HERE / ".ci" / "run", HERE / "README.md", HERE / "CONTRIBUTING.md"]
    command = re.compile(r"(?:^|`|PYTHON='' )make ([\w-]+)", re.MULTILINE)  # no prose
    named = {name for page in pages for name in command.findall(page.read_text())}
    assert {"demo", "wheel", "lock", "newest", "test-slow"} <= named
    for name in named | {command.split()[1] for command in commands}:
        assert name in targets, f"make {name}"


def test_the_wheel_has_the_configs_and_finds_them(tmp_path):
    """Catches a wheel that cannot run a thing: without configs, weights or the command."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {f"dcae_jax/configs/{path.name}" for path in (HERE / "configs").glob("*.py")}
    info = f"dcae_jax-{dcae_jax.__version__}.dist-info"
    weights = "dcae_jax/models/lpips_linear"
    assert shipped | {"dcae_jax/py.typed", f"{weights}.safetensors"} <= names
    model = (path for path in (HERE / "dcae_jax" / "shipped").rglob("*") if path.is_file())
    assert {str(path.relative_to(HERE)) for path in model} <= names
    assert {f"dcae_jax/shipped/small/{name}" for name in ("model.json", "README.md")} <= names
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/{weights}.LICENSE"} <= names
    assert {name.partition("/")[0] for name in names} == {"dcae_jax", info}
    scripts = (tmp_path / "site" / info / "entry_points.txt").read_text()
    assert "dcae-jax = dcae_jax.main:console" in scripts
    program = (
        "from dcae_jax import config, main\n"
        "argv = ['dcae-jax', '--config=phases.py:tiny', '--workdir=run']\n"
        "print(config.SHIPPED, main.parse(argv)[0].phase3.steps)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    folder, steps = done.stdout.split()
    assert folder == str(tmp_path / "site" / "dcae_jax" / "configs") and int(steps) > 0


@pytest.mark.xdist_group("grouped")
def test_groups_of_tests_stay_together(request):
    """Catches a pytest whose node ids pytest-xdist cannot mark: each worker then runs the net."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@grouped")
