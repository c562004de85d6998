# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of data."""

import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """Twelve images in three classes, each of one colour that is its number."""
    for i in range(12):
        folder = tmp_path / "images" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30 - i), (i * 20, 100, 200)).save(folder / f"ä {i}.png")
    return str(tmp_path / "images")
