# SPDX-License-Identifier: Apache-2.0
"""The planner: it describes the program that train.py runs, and prices it."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS, run_job

from dcae_jax import config as config_lib
from dcae_jax import main
from dcae_jax.api import generator
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.jobs import plan, sample, train
from dcae_jax.models import layers
from dcae_jax.models import weights as weights_lib
from dcae_jax.planner import chips, compile, cost
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process
from dcae_jax.training import state as state_lib

# The fixture `small` as overrides of phase1.py:tiny, one image a device.
SMALL = (
    "model.widths=(8,8,16,32,32)",
    "model.latent_channels=8",
    "resolution=32",
    "resolutions=()",
    "batch_size=8",
    "evaluate.batch_size=8",
    "evaluate.resolutions=(32,)",
)
PHASE1 = os.path.join(CONFIGS, "phase1.py:tiny")
SAMPLE, UVIT = os.path.join(CONFIGS, "sample.py"), os.path.join(CONFIGS, "uvit.py:tiny")
# Latents of 4 x 4, guided, one image a device.
SAMPLING = (
    "autoencoder=tiny",
    "resolution=64",
    "sample.steps=4",
    "sample.guidance=2.0",
    "sample.count=20",
    "sample.batch_size=8",
)
PROMISED = {  # the contract of cost.json
    "topology", "chips", "batch_per_chip", "fits", "arguments_bytes", "output_bytes", "temp_bytes",
    "alias_bytes", "peak_bytes", "flops", "bytes_accessed", "collectives", "compile_s",
    "step_s_roofline",
}  # fmt: skip


def _arguments(workdir, **settings):
    argv = ["main", f"--config={os.path.join(CONFIGS, 'plan.py')}", f"--workdir={workdir}"]
    given = {"config": PHASE1, "overrides": SMALL, "topologies": ("cpu",)} | settings
    return [*argv, *(f"--config.plan.{key}={value}" for key, value in given.items())]


def test_the_plan_is_of_the_program_that_trains(tmp_path, monkeypatch):
    """Catches a planner that describes another program: without donation, or another layout."""
    workdir = tmp_path / "plan"
    assert main.main(_arguments(workdir)) == 0
    (row,) = json.loads((workdir / plan.PLAN).read_text())
    assert row.keys() >= PROMISED

    seen = {}
    monkeypatch.setattr(train, "_loop", lambda *a: seen.update(a[4]) or 0)
    assert run_job(train, compile.overridden(PHASE1, SMALL), str(tmp_path / "run")) == 0
    memory = seen[32].memory_analysis()
    assert row["arguments_bytes"] == memory.argument_size_in_bytes
    assert row["output_bytes"] == memory.output_size_in_bytes
    assert row["temp_bytes"] == memory.temp_size_in_bytes
    assert row["alias_bytes"] == memory.alias_size_in_bytes > 0
    assert row["peak_bytes"] == (
        row["arguments_bytes"] + row["output_bytes"] + row["temp_bytes"] - row["alias_bytes"]
    )
    assert row["chips"] == 8 and row["batch_per_chip"] == 1 and row["size"] == 32
    assert row["collectives"]["all-reduce"]["bytes"] > 0 and row["compile_s"] > 0
    # XLA's count of the same program, which has no loop. Every device repeats the optimizer's part
    # of it, which is large in so small a model.
    counted = seen[32].cost_analysis()["flops"]
    assert counted / 2 < row["flops"] < counted * 1.05
    # A host's peaks are not known.
    assert row["step_s_roofline"] is None and row["kwh"] is None and row["fits"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"topologies": ("v9:2x2",)}, ["'v9:2x2'", "v5e:4x4"]),
        ({"topologies": ("v5e:2x2x1",)}, ["2 axes", "v5e:2x2"]),
        ({"topologies": ("v5p:2x2",)}, ["3 axes", "v5p:2x2x1"]),
        ({"topologies": ("v5e:0x2",)}, ["v5e:0x2"]),
        ({"config": ""}, ["cost.config", "configs/phase1.py"]),
        ({"config": "/none.py"}, ["/none.py"]),
        ({"config": os.path.join(CONFIGS, "evaluate.py")}, ["evaluate"]),
        ({"overrides": ("batch_sise=3",)}, ["batch_sise"]),
        ({"overrides": ("batch_size=three",)}, ["three"]),
        ({"config": SAMPLE}, ["cost.generator", "configs/uvit.py:h"]),
        ({"config": SAMPLE, "generator": "/none.py"}, ["cost.generator", "/none.py"]),
        ({"config": SAMPLE, "generator": PHASE1}, ["cost.generator", "phase1.py", "diffusion"]),
        (
            {"config": SAMPLE, "generator": UVIT, "overrides": ()},
            ["autoencoder=''", "cost.overrides"],
        ),
        ({"generator": UVIT}, ["cost.generator", "uvit.py:tiny"]),
        (
            {
                "config": SAMPLE,
                "generator": os.path.join(CONFIGS, "usit.py:h"),
                "overrides": SAMPLING,
            },
            ["sample.sampler=''", "dopri5", "heun"],
        ),
        ({"watts": -1.0}, ["cost.watts=-1"]),
        ({"effort": 2.0}, ["cost.effort=2"]),
        (
            {"config": os.path.join(CONFIGS, "uvit.py:h"), "overrides": ("autoencoder=runs/ae",)},
            ["autoencoder='runs/ae'", "VARIANT"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, settings, words):
    """Catches a traceback of libtpu's where one line would do."""
    assert main.main(_arguments(tmp_path, **settings)) == process.MISTAKE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_a_missing_compiler_names_the_extra(tmp_path, capsys, monkeypatch):
    """Catches an ImportError from deep inside for whoever installed without the extra."""
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert main.main(_arguments(tmp_path, topologies=("v5e:2x2",))) == process.MISTAKE
    said = capsys.readouterr().err
    assert "dcae_jax[tpu]" in said and said.count("\n") == 1


def test_a_mistake_in_the_planned_job_comes_back_from_its_process():
    """Catches a job's own error lost in another process, or told as a crash."""
    settings = config_lib.default().plan
    settings.config = PHASE1
    settings.overrides = (*SMALL, "mesh.fsdp=3")
    with pytest.raises(UserError, match="does not fit 8 devices"):
        compile.compiled(settings, "cpu", 32, 8)


def test_flops_count_every_microbatch(small, one_device):
    """Catches FLOPs of one round of a loop told as those of all."""
    small.batch_size = 4
    whole = compile.flops(small, one_device, 32)
    small.accumulate = 2
    assert compile.flops(small, one_device, 32) == pytest.approx(whole, rel=0.02)


def test_flops_of_a_transformer_grow_with_its_depth(one_device):
    """Catches a scanned transformer counted as one block deep."""
    counts = []
    for depth in (4, 8):
        config = compile.overridden(
            os.path.join(CONFIGS, "uvit.py:tiny"),
            ("autoencoder=f32c32", "resolution=256", f"model.depth={depth}", "batch_size=8"),
        )
        counts.append(compile.flops(config, one_device, 8))
    assert counts[1] > 1.5 * counts[0]


def test_flops_are_of_the_form_that_the_platform_runs(small, one_device, monkeypatch):
    """Catches a TPU's FLOPs counted on this host's own form of a small map's convolution."""
    monkeypatch.setattr(mesh_lib, "platform", lambda mesh: "tpu")
    counted = compile.flops(small, one_device, 32)
    monkeypatch.setattr(layers, "SMALL_MAP", 0)
    assert counted == compile.flops(small, one_device, 32)


# --- sampling -------------------------------------------------------------------------------------


def test_the_plan_of_a_sample_job_is_of_the_program_that_samples(tmp_path, monkeypatch):
    """Catches a planner of another sampler: without the decoder, or another batch or layout."""
    arguments = _arguments(
        tmp_path / "plan", config=SAMPLE, generator=UVIT, overrides=SAMPLING, topologies=("cpu",)
    )
    assert main.main(arguments) == 0
    (row,) = json.loads((tmp_path / "plan" / plan.PLAN).read_text())
    assert row.keys() >= PROMISED

    job = compile.overridden(SAMPLE, SAMPLING, UVIT)
    model = generator.abstract_generator(job, mesh_lib.make_mesh(job.mesh))
    saved = {"model": job.model.to_dict(), "objective": job.objective, "patch_size": 1}
    files = {
        "run": (model.weights, saved | {"autoencoder": "autoencoder"}),
        "autoencoder": (model.autoencoder.weights, {"model": model.autoencoder.model}),
    }

    def load_weights(path, *_, **__):
        shapes, settings = files[path]
        return {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}, settings

    monkeypatch.setattr(checkpoint_weights, "load_weights", load_weights)
    made, seen = generator._sample_fn, []

    def sample_fn(*key):
        run = made(*key)

        def call(*arguments):
            seen.append(run.lower(*arguments).compile())
            return run(*arguments)

        return call

    monkeypatch.setattr(generator, "_sample_fn", sample_fn)
    config = config_lib.load_file(SAMPLE)
    config.init_from, config.sample = "run", job.sample
    assert run_job(sample, config, str(tmp_path / "samples")) == 0
    assert row["steps"] == len(seen) == 3 and row["batch_size"] == 8 and row["size"] == 64
    memory = seen[0].memory_analysis()
    assert row["arguments_bytes"] == memory.argument_size_in_bytes
    assert row["output_bytes"] == memory.output_size_in_bytes
    assert row["temp_bytes"] == memory.temp_size_in_bytes
    weights = [*model.weights.values(), *model.autoencoder.weights.values()]
    assert row["arguments_bytes"] >= sum(leaf.size for leaf in weights) * 4  # the encoder's too
    assert row["collectives"] and row["fits"] and "-" in cost.cells(row)


def test_flops_count_every_evaluation_of_the_network(one_device):
    """Catches a sampler's loop, or the loop over blocks inside it, counted as one round."""

    def flops(file, *overrides):
        job = compile.overridden(SAMPLE, (*SAMPLING, *overrides), os.path.join(CONFIGS, file))
        return compile.flops(job, one_device, 64)

    def an_evaluation(file, *overrides):
        few, more, most = (flops(file, *overrides, f"sample.steps={steps}") for steps in (4, 8, 16))
        assert most - more == pytest.approx(2 * (more - few))
        return (more - few) / 4

    job = compile.overridden(SAMPLE, SAMPLING, UVIT)
    model = state_lib.abstract_model(
        job.model,
        one_device,
        dtype=job.dtype,
        objective=job.objective,
        patch_size=job.patch_size,
        unroll=True,
    )
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
    settings = config_lib.default().plan
    settings.config, settings.generator, settings.overrides = SAMPLE, UVIT, SAMPLING
    with pytest.raises(UserError, match="sample.batch_size=12.*try 8 or 16"):
        compile.compiled(settings, "cpu", 64, 12)


def test_without_averages_the_state_has_none(small, one_device):
    """Catches ema_decay=0 that keeps a copy of the weights all the same."""
    small.ema_decay = 0.0
    spec = state_lib.train_spec(small, one_device)
    made = state_lib.init_state(small, one_device, spec)
    assert made.ema == {} and state_lib.averaged(made).keys() == {*spec.params, *spec.stats}


# --- the largest batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("most, start", [(1, 256), (7, 8), (63, 256), (100, 1), (1000, 8)])
def test_the_largest_batch_is_found(most, start):
    """Catches a search that ends one too low or too high, or compiles for ever."""
    tries = []

    def compile_with(batch):
        tries.append(batch)
        return batch <= most * 4, 10 + 3.0 * batch

    assert cost.largest_batch(compile_with, 4, start, 10 + 3.0 * (most * 4 + 1)) == most * 4
    assert len(tries) == len(set(tries)) <= cost.MAX_COMPILES


def test_a_search_without_sizes_halves():
    """Catches a search that trusts sizes where the compiler told none."""
    found = cost.largest_batch(lambda b: (b <= 48, 1.0 if b <= 48 else math.inf), 8, 8, 2.0)
    assert found == 48


def test_no_batch_fits():
    """Catches an endless search where the state alone is too large."""
    tries = []
    assert cost.largest_batch(lambda b: (bool(tries.append(b)), 9.0), 8, 32, 1.0) == 0
    assert tries == [32, 16, 8]


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"config": PHASE1, "overrides": SMALL}, 1200),
        ({"config": SAMPLE, "generator": UVIT, "overrides": SAMPLING}, 2),  # 20 images
    ],
)
def test_find_batch_plans_what_it_found(monkeypatch, settings, steps):
    """Catches a search whose result is not the batch of the row, or which compiles it twice."""
    given, seen = settings, []

    def fake(settings, text, size, batch):
        seen.append(batch)
        return _facts(topology=text, size=size, batch_size=batch, peak_bytes=batch * 1e9)

    monkeypatch.setattr(compile, "compiled", fake)
    settings = config_lib.default().plan
    settings.update(given | {"find_batch": True})
    (row,) = cost.plan(settings, compile.target(settings), "v5e:2x2")
    assert row["batch_size"] == 16 and row["fits"]  # the last multiple of 4 below 16.6 GB
    assert row["steps"] == steps
    assert len(seen) == len(set(seen))


# --- prices ---------------------------------------------------------------------------------------


def _facts(**changes):
    """What `program.measure` gives, of a made-up program on four v5e."""
    facts = dict(
        topology="v5e:2x2", chips=4, mesh={}, batch_size=64, batch_per_chip=16, size=256,
        arguments_bytes=1e9, output_bytes=1e9, temp_bytes=1e9, alias_bytes=1e9, peak_bytes=2e9,
        flops=197e12, bytes_accessed=81.9e9, collectives={}, compile_s=1.0, compile_cpu_s=2.0,
    )  # fmt: skip
    return facts | changes


def test_the_price_of_a_step():
    """Catches a factor of chips, of 1000 or of 3600 in chip-hours, kWh and images a second."""
    row = cost.priced(_facts(), 3600, 0.0)
    assert row["step_s_roofline"] == pytest.approx(1.0) and row["bound"] == "compute"
    assert row["images_per_s"] == pytest.approx(64)
    assert row["chip_hours"] == pytest.approx(4)
    assert row["kwh"] == pytest.approx(4 * chips.CHIPS["v5e"].watts / 1000)
    assert cost.priced(_facts(), 3600, 500.0)["kwh"] == pytest.approx(2)
    slow = cost.priced(_facts(bytes_accessed=819e9 * 3), 3600, 0.0)
    assert slow["step_s_roofline"] == pytest.approx(3) and slow["bound"] == "memory"


def test_what_fits():
    """Catches a program called fitting to the last byte, and one that XLA refused."""
    room = chips.CHIPS["v5e"].hbm - chips.RESERVE
    assert cost.priced(_facts(peak_bytes=room), 1, 0.0)["fits"]
    assert not cost.priced(_facts(peak_bytes=room + 1), 1, 0.0)["fits"]
    refused = cost.priced(_facts(compile_s=None, bytes_accessed=None, peak_bytes=None), 1, 0.0)
    assert not refused["fits"] and refused["chip_hours"] is None
    assert "-" in cost.cells(refused) and cost.table([refused])


def test_a_drawn_resolution_is_priced_by_its_share():
    """Catches the largest resolution priced as if every step had it."""
    sizes = {256: 0.25, 512: 0.75}
    rows = [
        cost.priced(_facts(size=size, flops=flops, peak_bytes=peak), 3600, 0.0)
        for size, flops, peak in ((256, 197e12, 1e9), (512, 4 * 197e12, 20e9))
    ]
    row = cost.mean(rows, sizes, 3600)
    assert row["size"] == cost.MEAN and row["peak_bytes"] == 20e9 and not row["fits"]
    assert row["step_s_roofline"] == pytest.approx(0.25 + 0.75 * 4)
    assert row["chip_hours"] == pytest.approx(4 * row["step_s_roofline"])
    job = compile.overridden(os.path.join(CONFIGS, "phase2.py"), ())
    assert cost.shares(job) == {256: 0.25, 512: 0.5, 1024: 0.25}


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
    """Catches 'does not fit' told as a crash, or without what it needs."""
    assert compile.needed_bytes(jax.errors.JaxRuntimeError(message), 7) == needed


def test_another_error_of_the_compiler_is_raised():
    """Catches every failure told as 'does not fit'."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        compile.needed_bytes(jax.errors.JaxRuntimeError("Mosaic failed"), 0)


# --- for TPUs -------------------------------------------------------------------------------------

_TPU = """
import json, sys
from dcae_jax.planner import chips, compile
from dcae_jax.runtime import mesh as mesh_lib
config = compile.overridden(sys.argv[1], tuple(json.loads(sys.argv[2])))
mesh = mesh_lib.make_mesh(config.mesh, chips.devices("v5e:2x2"))
step, arguments = compile.step_and_arguments(config, mesh, 32)
print(json.dumps([mesh_lib.platform(mesh), step.lower(*arguments).as_text()]))
"""


@pytest.mark.slow
def test_a_tpu_program_is_planned_on_this_host(tmp_path):
    """Catches the host's own choices, float32 and shifted multiply-adds, in a TPU's program."""
    pytest.importorskip("libtpu", exc_type=ImportError)
    environment = os.environ | compile.ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _TPU, PHASE1, json.dumps(SMALL)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name, text = json.loads(done.stdout.splitlines()[-1])
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert name == "tpu" and convolutions
    assert all("bf16" in line for line in convolutions)
    assert any("feature_group_count = 256" in line for line in convolutions)  # 8 x 32 channels

    assert main.main(_arguments(tmp_path, topologies=("v5e:2x2", "v5e:1x1"))) == 0
    rows = json.loads((tmp_path / plan.PLAN).read_text())
    assert [row["chips"] for row in rows] == [4, 1] and all(row["fits"] for row in rows)
    assert all(row["step_s_roofline"] > 0 and row["kwh"] > 0 for row in rows)
    assert rows[0]["collectives"]["all-reduce"]["bytes"] > 0 and not rows[1]["collectives"]


@pytest.mark.slow
def test_a_tpu_program_that_samples_is_planned_on_this_host(tmp_path):
    """Catches a sampler that is compiled for this host, or one whose loop XLA's count misses."""
    pytest.importorskip("libtpu", exc_type=ImportError)
    work = []
    for steps in (4, 8, 12):
        settings = {"config": SAMPLE, "generator": UVIT, "topologies": ("v5e:2x2",)}
        overrides = (*SAMPLING, f"sample.steps={steps}")
        assert main.main(_arguments(tmp_path, **settings, overrides=overrides)) == 0
        (row,) = json.loads((tmp_path / plan.PLAN).read_text())
        assert row["chips"] == 4 and row["fits"] and row["kwh"] > 0
        assert row["images_per_s"] == pytest.approx(8 / row["step_s_roofline"])
        assert row["collectives"]["all-gather"]["bytes"] >= 8 * 64 * 64 * 3  # images of 8 bits
        work.append((row["flops"], row["bytes_accessed"]))
    for four, eight, twelve in zip(*work, strict=True):
        assert eight > four
        assert twelve - eight == pytest.approx(eight - four, rel=0.02)


@pytest.mark.slow
def test_a_tpu_program_that_is_too_large_does_not_fit(tmp_path):
    """Catches an out-of-memory error of the compiler that ends the plan."""
    pytest.importorskip("libtpu", exc_type=ImportError)
    overrides = (*SMALL, "batch_size=4096", "resolution=512", "evaluate.batch_size=32")
    arguments = _arguments(tmp_path, topologies=("v5e:1x1",), overrides=overrides)
    assert main.main(arguments) == 0
    (row,) = json.loads((tmp_path / plan.PLAN).read_text())
    assert not row["fits"] and row["peak_bytes"] > chips.CHIPS["v5e"].hbm
    assert row["flops"] > 0
