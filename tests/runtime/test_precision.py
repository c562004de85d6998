# SPDX-License-Identifier: Apache-2.0
"""What dtype=float32 means: in the lowered programs, since on a CPU no number shows it."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS
from support.stablehlo import products

from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api import generator as generator_lib
from dcae_jax.config.schema import Model
from dcae_jax.evaluation import metrics, reconstruction, samples
from dcae_jax.jobs import encode
from dcae_jax.models import inception, lpips
from dcae_jax.planner import compile as planner

SHAPES = {"lpips": lpips.shapes("alex"), "inception": inception.shapes()}
NETWORKS = {
    name: {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
    for name, shapes in SHAPES.items()
}
MOMENTS = jax.eval_shape(metrics.moments_init)
IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
MASK = jax.ShapeDtypeStruct((2,), jnp.float32)


def _autoencoder(mesh, dtype, variant="tiny"):
    return autoencoder_lib.abstract_autoencoder(Model(variant=variant), mesh, dtype)


def _of_float32(lowered):
    """For each product of float32 whether it is of the highest precision; there are some."""
    return [highest for dtypes, highest in products(lowered) if dtypes == {"f32"}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_multiplies_float32_in_full(one_device, dtype):
    """Catches a reported number that TF32 or a TPU's bfloat16 moved, of the model, of LPIPS, of
    Inception or of the moments."""
    model = _autoencoder(one_device, dtype)
    moments = {"image": MOMENTS, "output": MOMENTS}
    step = reconstruction.eval_step(model.graphdef, one_device)
    found = _of_float32(step.lower(model.weights, NETWORKS, None, moments, IMAGES, MASK))
    assert len(found) > 190 and all(found)  # 95 of Inception, twice
    step = samples.feature_step(one_device)
    found = _of_float32(step.lower(NETWORKS["inception"], MOMENTS, IMAGES, MASK))
    assert len(found) == 190 and all(found)
    rows = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    radii = jax.ShapeDtypeStruct((8,), jnp.float32)
    for lowered in (
        metrics._kernel_sums.lower(rows, rows),
        metrics._inside.lower(rows, rows, radii),
        metrics._kth_distance.lower(rows, rows, 3),
    ):
        found = _of_float32(lowered)
        assert found and all(found)


@pytest.mark.parametrize("variant", ["tiny", "sd-vae-f8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_of_the_interface_is_float32(one_device, dtype, variant):
    """Catches latents of 'float32' that differ by 7e-4 on a GPU and 5e-3 on a TPU, and a model of
    bfloat16 that pays for it."""
    model = _autoencoder(one_device, dtype, variant)
    f, c = model.compression, model.latent_channels
    x = jax.ShapeDtypeStruct((2, 4 * f, 4 * f, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((2, 4, 4, c), jnp.float32)
    images = jax.ShapeDtypeStruct(x.shape, jnp.uint8)
    for lowered in (
        model._encode.lower(model.weights, x),
        model._decode.lower(model.weights, z),
        encode.encode_fn(model, "bfloat16", model.latent_channels).lower(model.weights, images),
    ):
        found = [highest for _, highest in products(lowered)]
        assert found and (all(found) if dtype == "float32" else not any(found))


@pytest.mark.parametrize("file, objective", [("uvit", "epsilon"), ("dit", "learned_sigma")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_in_float32_are_float32s(one_device, dtype, file, objective):
    """Catches samples of 'float32' whose products are rounded to TF32 or bfloat16."""
    inner = _autoencoder(one_device, dtype)
    settings = {"latent_size": 4, "latent_channels": 32, "num_classes": 3, "scaling_factor": 1.0}
    model = Model(name=file, variant="tiny", **settings)
    diffusion = config_lib.Config(objective=objective)
    model = generator_lib.abstract_generator(model, diffusion, inner, dtype)
    run, arguments = model.program(2, generator_lib.SampleSettings(guidance=2.0, steps=3))
    found = [highest for _, highest in products(run.lower(*arguments))]
    assert len(found) > 20 and (all(found) if dtype == "float32" else not any(found))


def test_training_keeps_the_platforms_precision(one_device):
    """Catches a training step that pays for what only reported numbers need."""
    config = config_lib.load_file(os.path.join(CONFIGS, "phase1.py"), "tiny")
    config.dtype, config.loss.lpips_weight = "bfloat16", 1.0
    config = config_lib.validate(config)
    step, arguments = planner.step_and_arguments(config, one_device, 64)
    found = [highest for _, highest in products(step.lower(*arguments))]
    assert len(found) > 100 and not any(found)


def test_the_context_of_the_caller_is_left_alone(one_device):
    """Catches a setting that leaks out of a call, and into the programs of the library's user."""
    model = autoencoder_lib.create_autoencoder("tiny", mesh=one_device)
    model.encode(np.zeros((1, 16, 16, 3), np.float32))
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert products(jax.jit(jnp.matmul).lower(x, x)) == [({"f32"}, False)]
