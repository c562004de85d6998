# SPDX-License-Identifier: Apache-2.0
"""Training states saved and restored, also on another mesh."""

import jax
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import state as state_lib


def _mesh(count, **axes):
    sizes = config_lib.default().mesh
    sizes.update(axes)
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])


def test_a_state_comes_back_bit_equal_on_another_mesh(small, tmp_path, monkeypatch):
    """Catches a checkpoint that only the mesh that wrote it can restore."""
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
        abstract = state_lib.abstract_state(small.sharding, mesh, spec)
        shapes = jax.eval_shape(lambda: totals)
        back, means, index = checkpoints.restore(manager, 7, abstract, shapes)
        jax.tree.map(np.testing.assert_array_equal, saved, back)
        assert index == 28 and float(means["loss"]) == 3
        places = jax.tree.map(lambda a, b: a.sharding == b.sharding, abstract, back)
        assert all(jax.tree.leaves(places))
    manager.close()


def test_a_checkpoint_that_is_a_link_is_refused(tmp_path):
    """Catches a manager that stops, or removes another run's checkpoint, when its turn comes."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "2").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="checkpoints/2 is a link; replace it with its target"):
        checkpoints.open_manager(str(tmp_path / "run"), 3)
