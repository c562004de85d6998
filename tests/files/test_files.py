# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all."""

import os
import re

import pytest

from dcae_jax import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """Catches a reader that sees half a file, an old file lost to a failed write, rubbish left."""
    path = str(tmp_path / "new" / "file")
    files.write_file(path, b"old")
    with pytest.raises(KeyError), files.atomic(path) as beside:
        with open(beside, "wb") as file:
            file.write(b"half")
        assert re.fullmatch(rf"{re.escape(path)}\.\d+\.tmp", beside)
        raise KeyError
    assert os.listdir(tmp_path / "new") == ["file"]
    with open(path, "rb") as file:
        assert file.read() == b"old"
    files.write_file(path, b"new")
    with open(path, "rb") as file:
        assert file.read() == b"new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """Catches an export or a copy of a checkpoint that has its name and half its files."""
    path = str(tmp_path / "folder")
    with pytest.raises(KeyError), files.atomic_folder(path) as beside:
        files.write_json(os.path.join(beside, "inside.json"), 1)
        raise KeyError
    assert not os.listdir(tmp_path)
    with files.atomic_folder(path) as beside:
        files.write_json(os.path.join(beside, "inside.json"), 1)
        assert not os.path.exists(path)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["inside.json"]


@pytest.mark.parametrize("left", ["link", "file", "folder"])
def test_what_lies_under_the_temporary_name_is_replaced(left, tmp_path):
    """Catches a link that is written through, and a process number that comes again."""
    (tmp_path / "precious").write_text("precious")
    beside = tmp_path / f"new.{os.getpid()}.tmp"
    if left == "link":
        beside.symlink_to(tmp_path / "precious")
    elif left == "file":
        beside.write_text("half")
    else:
        beside.mkdir()
        (beside / "half").write_text("half")
    if left == "file":
        with files.atomic_folder(str(tmp_path / "new")):
            pass
        assert os.listdir(tmp_path / "new") == []
    else:
        files.write_file(str(tmp_path / "new"), b"new")
        assert (tmp_path / "new").read_text() == "new"
    assert (tmp_path / "precious").read_text() == "precious" and not os.path.lexists(beside)


def test_rows_are_not_appended_through_a_link(tmp_path):
    """Catches a file elsewhere that grows by rows of metrics."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / files.METRICS).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        files.append_row(str(tmp_path), 1, {"loss": 1.0})
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_hub_name_is_kept_and_a_path_made_whole(tmp_path, monkeypatch):
    """Catches the origin of weights recorded as a path that other folders cannot follow."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    assert files.whole_path("run") == str(tmp_path / "run")
    assert files.whole_path("someone/some-model") == "someone/some-model"
