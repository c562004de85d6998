# SPDX-License-Identifier: Apache-2.0
"""What all tests share: eight virtual CPU devices, one compile cache, tiny configurations."""

import logging
import os
import tempfile

# Before the first import of jax. The processes that tests start inherit both.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "dcae_jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Unoptimised code compiles in half the time, and tests run it for a second at most.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax
import pytest

from dcae_jax import config as config_lib
from dcae_jax import sharding

CONFIGS = os.path.join(os.path.dirname(__file__), os.pardir, "configs")


@pytest.fixture
def one_device():
    """The mesh of a laptop."""
    return sharding.make_mesh(config_lib.default().mesh, jax.devices()[:1])


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command line that runs in this process sets up logging; the next test must not see it."""
    root, absl = logging.getLogger(), logging.getLogger("absl")
    handlers, levels = list(root.handlers), (root.level, absl.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    absl.setLevel(levels[1])


@pytest.fixture
def alone(monkeypatch):
    """Jobs that run in this process see one device, as on a laptop."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
    )


@pytest.fixture
def small():
    """A configuration that trains in seconds: tiny, narrower, 32 pixels, batches of 4."""
    config = config_lib.load_file(os.path.join(CONFIGS, "phase1.py"), "tiny")
    config.model.widths = (8, 8, 16, 32, 32)
    config.model.latent_channels = 8
    config.resolution = 32
    config.batch_size = 4
    config.steps = 4
    config.optimizer.warmup_steps = 2
    config.log_every = 1
    config.save_every = 2
    config.evaluate_every = 0
    config.evaluate.resolutions = (32,)
    config.evaluate.batch_size = 8
    config.evaluate.count = 6
    config.evaluate.grid = 2
    return config
