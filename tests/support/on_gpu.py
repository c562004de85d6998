# SPDX-License-Identifier: Apache-2.0
"""What `make test-gpu` runs: tests of numbers, with the tolerances that they have on a CPU.

DCAE_TEST_GPU=1 selects them; 'cpu' runs the same tests on one CPU device, to try the selection.
"""

import contextlib
import glob
import os

MODE = os.environ.get("DCAE_TEST_GPU", "")
DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")

# Multiplied in full: these tests call layers and steps, which leave the precision to their caller,
# and compare with PyTorch or a formula.
HIGHEST = (
    "models/test_average.py",
    "models/test_dcae.py",
    "models/test_dcae_torch.py",
    "models/test_dit.py",
    "models/test_layers.py",
    "models/test_patchgan.py",
    "models/test_quantized.py",
    "models/test_sdvae.py",
    "models/test_transformer.py",
    "models/test_uvit.py",
    "pretrained/test_published.py::test_a_folder_of_diffusers",
    "pretrained/test_published.py::test_training_starts",
    "training/test_step.py",
)
# At the precision that the program asks for, as users run it.
AS_USED = (
    "api/test_autoencoder.py",
    "api/test_generator.py",
    "api/test_tiling.py",
    "checkpoints/test_load_weights.py",
    "diffusion/test_dpm_solver.py",
    "diffusion/test_meanflow.py",
    "diffusion/test_objectives.py",
    "diffusion/test_samplers.py",
    "evaluation/test_metrics.py",
    "evaluation/test_reconstruction.py",
    "evaluation/test_samples.py",
    "gpu/",
    "jobs/test_encode.py::test_latents_are_those",
    "jobs/test_encode.py::test_the_manifest_holds",
    "jobs/test_encode.py::test_each_image_is_there_once_whatever_the_sizes[7-3-1]",
    "jobs/test_encode.py::test_fixed_crops",
    "jobs/test_evaluate.py::test_the_job_leaves",
    "jobs/test_evaluate.py::test_one_image_gets_lpips_too",
    "jobs/test_nan_guard.py::test_weights_that_overflow",
    "jobs/test_nan_guard.py::test_latents_that_are_not_finite",
    "jobs/test_sample.py::test_the_job_writes",
    "jobs/test_train.py::test_ten_steps_without_a_finite_loss",
    "jobs/test_train.py::test_sigterm_saves",
    "jobs/test_train_diffusion.py::test_a_run_leaves",
    "jobs/test_train_diffusion.py::test_a_restarted_run",
    "models/test_inception.py",
    "models/test_lpips.py",
    "training/test_diffusion_step.py",
    "training/test_losses.py",
    "training/test_optim.py",
    "training/test_phases.py",
)
LEFT_OUT = (
    # several devices or processes
    "test_draws_depend_on_the_key_and_the_example_alone",
    "test_every_mesh_and_batch_gives_the_same_numbers",
    "test_moments_on_all_devices",
    "test_samples_on_eight_devices_are_those_of_one",
    "test_several_devices_do_what_one_does",
    # properties of a program that is compiled for a CPU, or of none
    "test_loading_takes_little_more_memory",
    "test_parameters_and_cost",
    "test_phases_2_and_3_compute_and_keep_less",
    "test_remat_keeps",
    "test_the_default_patterns_fit_every_variant",
)


def prepare():
    """Sets the environment of this process, before it imports jax."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes, one card
    os.environ.setdefault("XLA_FLAGS", "")
    if MODE == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"


def missing():
    """Why nothing can run; '' where a GPU is there."""
    return "" if MODE == "cpu" or any(map(glob.glob, DEVICES)) else "no GPU found"


def _path(item):
    return item.nodeid.removeprefix("tests/")


def has_tests(path):
    """Whether `make test-gpu` opens this file or folder of tests/ at all."""
    path = os.path.relpath(path, os.path.dirname(os.path.dirname(__file__)))
    return any(
        name.startswith(path) or path.startswith(name.split("::")[0]) for name in HIGHEST + AS_USED
    )


def selected(item):
    """Whether `make test-gpu` runs this test."""
    return (
        _path(item).startswith(HIGHEST + AS_USED)
        and not any(f"::{name}" in item.nodeid for name in LEFT_OUT)
        and not any(item.get_closest_marker(name) for name in ("slow", "torch"))
    )


@contextlib.contextmanager
def float32():
    """Lets `dtype=auto` be float32, as on a CPU: the tests' tolerances are those of float32."""
    if not MODE:
        yield
        return
    import pytest

    from dcae_jax.runtime import mesh as mesh_lib

    decide = mesh_lib.compute_dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mesh_lib,
            "compute_dtype",
            lambda dtype, mesh: "float32" if dtype == "auto" else decide(dtype, mesh),
        )
        yield


def precision(item):
    """The context in which to run the test."""
    if not MODE or not _path(item).startswith(HIGHEST):
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")
