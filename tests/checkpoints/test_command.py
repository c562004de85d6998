# SPDX-License-Identifier: Apache-2.0
"""The command `python -m dcae_jax.checkpoints`."""

from dcae_jax.checkpoints import __main__
from dcae_jax.checkpoints import manager as checkpoints


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    """Catches a mistyped path reported as undamaged, and a traceback for an impossible target."""
    assert __main__.main(["check", str(tmp_path / "none")]) == 2
    assert "holds no finished checkpoint" in capsys.readouterr().err
    done = tmp_path / "run" / "checkpoints" / "3"
    done.mkdir(parents=True)
    (done / "_CHECKPOINT_METADATA").write_text("{}")
    assert checkpoints.saved_steps(str(tmp_path / "run")) == [3]
    (tmp_path / "file").write_text("")
    assert __main__.main(["copy", str(tmp_path / "run"), str(tmp_path / "file" / "x")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not copied (") and len(said.splitlines()) == 1
