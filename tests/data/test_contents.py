# SPDX-License-Identifier: Apache-2.0
"""The index of a source: it changes with the files, and no image is read for it."""

import os

import pytest
from PIL import Image

from dcae_jax.config.schema import Data
from dcae_jax.data import contents, sources


@pytest.mark.parametrize("kind", ["folder", "mixture"])
def test_the_index_tells_files_apart_without_reading_them(image_folder, monkeypatch, kind):
    """Catches a file that is added, replaced or taken away, and a start that reads a data set."""
    parts = ((1.0, "photos", ""), (2.0, "folder", image_folder))
    settings = Data(source=kind, path=image_folder, parts=parts)

    def index(use=sources.training_source):
        return contents.index(use(settings))

    def unread(*_, **__):
        raise AssertionError("an image was opened")

    known = index()
    assert index() == known
    if kind == "folder":
        monkeypatch.setattr(Image, "open", unread)
        assert index(sources.encoding_source) == known  # what is held out counts too
    file = sources.folder(image_folder).name(3)
    with open(file, "ab") as more:
        more.write(b" ")
    replaced = index()
    os.rename(file, f"{file}.png")
    renamed = index()
    os.remove(f"{file}.png")
    removed = index()
    os.symlink("/nowhere", f"{file}.png")  # an unreadable image like others
    assert len({known, replaced, renamed, removed, index()}) == 5
