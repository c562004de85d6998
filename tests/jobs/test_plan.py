# SPDX-License-Identifier: Apache-2.0
"""The job `plan`: its rows describe the program that the planned job runs."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import CONFIGS, planning, run_job

from dcae_jax import config as config_lib
from dcae_jax import main
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Diffusion, Model
from dcae_jax.jobs import plan, sample, train
from dcae_jax.planner import chips, compile, cost
from dcae_jax.pretrained.published import Saved
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process
from dcae_jax.setup import run as setup

PROMISED = {  # the contract of plan.json
    "topology", "chips", "batch_per_chip", "fits", "arguments_bytes", "output_bytes", "temp_bytes",
    "alias_bytes", "peak_bytes", "flops", "bytes_accessed", "collectives", "compile_s",
    "step_s_roofline",
}  # fmt: skip


@pytest.mark.slow
def test_the_plan_is_of_the_program_that_trains(tmp_path, monkeypatch, capsys):
    """Catches a planner that describes another program: without donation, or another layout; and a
    plan that says nothing for the minutes that it takes."""
    workdir = tmp_path / "plan"
    assert main.main(planning.arguments(workdir)) == 0
    said = capsys.readouterr().err.splitlines()
    effort = "=".join(map(str, compile.effort_option(-1.0)))
    assert said[0] == f"{planning.PHASE1} on cpu: topology 1 of 1, {effort}"
    assert said[1] == "cpu at 32, batch 8: compiling (program 1 of 1)"
    assert said[2].startswith("cpu at 32, batch 8: done in ")
    (row,) = json.loads((workdir / plan.PLAN).read_text())
    assert row.keys() >= PROMISED

    class Traced(Exception):
        """Ends the run once its steps are traced."""

    seen, trace_steps = {}, setup.trace_steps

    def traced(run):
        seen.update({size: step.lower().compile() for size, step in trace_steps(run).items()})
        raise Traced

    monkeypatch.setattr(setup, "trace_steps", traced)
    job = compile.job_config(planning.PHASE1, planning.SMALL)
    with pytest.raises(Traced):
        run_job(train, job, str(tmp_path / "run"))
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
        ({"config": ""}, ["plan.config", "configs/phase1.py"]),
        ({"config": "/none.py"}, ["/none.py"]),
        ({"config": os.path.join(CONFIGS, "evaluate.py")}, ["evaluate"]),
        ({"overrides": ("batch_sise=3",)}, ["batch_sise"]),
        ({"overrides": ("batch_size=three",)}, ["three"]),
        ({"config": planning.SAMPLE}, ["plan.generator", "configs/uvit.py:h"]),
        ({"config": planning.SAMPLE, "generator": "/none.py"}, ["plan.generator", "/none.py"]),
        (
            {"config": planning.SAMPLE, "generator": planning.PHASE1},
            ["plan.generator", "phase1.py", "diffusion"],
        ),
        (
            {"config": planning.SAMPLE, "generator": planning.UVIT, "overrides": ()},
            ["autoencoder=''", "plan.overrides"],
        ),
        ({"generator": planning.UVIT}, ["plan.generator", "uvit.py:tiny"]),
        (
            {
                "config": planning.SAMPLE,
                "generator": os.path.join(CONFIGS, "usit.py:h"),
                "overrides": planning.SAMPLING,
            },
            ["sample.sampler=''", "dopri5", "heun"],
        ),
        ({"watts": -1.0}, ["plan.watts=-1"]),
        ({"effort": 2.0}, ["plan.effort=2"]),
        (
            {"config": os.path.join(CONFIGS, "uvit.py:h"), "overrides": ("autoencoder=runs/ae",)},
            ["autoencoder='runs/ae'", "VARIANT"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, settings, words):
    """Catches a traceback of libtpu's where one line would do."""
    assert main.main(planning.arguments(tmp_path, **settings)) == process.MISTAKE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_a_missing_compiler_is_found_before_the_job_starts(tmp_path, capsys, monkeypatch):
    """Catches an ImportError from deep inside for whoever installed without the extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.main(planning.arguments(tmp_path, topologies=("v5e:2x2",))) == process.MISTAKE
    said = capsys.readouterr().err
    assert "pip install 'jax[tpu]'" in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_plan_of_a_sample_job_is_of_the_program_that_samples(tmp_path, monkeypatch):
    """Catches a planner of another sampler: without the decoder, or another batch or layout."""
    arguments = planning.arguments(
        tmp_path / "plan",
        config=planning.SAMPLE,
        generator=planning.UVIT,
        overrides=planning.SAMPLING,
        topologies=("cpu",),
    )
    assert main.main(arguments) == 0
    (row,) = json.loads((tmp_path / "plan" / plan.PLAN).read_text())
    assert row.keys() >= PROMISED

    job = compile.job_config(planning.SAMPLE, planning.SAMPLING, planning.UVIT)
    autoencoder = autoencoder_lib.abstract_autoencoder(
        Model(variant=job.autoencoder), mesh_lib.make_mesh(job.mesh)
    )
    model = generator.abstract_generator(job.model, job, autoencoder)
    diffusion = Diffusion(autoencoder="autoencoder", objective=job.objective)
    files = {
        "run": (model.weights, Saved(job.model, diffusion)),
        "autoencoder": (autoencoder.weights, Saved(autoencoder.model_config)),
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
    config = config_lib.load_file(planning.SAMPLE)
    config.init_from = "run"
    config.sample.update(dataclasses.asdict(job.sample))
    assert run_job(sample, config, str(tmp_path / "samples")) == 0
    assert row["steps"] == len(seen) == 3 and row["batch_size"] == 8 and row["size"] == 64
    memory = seen[0].memory_analysis()
    assert row["arguments_bytes"] == memory.argument_size_in_bytes
    assert row["output_bytes"] == memory.output_size_in_bytes
    assert row["temp_bytes"] == memory.temp_size_in_bytes
    weights = [*model.weights.values(), *model.autoencoder.weights.values()]
    assert row["arguments_bytes"] >= sum(leaf.size for leaf in weights) * 4  # the encoder's too
    assert row["collectives"] and row["fits"] and "-" in cost.cells(row)


# --- for TPUs -------------------------------------------------------------------------------------

_TPU = """
import json, sys
from dcae_jax.planner import chips, compile
from dcae_jax.runtime import mesh as mesh_lib
config = compile.job_config(sys.argv[1], tuple(json.loads(sys.argv[2])))
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
        [sys.executable, "-c", _TPU, planning.PHASE1, json.dumps(planning.SMALL)],
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

    assert main.main(planning.arguments(tmp_path, topologies=("v5e:2x2", "v5e:1x1"))) == 0
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
        settings = {
            "config": planning.SAMPLE,
            "generator": planning.UVIT,
            "topologies": ("v5e:2x2",),
        }
        overrides = (*planning.SAMPLING, f"sample.steps={steps}")
        assert main.main(planning.arguments(tmp_path, **settings, overrides=overrides)) == 0
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
    overrides = (*planning.SMALL, "batch_size=4096", "resolution=512", "evaluate.batch_size=32")
    arguments = planning.arguments(tmp_path, topologies=("v5e:1x1",), overrides=overrides)
    assert main.main(arguments) == 0
    (row,) = json.loads((tmp_path / plan.PLAN).read_text())
    assert not row["fits"] and row["peak_bytes"] > chips.CHIPS["v5e"].hbm
    assert row["flops"] > 0
