# SPDX-License-Identifier: Apache-2.0
"""The notebook: its cells run, and it is stored without outputs."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CHECKS = """
assert psnr > 12, psnr
assert z.shape == (1, 16, 16, 32), z.shape
assert samples.shape == (generator.num_classes, 64, 64, 3) and samples.std() > 0
"""


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_outputs_are_cleared():
    """Catches outputs, which change with each run, in the stored notebook."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_cells())


@pytest.mark.slow
def test_the_cells_run(tmp_path):
    """Catches a notebook that a renamed key, file or function broke, or that learns nothing."""
    source = "\n".join("".join(cell["source"]) for cell in code_cells())
    assert '"runs/notebook"' in source
    source = source.replace('"runs/notebook"', repr(str(tmp_path / "runs")))
    script = tmp_path / "notebook.py"
    script.write_text(source + CHECKS)
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
