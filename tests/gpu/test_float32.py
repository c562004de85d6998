# SPDX-License-Identifier: Apache-2.0
"""On a GPU, dtype=float32 is float32, not TF32: compared with float64 and with the CPU.

TF32 rounds inputs to 2^-11: its errors are 1e-4 to 1e-3 of a result's standard deviation, those of
float32 1e-7 to 1e-5. The goldens of Inception and LPIPS (models/) check the same for them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.evaluation import metrics
from dcae_jax.runtime import mesh as mesh_lib


def _meshes():
    """(the GPU's mesh, a CPU's)."""
    sizes = config_lib.default().mesh
    return [mesh_lib.make_mesh(sizes, jax.devices(*kind)[:1]) for kind in ((), ("cpu",))]


def _error(found, want):
    """The largest difference, in standard deviations of `want`."""
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return np.abs(found - want).max() / want.std()


def test_plain_products_are_tf32_where_nobody_asks():
    """Catches a GPU, or a setting, on which the tests of this file could not fail."""
    a, b = np.random.default_rng(0).standard_normal((2, 512, 512)).astype(np.float32)
    want = a.astype(np.float64) @ b
    assert _error(jnp.matmul(a, b, precision="highest"), want) < 1e-5
    if jax.default_backend() == "gpu":
        assert _error(jnp.matmul(a, b, precision="default"), want) > 5e-5


def test_statistics_of_features_are_those_of_float64():
    """Catches FID, KID, precision and recall computed from products in TF32."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((256, 256))
    x, y = (np.float32(1 + random.standard_normal((1500, 256)) @ mixing / 16) for _ in range(2))
    state = metrics.moments_update(metrics.moments_init(256), x)
    mean, covariance = metrics.moments_finalize(state)
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-6, atol=1e-7)
    expected = np.cov(x.astype(np.float64).T)
    np.testing.assert_allclose(covariance, expected, atol=2e-6 * np.abs(expected).max())

    a, b = x.astype(np.float64), y.astype(np.float64)
    kernels = [(p @ q.T / 256 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b))]
    for kernel in kernels[:2]:
        np.fill_diagonal(kernel, 0)
    wanted = [kernel.sum(1) for kernel in kernels]
    for found, want in zip(metrics._kernel_sums(x, y), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    want = np.sort(square, axis=1)[:, 3]
    np.testing.assert_allclose(metrics._kth_distance(x, y, 3), want, rtol=1e-5)


@pytest.mark.parametrize("dtype, bounds", [("float32", (5e-5, 1e-5)), ("bfloat16", (0.5, 0.03))])
@pytest.mark.parametrize("variant", ["tiny", "sd-vae-f8"])
def test_latents_and_images_are_those_of_the_cpu(variant, dtype, bounds):
    """Catches TF32 in a float32 autoencoder, and a bfloat16 one less accurate than its dtype.

    bfloat16 tolerance: 0.5 standard deviations at most, 0.03 on average, with random weights.
    """
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    ours, reference = (
        autoencoder_lib.create_autoencoder(variant, mesh=mesh, dtype=kind)
        for mesh, kind in zip(_meshes(), (dtype, "float32"), strict=True)
    )
    z, want = (np.asarray(ae.encode(x)) for ae in (ours, reference))
    y, images = (np.asarray(ae.decode(want)) for ae in (ours, reference))
    for found, expected in ((z, want), (y, images)):
        error = np.abs(found - expected) / expected.std()
        assert error.max() < bounds[0] and error.mean() < bounds[1], (error.max(), error.mean())


def test_samples_in_float32_are_those_of_the_cpu(generator_run):
    """Catches TF32 in a float32 UViT, whose errors grow with each step of the sampler."""
    ours, reference = (
        dcae_jax.load_generator(generator_run, mesh=mesh, dtype="float32").sample(
            [0, 1, 2, 0], guidance=2.0, steps=10, seed=3
        )
        for mesh in _meshes()
    )
    off = np.abs(ours.astype(int) - reference)
    assert off.max() <= 1 and np.mean(off > 0) <= 2e-3
