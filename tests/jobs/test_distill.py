# SPDX-License-Identifier: Apache-2.0
"""The job `train` with a teacher: what the student learns, what it keeps, what is refused."""

import os
import re
import shutil

import jax
import numpy as np
import pytest
from support import CONFIGS, NARROW, run_job, small_models

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files, main
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Model
from dcae_jax.data import transforms
from dcae_jax.errors import UserError
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.models.weights import abstract, merge, split
from dcae_jax.planner import compile
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import frozen, resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import losses
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib

NARROWER = {"model.decoder_widths": (4, 4, 8, 32, 32)}


def decoder_cost(variant, size):
    """FLOPs of decoding an image of `size` pixels, as XLA counts them."""
    config, rest = Model(variant=variant), {"platform": "tpu", "remat": False, "dtype": "float32"}
    model = abstract(lambda rngs: dcae.create(config, rngs=rngs, **rest))
    graph, params, stats = split(model)
    f, c = (getattr(dcae.VARIANTS[variant], k) for k in ("compression", "latent_channels"))
    z = jax.ShapeDtypeStruct((1, size // f, size // f, c), "float32")
    decode = jax.jit(lambda weights, z: merge(graph, weights).decode(z))
    return decode.lower({**params, **stats}, z).cost_analysis()["flops"]


def _student(teacher, **changes):
    """A student of a narrow model whose decoder is narrower still."""
    config = config_lib.load_file(os.path.join(CONFIGS, "distill.py"), "tiny-lite")
    config.update_from_flattened_dict(NARROW | NARROWER)
    config.distill.teacher, config.steps = teacher, 2
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 0
    config.log_every = config.save_every = 1
    config.evaluate_every, config.evaluate.batch_size, config.evaluate.count = 0, 8, 6
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def student_run(autoencoder_export, tmp_path_factory):
    """The workdir of a student after two steps."""
    workdir = str(tmp_path_factory.mktemp("student"))
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(mesh_lib, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        assert run_job(train, _student(autoencoder_export), workdir) == train.DONE
    return workdir


def test_the_loss_is_to_the_images_and_to_those_of_the_teacher(
    autoencoder_export, alone, one_device
):
    """Catches a teacher with the student's weights or in training mode, a weight that is not
    applied, and a target of another batch."""
    config = _student(autoencoder_export, **{"distill.l1_weight": 0.25, "loss.l1_weight": 2.0})
    config = config_lib.validate(config)
    spec = state_lib.train_spec(config, one_device)
    spec, teacher = frozen.load_teacher(config, spec, one_device)
    random = state_lib.random_weights(config.model, one_device, 0)
    theirs, _ = checkpoint_weights.load_weights(autoencoder_export)
    start = {k: theirs[k] if k.startswith("encoder.") else v for k, v in random.items()}
    before = state_lib.init_state(config, one_device, spec, start)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    batch = {"image": pixels, "label": np.zeros(4, np.int32)}
    step = jax.jit(step_lib.make_step(config, spec))
    after, metrics = step(before, mesh_lib.put_batch(batch, one_device), {}, teacher.decoder)
    images = np.asarray(transforms.to_float(pixels))
    taught = dcae_jax.load_autoencoder(autoencoder_export)
    taught = taught.decode(taught.encode(images))
    want = float(losses.psnr(taught, images))
    assert float(metrics["teacher_psnr"]) == pytest.approx(want, rel=1e-4)
    found = 2 * metrics["l1"] + 0.25 * metrics["teacher_l1"]
    assert float(metrics["loss"]) == pytest.approx(float(found), rel=1e-5)
    # With the teacher's own images as the batch, the two distances would be one.
    assert abs(float(metrics["teacher_l1"] - metrics["l1"])) > 1e-2
    moved = {k for k, v in after.params.items() if np.any(np.asarray(v) != before.params[k])}
    assert moved and all(name.startswith("decoder.") for name in moved)


@pytest.mark.slow
def test_a_student_keeps_the_latents_of_its_teacher(
    student_run, autoencoder_export, generator_run, alone, capsys, tmp_path
):
    """Catches an encoder that moves by a bit, and a diffusion model, or a file of latents, of the
    teacher that refuses its student."""
    teacher, student = map(dcae_jax.load_autoencoder, (autoencoder_export, student_run))
    assert student.num_parameters < teacher.num_parameters
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 48, 3)).astype(np.float32)
    z = np.asarray(teacher.encode(x))
    np.testing.assert_array_equal(z, student.encode(x))
    assert np.abs(teacher.decode(z) - student.decode(z)).max() > 1e-3
    row = files.read_rows(student_run)[-1]
    assert {"l1", "teacher_l1", "teacher_psnr", "psnr_32"} <= row.keys()
    model = dcae_jax.load_generator(generator_run, autoencoder=student_run)
    assert model.sample([0, 1], steps=1).shape == (2, 32, 32, 3)
    files.write_png(str(tmp_path / "x.png"), np.zeros((32, 32, 3), np.uint8))
    encode = ["dcae-jax", "encode", str(tmp_path / "x.png"), f"--out={tmp_path}/z"]
    decode = ["dcae-jax", "decode", f"{tmp_path}/z", f"--out={tmp_path}/y"]
    assert main.main([*encode, f"--model={autoencoder_export}"]) == 0
    assert main.main([*decode, f"--model={student_run}"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_has_the_same_teacher(student_run, autoencoder_export, alone, tmp_path):
    """Catches a run that goes on with other weights, or other terms, of its loss."""
    copy, other = str(tmp_path / "copy"), str(tmp_path / "other")
    shutil.copytree(student_run, copy)
    with pytest.raises(UserError, match="distill.l1_weight was 1.0, is 0.5"):
        run_job(train, _student(autoencoder_export, **{"distill.l1_weight": 0.5}), copy)
    os.mkdir(other)
    small_models.export_autoencoder(other, lambda w: w["decoder.project_in.bias"].__iadd__(1))
    config = _student(other, steps=3, allow_change=("distill.teacher",))
    with pytest.raises(UserError, match="distill.content was 'weights"):
        run_job(train, config, copy)


def _start(config, mesh):
    """The weights before step 1."""
    run = run_lib.build(config_lib.validate(config), "unused", mesh, None)
    state, _ = run_lib.initialise(run)
    return {**state.params, **state.stats}


def test_a_student_starts_from_what_fits(autoencoder_export, one_device, caplog, tmp_path):
    """Catches an encoder of other weights under latents that claim to be the teacher's, a scaling
    factor that is lost with it, and a start that does not say what it took."""
    caplog.set_level("INFO")
    theirs, _ = checkpoint_weights.load_weights(autoencoder_export)
    found = _start(_student(autoencoder_export), one_device)
    same = {k for k in found if k in theirs and np.array_equal(found[k], theirs[k])}
    assert {k for k in theirs if k.startswith(("encoder.", "decoder.stages.4."))} <= same
    assert "decoder.stages.1.1.conv1.kernel" not in same
    assert re.search(r"decoder.project_in +2 +0 +0", caplog.text)
    other = str(tmp_path / "other")
    os.mkdir(other)
    small_models.export_autoencoder(other, lambda w: w["encoder.project_out.bias"].__iadd__(1))
    for changes, words in (
        ({"init_from": other, "init_parts": ("encoder.*",)}, "has another encoder than the weigh"),
        ({"init_parts": (r"decoder\.stages\.2\..*",)}, "misshapen.*fewer parts in init_parts"),
        ({"distill.teacher": "teacher/none"}, "^distill.teacher='teacher/none' is not a local"),
    ):
        with pytest.raises(UserError, match=words):
            _start(_student(autoencoder_export, **changes), one_device)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"distill.teacher": ""}, "need distill.teacher, which is empty"),
        ({"distill.teacher": "f32c32"}, "has latents of f32c32, but the student tiny-lite decodes"),
        ({"distill.teacher": "f16"}, "distill.teacher='f16' is not a VARIANT"),
        ({"model.residual": False}, "has another encoder than the student tiny-lite"),
        ({"trainable": (".*",)}, "trains 'encoder.*needs its encoder frozen"),
        ({"distill.l1_weight": 0.0}, "needs distill.l1_weight or distill.lpips_weight"),
        ({"loss.equivariance": 0.5}, "loss.equivariance=0.5 trains an encoder"),
        ({"job": "evaluate"}, "is for training an autoencoder; leave it empty in this job"),
        ({"distill.lpips_weight": 0.5}, "distill.lpips_weight=0.5 needs loss.lpips_weights"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words, one_device):
    """Catches a run without the teacher that it needs, and latents that are not the teacher's."""
    config = config_lib.load_file(os.path.join(CONFIGS, "distill.py"), "tiny-lite")
    config.distill.teacher = "tiny"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words) as refused:
        config = config_lib.validate(config)
        resolve.check_training(config, one_device)
        frozen.of_variant(config, state_lib.train_spec(config, one_device), one_device)
        frozen.lpips_weights(config, one_device)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_plan_has_the_teacher(one_device):
    """Catches a plan of a student that leaves out the teacher's forward pass or its weights."""
    file = os.path.join(CONFIGS, "distill.py:tiny-lite")
    taught = compile.job_config(file, ("distill.teacher=tiny",))
    plain = compile.job_config(file, ("distill.l1_weight=0.0",))
    more = compile.flops(taught, one_device, 64) - compile.flops(plain, one_device, 64)
    decode = decoder_cost("tiny", 64)
    assert more == pytest.approx(plain.batch_size * decode, rel=0.02)
    _, (*_, decoder) = compile.step_and_arguments(taught, one_device, 64)
    assert decoder and not any(name.startswith("encoder.") for name in decoder)


@pytest.mark.parametrize("student, teacher", [("tiny-lite", "tiny"), ("small-lite", "small")])
def test_a_lite_decoder_costs_at_most_six_tenths(student, teacher):
    """Catches a row of VARIANTS that is not cheaper than what it is distilled from."""
    assert decoder_cost(student, 256) <= 0.6 * decoder_cost(teacher, 256)


@pytest.mark.slow
def test_a_run_with_a_discriminator_resumes_bit_equal(autoencoder_export, alone, tmp_path):
    """Catches a resumed run with another teacher's images, discriminator or order of batches."""
    settings = {
        "steps": 4,
        "save_every": 2,
        "loss.gan_weight": 0.5,
        "loss.gan_warmup_steps": 1,
        "loss.gan_channels": 8,
        "loss.gan_layers": 2,
    }
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    assert run_job(train, _student(autoencoder_export, **settings), whole) == train.DONE
    shutil.copytree(whole, resumed)
    shutil.rmtree(os.path.join(resumed, "checkpoints", "4"))
    assert run_job(train, _student(autoencoder_export, **settings), resumed) == train.DONE
    rows = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in files.read_rows(path)]
        for path in (whole, resumed)
    ]
    assert rows[0] == rows[1] and {"teacher_l1", "gan_g_loss"} <= rows[0][-1].keys()
    a, b = (checkpoint_weights.load_weights(path)[0] for path in (whole, resumed))
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)
    theirs, _ = checkpoint_weights.load_weights(autoencoder_export)
    assert checkpoint_weights.encoder_checksum(a) == checkpoint_weights.encoder_checksum(theirs)
