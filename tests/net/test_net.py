# SPDX-License-Identifier: Apache-2.0
"""The net: today's numbers, files and words, seen from outside, against those of the record.

`DCAE_NET_EXACT=1` also compares the bytes of weights, latents and samples: on the machine and with
the libraries of the record alone. One case: `pytest tests/net -m slow -k "uvit"`.
"""

import json
import os
import pathlib
import subprocess
import sys

import filelock
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import changes  # noqa: E402
import compare  # noqa: E402
from cases import CASES  # noqa: E402

RECORD = HERE / "recorded.json"
OTHER = HERE / "other.json"
SHOWN = 12  # differences


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{case: result} of the cases that were selected, run in one process of one device."""
    here = [item for item in request.session.items if item.path == request.path]
    names = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")}
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers of this run
    out = folder / "net.json"
    only = "|".join(f"^{name}$" for name in sorted(names))
    command = [sys.executable, str(HERE / "record.py"), f"--out={out}", f"--only={only}"]
    with filelock.FileLock(f"{out}.lock"):  # the first worker that needs them runs the cases
        if not out.exists():
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.xdist_group("net")  # or each worker would run every case
@pytest.mark.parametrize("name", CASES)
def test_gives_what_was_recorded(name, results):
    """Catches what the docstring of the case says."""
    recorded = json.loads(RECORD.read_text())
    assert name in recorded, f"{name} is not recorded"
    exact = os.environ.get("DCAE_NET_EXACT", "") == "1"
    # A ReLU that is open on one side alone shows beyond the bounds. The recorded code gave
    # other.json on another kind of processor; the result must be one of the two.
    records = [recorded[name], json.loads(OTHER.read_text()).get(name)]
    lines = min(
        (
            compare.differences(changes.today(name, record), results[name], exact)
            for record in records
            if record
        ),
        key=len,
    )
    if lines:
        more = [f"... {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        said = "\n".join([*lines[:SHOWN], *more])
        pytest.fail(f"{name}: {CASES[name].__doc__.splitlines()[0]}\n{said}", pytrace=False)


def test_every_recorded_case_is_still_run():
    """Catches a case that is dropped, and with it what it holds."""
    assert json.loads(RECORD.read_text()).keys() == CASES.keys()


def test_every_change_is_one():
    """Catches an entry of the tables of changes that no longer stands for anything recorded."""
    assert not changes.unused(json.loads(RECORD.read_text()))
