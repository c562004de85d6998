# SPDX-License-Identifier: Apache-2.0
"""Compiler statistics: FLOPs of loops, out-of-memory messages, errors of the subprocess."""

import os
import types

import jax
import jax.numpy as jnp
import pytest
from support import CONFIGS, planning

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Plan
from dcae_jax.errors import UserError
from dcae_jax.models import layers
from dcae_jax.models import weights as weights_lib
from dcae_jax.planner import compile
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib


def test_a_mistake_in_the_planned_job_comes_back_from_its_process():
    """Catches a job's own error lost in the subprocess, or reported as a crash."""
    settings = Plan(config=planning.PHASE1, overrides=(*planning.SMALL, "mesh.fsdp=3"))
    with pytest.raises(UserError, match="does not fit 8 devices"):
        compile.compile_in_subprocess(settings, "cpu", 32, 8, "")


def test_flops_count_every_microbatch(small, one_device):
    """Catches FLOPs of one iteration of a loop reported as those of all."""
    small.batch_size = 4
    whole = compile.flops(config_lib.validate(small), one_device, 32)
    small.accumulate = 2
    assert compile.flops(config_lib.validate(small), one_device, 32) == pytest.approx(
        whole, rel=0.02
    )


def test_flops_of_a_transformer_grow_with_its_depth(one_device):
    """Catches a scanned transformer counted as one block deep."""
    counts = []
    for depth in (4, 8):
        config = compile.job_config(
            os.path.join(CONFIGS, "uvit.py:tiny"),
            ("autoencoder=f32c32", "resolution=256", f"model.depth={depth}", "batch_size=8"),
        )
        counts.append(compile.flops(config, one_device, 8))
    assert counts[1] > 1.5 * counts[0]


@pytest.mark.slow
def test_flops_count_the_derivative_and_folded_guidance(one_device):
    """Catches a plan of average velocities that is the flow model's, and a derivative or a guided
    prediction on rows that need none: 7/6 and 19/12 of a flow step's passes."""
    counts = []
    for changes in (
        ("objective=flow",),
        ("meanflow.guidance=1.0", "meanflow.mix=0.0"),
        ("meanflow.guidance=2.0", "meanflow.mix=0.5"),
    ):
        config = compile.job_config(
            os.path.join(CONFIGS, "meanflow.py:tiny"),
            ("autoencoder=f32c32", "resolution=256", "model.depth=4", "batch_size=16", *changes),
        )
        counts.append(compile.flops(config, one_device, 8) / (counts[0] if counts else 1))
    assert counts[1] == pytest.approx(7 / 6, rel=0.1)
    assert counts[2] == pytest.approx(19 / 12, rel=0.1)


def test_flops_are_of_the_form_that_the_platform_runs(small, one_device, monkeypatch):
    """Catches a TPU's FLOPs counted on this host's own form of a small map's convolution."""
    monkeypatch.setattr(mesh_lib, "platform", lambda mesh: "tpu")
    config = config_lib.validate(small)
    counted = compile.flops(config, one_device, 32)
    monkeypatch.setattr(layers, "SMALL_MAP", 0)
    assert counted == compile.flops(config, one_device, 32)


@pytest.mark.slow
def test_flops_count_every_evaluation_of_the_network(one_device):
    """Catches a sampler's loop, or the loop over blocks inside it, counted as one iteration."""

    def flops(file, *overrides):
        job = compile.job_config(
            planning.SAMPLE, (*planning.SAMPLING, *overrides), os.path.join(CONFIGS, file)
        )
        return compile.flops(job, one_device, 64)

    def an_evaluation(file, *overrides):
        few, more, most = (flops(file, *overrides, f"sample.steps={steps}") for steps in (4, 8, 16))
        assert most - more == pytest.approx(2 * (more - few))
        return (more - few) / 4

    job = compile.job_config(planning.SAMPLE, planning.SAMPLING, planning.UVIT)
    model = state_lib.abstract_model(job.model, one_device, job, dtype=job.dtype, unroll=True)
    graph, weights, _ = weights_lib.split(model)
    x, label = jnp.zeros((8, 4, 4, 32)), jnp.zeros(8, jnp.int32)
    network = jax.jit(lambda w: weights_lib.merge(graph, w)(x, jnp.zeros(8), label))
    alone = network.lower(weights).cost_analysis()["flops"]
    assert an_evaluation("uvit.py:tiny", "sample.guidance=1.0") == pytest.approx(alone, rel=0.02)
    for file, sampler in (("uvit.py", "ddim"), ("dit.py", "ddpm"), ("usit.py", "heun")):
        settings = (f"{file}:tiny", f"sample.sampler={sampler}")
        single = an_evaluation(*settings, "sample.guidance=1.0")
        assert an_evaluation(*settings) == pytest.approx(2 * single, rel=0.02)


def test_samples_that_do_not_divide_are_refused():
    """Catches a searched batch that does not reach the sampler, or that no run would take."""
    settings = Plan(config=planning.SAMPLE, generator=planning.UVIT, overrides=planning.SAMPLING)
    with pytest.raises(UserError, match="sample.batch_size=12.*try 8 or 16"):
        compile.compile_in_subprocess(settings, "cpu", 64, 12, "")


def test_without_averages_the_state_has_none(small, one_device):
    """Catches ema_decay=0 that keeps a copy of the weights all the same."""
    config = config_lib.replace(config_lib.validate(small), ema_decay=0.0)
    spec = state_lib.train_spec(config, one_device)
    made = state_lib.init_state(config, one_device, spec)
    assert made.ema == {} and state_lib.averaged(made).keys() == {*spec.params, *spec.stats}


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 32.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 16.75G.",
            32.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.00G) exceeds available HBM (15.75G).",
            29 * 2**30 + 7,
        ),
        ("RESOURCE_EXHAUSTED: ran out of memory", None),
    ],
)
def test_too_much_memory_is_a_finding(message, needed):
    """Catches 'does not fit' reported as a crash, or without the bytes needed."""
    assert compile.needed_bytes(jax.errors.JaxRuntimeError(message), 7) == needed


def test_another_error_of_the_compiler_is_raised():
    """Catches every failure reported as 'does not fit'."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        compile.needed_bytes(jax.errors.JaxRuntimeError("Mosaic failed"), 0)


@pytest.mark.parametrize("effort, level", [(0.0, "UNKNOWN"), (-0.1, "O1"), (1.0, "O3")])
def test_effort_is_an_option_that_jax_has(effort, level, monkeypatch):
    """Catches an option that a release lacks, and an effort of 0 that is not that of a run."""
    options = [compile.effort_option(effort)]
    monkeypatch.setattr(compile, "jax", types.SimpleNamespace(config=None))  # as 0.11 and later
    options.append(compile.effort_option(effort))
    assert options[1] == ("jax_optimization_level", level)
    for name, value in options:
        before = getattr(jax.config, name)
        assert (value == before) == (effort == 0)
        jax.config.update(name, value)
        jax.config.update(name, before)
