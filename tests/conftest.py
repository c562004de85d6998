# SPDX-License-Identifier: Apache-2.0
"""What all tests share: eight virtual CPU devices, one compile cache, tiny configurations."""

import gc
import logging
import os
import tempfile

from support import on_gpu, signatures

# Before the first import of jax. The processes that tests start inherit all of it.
if on_gpu.MODE:
    on_gpu.prepare()
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "dcae_jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if on_gpu.MODE != "1":
    # Unoptimised code compiles in half the time, and tests run it for a second at most.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={1 if on_gpu.MODE else 8}",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
        ]
    )
if not on_gpu.MODE:
    signatures.install()

import jax
import pytest
from goldens import judges as goldens
from safetensors.numpy import save_file
from support import CONFIGS, NARROW, run_job, small_models, small_networks

from dcae_jax import config as config_lib
from dcae_jax import main
from dcae_jax.evaluation import reconstruction, samples
from dcae_jax.jobs import train
from dcae_jax.models import inception, inception_torch, lpips_torch
from dcae_jax.runtime import mesh as mesh_lib

# Traced programs are many objects: with Python's thresholds a fifth of the time went here.
gc.set_threshold(20_000, 20, 50)


def pytest_configure():
    """Ends `make test-gpu` where there is no GPU, before any process starts."""
    if on_gpu.MODE and on_gpu.missing():
        pytest.exit(f"{on_gpu.missing()}: nothing was tested", returncode=0)


def pytest_ignore_collect(collection_path):
    """Leaves files alone that `make test-gpu` has nothing in, with the packages that they need."""
    is_all = collection_path.name == "tests"
    return True if on_gpu.MODE and not is_all and not on_gpu.has_tests(collection_path) else None


def pytest_collection_modifyitems(config, items):
    """Only the numerical tests under `make test-gpu`; without it, none of those in tests/gpu."""
    left_out = [item for item in items if not on_gpu.selected(item)]
    if not on_gpu.MODE:
        left_out = [item for item in items if "tests/gpu/" in item.nodeid]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    if on_gpu.MODE == "1" and jax.default_backend() != "gpu":
        pytest.exit("JAX sees no GPU: pip install 'jax[cuda13]', unset JAX_PLATFORMS", returncode=1)
    with on_gpu.float32():
        yield


@pytest.fixture(autouse=True)
def _precision(request):
    with on_gpu.precision(request.node):
        yield


@pytest.fixture
def one_device():
    """The mesh of a laptop."""
    return mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command line that runs in this process sets up logging; the next test must not see it."""
    loggers = [logging.getLogger(name) for name in (None, "absl", "jax")]
    handlers, levels = list(loggers[0].handlers), [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _see_one_device(patch):
    make_mesh = mesh_lib.make_mesh
    patch.setattr(
        mesh_lib, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
    )


@pytest.fixture
def alone(monkeypatch):
    """Jobs that run in this process see one device, as on a laptop."""
    _see_one_device(monkeypatch)


@pytest.fixture(scope="session")
def autoencoder_export(tmp_path_factory):
    """The export of a narrow autoencoder with random weights."""
    return small_models.export_autoencoder(str(tmp_path_factory.mktemp("autoencoder")))


@pytest.fixture(scope="session")
def latents_folder(autoencoder_export, tmp_path_factory):
    """A dozen latents of that autoencoder, in three classes."""
    folder, images = (str(tmp_path_factory.mktemp(name)) for name in ("latents", "images"))
    with pytest.MonkeyPatch.context() as patch:
        _see_one_device(patch)
        return small_models.write_latents(folder, autoencoder_export, images)


@pytest.fixture
def diffusion_config(latents_folder):
    """The configuration of a small UViT on those latents."""
    return small_models.diffusion_config(latents_folder)


@pytest.fixture(scope="session")
def generator_run(latents_folder, tmp_path_factory):
    """The workdir of its training, which nothing interrupted."""
    workdir = str(tmp_path_factory.mktemp("generator"))
    with pytest.MonkeyPatch.context() as patch:
        _see_one_device(patch)
        assert run_job(train, small_models.diffusion_config(latents_folder), workdir) == train.DONE
    return workdir


@pytest.fixture
def small():
    """A configuration that trains in seconds: tiny, narrower, 32 pixels, batches of 4."""
    config = config_lib.load_file(os.path.join(CONFIGS, "phase1.py"), "tiny")
    config.update_from_flattened_dict(NARROW)
    config.steps = 4
    config.optimizer.warmup_steps = 2
    config.optimizer.schedule = "constant"  # or each number of steps is a program of its own
    config.log_every = 1
    config.save_every = 2
    config.evaluate_every = 0
    config.evaluate.batch_size = 8
    config.evaluate.count = 6
    config.evaluate.grid = 2
    return config


@pytest.fixture
def small_inception(monkeypatch, tmp_path):
    """Replaces Inception by a fast network; returns the path of its weights."""
    monkeypatch.setattr(inception, "features", small_networks.small_features)
    monkeypatch.setattr(inception_torch, "load", small_networks.small_weights)
    reconstruction.eval_step.cache_clear()
    samples.feature_step.cache_clear()
    path = tmp_path / "inception.safetensors"
    path.write_bytes(b"small")
    yield str(path)
    reconstruction.eval_step.cache_clear()
    samples.feature_step.cache_clear()


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory):
    """The file of LPIPS with random features."""
    path = tmp_path_factory.mktemp("lpips") / "lpips-alex.safetensors"
    weights = lpips_torch.from_torch(goldens.lpips_state("alex", scale=1.0))[1]
    save_file(weights, path, metadata={"network": "lpips-alex"})
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Ten photographs' worth of noise and waves, 32 pixels per side."""
    root = tmp_path / "pictures"
    small_networks.write_images(root, goldens.pictures(10, 32))
    return str(root)


@pytest.fixture
def evaluate_config(small, folder):
    """The job at 32 pixels on `folder`."""
    config = config_lib.load_file(os.path.join(CONFIGS, "evaluate.py"))
    config.model = small.model
    config.resolution = 32
    config.data.source, config.data.path = "folder", folder
    config.evaluate.batch_size, config.evaluate.grid = 8, 3
    return config


@pytest.fixture
def run_export(tmp_path, capsys):
    """Runs the job `export` -> (status, what it said, the folder written)."""

    def command(init_from, form, *more, out="out"):
        path = str(tmp_path / out)
        status = main.main(
            [
                "main",
                f"--config={os.path.join(CONFIGS, 'export.py')}",
                f"--config.init_from={init_from}",
                f"--config.export.format={form}",
                f"--config.export.out={path}",
                *more,
            ]
        )
        return status, capsys.readouterr().err, path

    return command
