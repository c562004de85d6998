# SPDX-License-Identifier: Apache-2.0
"""States on disk and back, on other devices."""

import jax
import numpy as np
import pytest
from support import to_json

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import __main__
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import state as state_lib


def _mesh(count, **axes):
    sizes = config_lib.default().mesh
    sizes.update(axes)
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])


def test_a_state_comes_back_bit_equal_on_another_mesh(small, tmp_path, monkeypatch):
    """Catches a checkpoint that only the machines which wrote it can read."""
    monkeypatch.setattr(sharding, "SMALL", 64)  # so that tiny weights are split too
    small.loss.gan_weight, small.loss.gan_channels = 0.5, 8
    spec = state_lib.train_spec(small, _mesh(4, fsdp=4))
    saved = state_lib.init_state(small, _mesh(4, fsdp=4), spec)
    assert any(not leaf.is_fully_replicated for leaf in saved.params.values())
    totals = {"loss": jax.numpy.float32(3)}
    manager = checkpoints.open_manager(str(tmp_path), 2)
    checkpoints.save(manager, saved, totals, 7, 28)
    manager.wait_until_finished()
    for mesh in (_mesh(1), _mesh(8, data=2, fsdp=4)):
        abstract = state_lib.abstract_state(small, mesh, spec)
        shapes = jax.eval_shape(lambda: totals)
        back, means, index = checkpoints.restore(manager, 7, abstract, shapes)
        jax.tree.map(np.testing.assert_array_equal, saved, back)
        assert index == 28 and float(means["loss"]) == 3
        places = jax.tree.map(lambda a, b: a.sharding == b.sharding, abstract, back)
        assert all(jax.tree.leaves(places))
    manager.close()


@pytest.mark.parametrize("at_once", [1, 2000, 2**27])  # each array alone, a few, all
def test_weights_are_read_without_the_optimizer(
    small, one_device, tmp_path, caplog, monkeypatch, at_once
):
    """Catches 'ema' that returns raw weights, what is left out between reads, Orbax's warnings."""
    monkeypatch.setattr(checkpoint_weights, "READ_AT_ONCE", at_once)
    spec = state_lib.train_spec(small, one_device)
    fresh = state_lib.init_state(small, one_device, spec)
    fresh = state_lib.dataclasses.replace(fresh, ema={k: v + 1 for k, v in fresh.ema.items()})
    manager = checkpoints.open_manager(str(tmp_path), 2)
    checkpoints.save(manager, fresh, {}, 3, 0)
    manager.close()
    files.write_json(str(tmp_path / "config.json"), {"config": to_json(small)})
    averaged, saved = checkpoint_weights.load_weights(str(tmp_path))
    raw, _ = checkpoint_weights.load_weights(str(tmp_path / "checkpoints" / "3"), "raw")
    assert saved.model.variant == "tiny"
    assert raw.keys() == averaged.keys() == spec.params.keys() | spec.stats.keys()
    for name, leaf in raw.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf + 1, averaged[name])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_nothing_to_load_is_said_in_one_line(tmp_path):
    """Catches a traceback from Orbax for a path that is no workdir, or has no checkpoint yet."""
    with pytest.raises(UserError, match="config.json"):
        checkpoint_weights.load_weights(str(tmp_path))
    files.write_json(str(tmp_path / "config.json"), {"config": {"model": {}}})
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_weights.load_weights(str(tmp_path))
    with pytest.raises(UserError, match="there are"):
        checkpoint_weights.load_weights(str(tmp_path / "checkpoints" / "7"))


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    """Catches a mistyped path that passes for whole, and a traceback of a target that cannot be."""
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
