# SPDX-License-Identifier: Apache-2.0
"""The tracker of a run: the documented example, mistakes in it, and rows that cannot be sent."""

import pathlib
import re
import sys
import types

import pytest
from support import ROOT

from dcae_jax.config import validate
from dcae_jax.config.schema import default
from dcae_jax.errors import UserError
from dcae_jax.jobs import trackers


def _config(tracker):
    config = default()
    config.tracker = str(tracker)
    return validate(config)


def test_no_tracker_unless_it_is_named():
    """Catches rows that are sent somewhere unasked."""
    assert default().tracker == "" and trackers.configured(_config(""), "runs/x") == ()


def test_the_documented_example_sends_rows_to_one_run(tmp_path, monkeypatch):
    """Catches an example that does not run, and a resumed run that starts other curves."""
    text = pathlib.Path(ROOT, "docs", "training.md").read_text()
    (example,) = re.findall(r"```python\n(import os\nimport wandb\n.*?)```", text, re.DOTALL)
    (tmp_path / "track.py").write_text(example)
    calls, rows = [], []

    def init(**given):
        calls.append(given)
        return types.SimpleNamespace(log=lambda row, step: rows.append((step, row)))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        (track,) = trackers.configured(_config(f"{tmp_path}/track.py:start"), "/runs/tiny/phase1")
        track(3, {"loss": 0.5})
    assert calls[0] == calls[1] and calls[0]["id"] == "runs-tiny-phase1"
    assert calls[0]["resume"] == "allow" and calls[0]["config"]["model"]["variant"] == "f32c32"
    assert rows == [(3, {"loss": 0.5})] * 2


@pytest.mark.parametrize(
    "text, function, reason",
    [
        (None, "start", "a file that exists"),
        ("import nothing_of_this_name", "start", "cannot be imported: ModuleNotFoundError"),
        ("", "start", "has no function 'start'"),
        ("def start(config, workdir): 1 / 0", "start", "failed: ZeroDivisionError"),
    ],
)
def test_a_mistake_in_a_tracker_is_one_line(tmp_path, text, function, reason):
    """Catches a traceback, or a run of days without its curves."""
    if text is not None:
        (tmp_path / "track.py").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        trackers.configured(_config(f"{tmp_path}/track.py:{function}"), "runs/x")
    assert "\n" not in str(caught.value)


def test_a_row_that_cannot_be_sent_ends_nothing(tmp_path, caplog):
    """Catches a run that a tracker's network ends, and a log full of it."""
    (tmp_path / "track.py").write_text(
        "def start(config, workdir):\n"
        "    def track(step, row):\n        raise ConnectionError(step)\n"
        "    return track\n"
    )
    (track,) = trackers.configured(_config(f"{tmp_path}/track.py:start"), "runs/x")
    track(1, {})
    track(2, {})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "failed at step 1: ConnectionError(1)" in said
