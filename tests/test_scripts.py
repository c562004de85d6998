# SPDX-License-Identifier: Apache-2.0
"""The scripts that write the lock file and install the oldest versions."""

import importlib.metadata
import os
import sys
import tomllib

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "scripts"))
import licenses
import oldest


class _Package:
    def __init__(self, *requires):
        self.requires = requires


def test_extras_that_a_package_asks_for_are_locked(monkeypatch):
    """Catches a package that is installed and stands in no lock, as `a[x]` brings it along."""
    packages = {
        "dcae-jax": _Package("A_b[x]>=1", 'never; extra == "dev"', 'other; python_version < "3"'),
        "a-b": _Package("c", 'd; extra == "x"', 'never; extra == "y"'),
        "c": _Package("a.b"),
        "d": _Package(),
        "never": _Package(),
        "other": _Package(),
    }
    monkeypatch.setattr(importlib.metadata, "distribution", packages.__getitem__)
    assert sorted(licenses.needed()) == ["a-b", "c", "d", "dcae-jax"]


def test_each_lower_bound_is_installed_as_it_stands():
    """Catches a bound that the run with the oldest versions would leave out."""
    with open(os.path.join(oldest.ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    bounds = oldest.lower_bounds(project)
    assert len(bounds) == sum(">=" in line for line in lines) > 20
    assert {bound.replace("==", ">=") for bound in bounds} <= set(lines)
