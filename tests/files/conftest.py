# SPDX-License-Identifier: Apache-2.0
"""An object store in memory."""

import pytest
from support.memory_store import memory_store


@pytest.fixture
def store(monkeypatch, tmp_path):
    with memory_store(monkeypatch, tmp_path / "cache") as system:
        yield system
