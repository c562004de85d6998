# SPDX-License-Identifier: Apache-2.0
"""Weights read from runs and exports."""

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import to_json
from support.published_weights import random_weights, write_export, write_folder

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.models import dcae
from dcae_jax.pretrained import hub
from dcae_jax.training import state as state_lib


def save_run(config, mesh, workdir, **record):
    """A workdir with a checkpoint of step 3, before any training, with averages of their own."""
    fresh = state_lib.init_state(config, mesh, state_lib.train_spec(config, mesh))
    fresh = state_lib.dataclasses.replace(fresh, ema={k: v + 1 for k, v in fresh.ema.items()})
    manager = checkpoints.open_manager(workdir, 2)
    checkpoints.save(manager, fresh, {}, 3, 0)
    manager.close()
    record = {"config": to_json(config), **record}
    files.write_json(os.path.join(workdir, "config.json"), record)


@pytest.mark.parametrize("at_once", [1, 2000, 2**27])  # each array alone, a few, all
def test_weights_are_read_without_the_optimizer(
    small, one_device, tmp_path, caplog, monkeypatch, at_once
):
    """Catches 'ema' that returns raw weights, arrays lost between reads, Orbax's warnings."""
    monkeypatch.setattr(checkpoint_weights, "READ_AT_ONCE", at_once)
    spec = state_lib.train_spec(small, one_device)
    save_run(small, one_device, str(tmp_path))
    averaged, saved = checkpoint_weights.load_weights(str(tmp_path))
    raw, _ = checkpoint_weights.load_weights(str(tmp_path / "checkpoints" / "3"), "raw")
    assert saved.model.variant == "tiny"
    assert raw.keys() == averaged.keys() == spec.params.keys() | spec.stats.keys()
    for name, leaf in raw.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf + 1, averaged[name])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize(
    "variant, own, found",
    [
        (
            "published",
            0.5,
            "'published' has the scaling factor 0.3, but these weights have 0.5; le",
        ),
        ("published", 0.3, 0.3),
        ("published", None, 0.3),
        ("tiny", 0.5, 0.5),
        ("small", 0.5, "variant='small' is another model than that of these weights, of tiny; lea"),
        ("dc-ae-f32c32-in-1.0", None, "is another model than that of these weights, of tiny"),
        ("tinny", None, "model.variant='tinny' is not known"),
    ],
)
def test_a_variant_contradicts_no_weights_of_ours(
    kind, variant, own, found, small, one_device, tmp_path, monkeypatch
):
    """Catches a variant that is ignored where a run or an export has another factor or network."""
    arch = dcae.architecture(config_lib.validate(small).model)
    monkeypatch.setitem(dcae.VARIANTS, "narrow", arch)
    monkeypatch.setitem(dcae.PUBLISHED, "published", ("narrow", 0.3))
    path = str(tmp_path / "ours")
    if kind == "run":
        save_run(small, one_device, path, scaling_factor=own)
    else:
        settings = {**to_json(small.model), "scaling_factor": own or 0.0}
        write_export(tmp_path / "ours", arch, random_weights(arch), **settings)
    if isinstance(found, str):
        with pytest.raises(UserError, match=f"init_from='{path}': .*{found}"):
            checkpoint_weights.load_weights(path, variant=variant)
        return
    _, saved = checkpoint_weights.load_weights(path, variant=variant)
    assert dcae.architecture(saved.model).scaling_factor == found
    assert saved.model.variant == "tiny"


def test_a_variant_contradicts_no_generator_of_ours(generator_run):
    """Catches another number of heads that is asked for and ignored."""
    with pytest.raises(
        UserError, match="variant='s' is another model .* of tiny; leave the variant"
    ):
        checkpoint_weights.load_weights(generator_run, variant="s", kind="generator")
    _, saved = checkpoint_weights.load_weights(generator_run, variant="tiny", kind="generator")
    assert saved.model.heads == 2


def test_nothing_to_load_is_said_in_one_line(tmp_path):
    """Catches a traceback from Orbax for a path that is not a workdir, or has no checkpoint yet."""
    with pytest.raises(UserError, match="config.json"):
        checkpoint_weights.load_weights(str(tmp_path))
    files.write_json(str(tmp_path / "config.json"), {"config": {"model": {}}})
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_weights.load_weights(str(tmp_path))
    with pytest.raises(UserError, match="the workdir has"):
        checkpoint_weights.load_weights(str(tmp_path / "checkpoints" / "7"))


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import jax, dcae_jax, orbax.checkpoint
from dcae_jax import config as config_lib
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
jax.numpy.zeros(3).block_until_ready()
peak = start = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
ae = dcae_jax.load_autoencoder(sys.argv[1])
jax.block_until_ready(ae.weights)
done = True
thread.join()
size = sum(4 * v.size for v in ae.weights.values())
print(size, peak - start)
"""


def peak_of(path):
    """(bytes of the float32 weights, peak of anonymous memory while they are loaded)."""
    env = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusers", "bfloat16", "orbax"])
def test_loading_takes_little_more_memory_than_the_weights(kind, tmp_path):
    """Catches weights that are in memory twice: as read, and as placed.

    And, of Orbax, blocks that its threads have freed and the C library keeps.
    """
    arch = dataclasses.replace(dcae.VARIANTS["f32c32-sana"], widths=(96, 192, 384, 384, 768, 768))
    weights = random_weights(arch)
    assert sum(v.nbytes for v in weights.values()) > 600e6
    if kind == "orbax":
        write_export(tmp_path / "hub", arch, weights)
    else:
        tensors = write_folder(tmp_path / "hub", arch, weights)
        if kind == "bfloat16":
            half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
            save_file(half, tmp_path / "hub" / hub.DIFFUSERS_FILE)
    del weights
    for _ in range(3):  # on a busy machine Orbax's threads run ahead now and then
        size, peak = peak_of(tmp_path / "hub")
        logging.info("%s: %.0f MB of weights, peak %.2f times", kind, size / 1e6, peak / size)
        if peak <= 1.3 * size:
            return
    pytest.fail(f"peak {peak / size:.2f} times")


def test_a_path_may_be_a_pathlib_path(autoencoder_export):
    """Catches a TypeError for what most users of Python have as a path."""
    expected, _ = checkpoint_weights.load_weights(autoencoder_export)
    found, _ = checkpoint_weights.load_weights(pathlib.Path(autoencoder_export))
    assert checkpoint_weights.checksum(found) == checkpoint_weights.checksum(expected)


def test_a_shipped_model_loads_by_its_name_unless_a_folder_has_it(
    autoencoder_export, tmp_path, monkeypatch
):
    """Catches a name that is asked for on the hub, and a folder of the user's that is ignored."""
    there = tmp_path / "shipped"
    there.mkdir()
    os.symlink(autoencoder_export, there / "small")
    (there / "__pycache__").mkdir()
    monkeypatch.setattr(checkpoint_weights, "SHIPPED", str(there))
    monkeypatch.chdir(tmp_path)
    expected, _ = checkpoint_weights.load_weights(autoencoder_export)
    found, saved = checkpoint_weights.load_weights("small")
    assert saved.kind == checkpoint_weights.kind_of("small") == "autoencoder"
    assert checkpoint_weights.checksum(found) == checkpoint_weights.checksum(expected)
    (tmp_path / "small").mkdir()
    with pytest.raises(UserError, match="small"):
        checkpoint_weights.load_weights("small")
