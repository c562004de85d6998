# SPDX-License-Identifier: Apache-2.0
"""Recipes with LPIPS and a GAN on the device, through the command line."""

import os

import numpy as np
import pytest
from support import on_gpu, recipes

from dcae_jax import files, main
from dcae_jax.checkpoints import weights as checkpoint_weights


@pytest.fixture(scope="session")
def lpips(tmp_path_factory):
    return recipes.lpips_weights(tmp_path_factory.mktemp("lpips") / "lpips-vgg.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_phases_with_lpips_and_a_gan_train_and_freeze(dtype, lpips, tmp_path):
    """Catches a start that needs the compiler's FLOP count, a step that is not finite in bfloat16,
    and frozen weights that change."""
    previous, source = {}, {}
    for phase, frozen in ((1, None), (2, "encoder.stages.0."), (3, "encoder.")):
        workdir = str(tmp_path / f"phase{phase}")
        changes = {"steps": 3, "dtype": dtype, **previous}
        assert main.main(["main", *recipes.arguments(phase, workdir, lpips, **changes)]) == 0
        rows = [row for row in files.read_rows(workdir) if row["step"]]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["skipped"] == 0 and np.isfinite(row["loss"]) for row in rows)
        assert all(row["lpips"] > 0 for row in rows)
        assert phase < 3 or rows[-1]["gan_weight"] > 0
        now = checkpoint_weights.load_weights(workdir, "raw")[0]  # an average is rounded
        for name, value in source.items():
            if name.startswith(frozen):
                np.testing.assert_array_equal(now[name], value, err_msg=name)
        assert not source or any(np.any(now[name] != value) for name, value in source.items())
        previous, source = {"init_from": workdir}, checkpoint_weights.load_weights(workdir)[0]


# A GPU adds in another order from run to run; these flags forbid it, and autotuning.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true" if on_gpu.MODE == "1" else ""


def test_a_resumed_run_ends_bit_equal(lpips, tmp_path):
    """Catches a second process whose program differs or sums in another order."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"
    whole, resumed = (str(tmp_path / name) for name in ("whole", "resumed"))
    settings = {"save_every": 2, "steps": 4, "allow_change": ("steps",)}
    settings["optimizer.schedule"] = "constant"
    for workdir, steps in ((whole, 4), (resumed, 2), (resumed, 4)):
        command = recipes.arguments(1, workdir, lpips, **{**settings, "steps": steps})
        status, said = recipes.run(command, XLA_FLAGS=flags)
        assert status == 0, said[-2000:]
    assert "resuming" in said
    for which in ("ema", "raw"):
        a, b = (checkpoint_weights.load_weights(path, which)[0] for path in (whole, resumed))
        for name in a:
            np.testing.assert_array_equal(b[name], a[name], err_msg=name)
    losses = [[row["loss"] for row in files.read_rows(path)] for path in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.skipif(on_gpu.MODE == "cpu", reason="a CPU has all of the host's memory")
def test_out_of_memory_is_one_line_with_a_remedy(lpips, tmp_path):
    """Catches a traceback or JAX's own message for a batch that does not fit the GPU."""
    wide = {"model.widths": (64, 64, 128, 256, 256), "resolution": 256, "batch_size": 32}
    command = recipes.arguments(1, str(tmp_path / "run"), lpips, **wide, steps=1)
    status, said = recipes.run(command, XLA_PYTHON_CLIENT_MEM_FRACTION="0.01")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 1 and "Traceback" not in said, said[-3000:]
    assert line.startswith("error: the device is out of memory; lower batch_size"), line
