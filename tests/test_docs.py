# SPDX-License-Identifier: Apache-2.0
"""Pages that are generated: docs/scaling.md, and the site's page of configuration keys."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

from dcae_jax.config import schema

ROOT = pathlib.Path(__file__).parent.parent


def test_the_scaling_page_is_what_its_data_makes():
    """Catches a number in docs/scaling.md or plans.csv that plans.json does not have."""
    script = ROOT / "benchmarks" / "scaling.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_keys_has_every_key_with_its_default():
    """Catches a section or key that the site's page leaves out, or shows with another default."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.config_page(hooks.SCHEMA.read_text())
    sections = {"": schema.Config(), **vars(schema.Config())}
    for section, value in sections.items():
        if not dataclasses.is_dataclass(value):
            continue
        start = page.index(f"## config.{section}\n") if section else 0
        text = page[start:].split("\n## " if section else "\n## config.")[0]
        for field in dataclasses.fields(value):
            default = getattr(value, field.name)
            if dataclasses.is_dataclass(default):
                continue
            (row,) = [row for row in text.splitlines() if row.startswith(f"| `{field.name}` |")]
            assert f"| `{default!r}` |" in row
