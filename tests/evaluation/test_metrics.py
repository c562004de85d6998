# SPDX-License-Identifier: Apache-2.0
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import judges
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.moments import union
from threadpoolctl import threadpool_limits

from dcae_jax.evaluation import metrics

synthetic = functools.cache(judges.synthetic)


def golden(name="features"):
    return json.loads(judges.PATH.read_text())[name]


def photo_pair(size=(45, 51)):
    """A crop of a photograph and a noisy copy, as levels [1, H, W, 3] float32."""
    from skimage import data

    x = data.astronaut()[80 : 80 + size[0], 180 : 180 + size[1]].astype(np.float32)
    noise = np.random.RandomState(0).randn(*x.shape) * np.array([3.0, 12.0, 30.0])
    return x[None], np.clip(np.round(x + noise), 0, 255).astype(np.float32)[None]


def test_psnr_of_each_picture():
    """Fails if the batch is pooled, the peak is not 255, or equal pictures give infinity."""
    x, y = photo_pair()
    pair = np.concatenate([x, x, x]), np.concatenate([y, x, x + 1])
    expected = 10 * np.log10(255**2 / np.mean((x - y) ** 2))
    found = jax.jit(metrics.psnr)(*pair)
    np.testing.assert_allclose(found, [expected, 100, 48.1308], rtol=1e-5)
    assert found.dtype == jnp.float32


def test_ssim_is_scikit_image_inside():
    """Fails on another window, sigma, K, range or covariance (sample or population)."""
    from skimage.metrics import structural_similarity

    x, y = photo_pair()
    _, full = structural_similarity(
        x[0].astype(np.float64),
        y[0].astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1,
        full=True,
    )
    found = np.asarray(metrics.ssim_map(x, y))[0]
    np.testing.assert_allclose(found[5:-5, 5:-5].mean(), full[5:-5, 5:-5].mean(), atol=1e-5)
    np.testing.assert_allclose(found[5:-5, 5:-5], full[5:-5, 5:-5], atol=2e-4)


def test_ssim_counts_the_border_with_reflection():
    """Fails if the border is cropped, or padded with zeros or with the edge pixel twice."""
    from scipy.ndimage import gaussian_filter

    x, y = photo_pair((24, 30))
    blur = functools.partial(
        gaussian_filter, sigma=(0, 1.5, 1.5, 0), mode="mirror", truncate=3.5, output=np.float64
    )
    a, b = x.astype(np.float64), y.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    found = jax.jit(metrics.ssim)(np.concatenate([x, x]), np.concatenate([y, x]))
    np.testing.assert_allclose(found, [expected.mean(), 1.0], atol=1e-5)


def test_pairs_are_checked():
    """Fails if shapes broadcast silently, or a picture too small to reflect is accepted."""
    with pytest.raises(ValueError, match="share one shape"):
        metrics.psnr(np.zeros((2, 8, 8, 3)), np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="at least 6x6"):
        metrics.ssim(np.zeros((1, 5, 8, 3)), np.zeros((1, 5, 8, 3)))
    assert metrics.ssim(np.zeros((1, 6, 6, 3)), np.zeros((1, 6, 6, 3))) == 1


def rows(count=60, dim=7, seed=0):
    random = np.random.RandomState(seed)
    return (random.randn(count, dim) @ random.randn(dim, dim) + 50).astype(np.float32)


def accumulate(batches, dim=7):
    state = metrics.moments_init(dim)
    for batch, weight in batches:
        state = jax.jit(metrics.moments_update)(state, batch, weight)
    return state


def assert_moments(state, x, rtol=1e-5):
    mu, sigma = metrics.moments_finalize(state)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.mean(0, dtype=np.float64), rtol=rtol)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(sigma, expected, atol=rtol * np.abs(expected).max())


def test_moments_equal_numpy():
    """Fails if a mean of 50 deviations cancels, or sigma divides by n instead of n - 1."""
    x = rows()
    assert_moments(accumulate([(x[i : i + 20], None) for i in (0, 20, 40)]), x)
    assert_moments(accumulate([(x, None)]), x)


def test_moments_count_a_padded_batch_once():
    """Fails if padding rows of the last batch count, or their NaN spreads."""
    x = rows(50)
    padded = np.concatenate([x[40:], np.full((10, 7), np.nan, np.float32)])
    batches = [(x[:20], None), (x[20:40], np.ones(20)), (padded, np.arange(20) < 10)]
    assert_moments(accumulate(batches), x)
    empty = (np.full((20, 7), np.nan, np.float32), np.zeros(20))
    assert_moments(accumulate([empty, *batches, empty]), x)


def test_moments_of_nothing_are_refused():
    """Fails if a covariance is divided by n - 1 where n is 0."""
    x = rows(2)
    for few in (metrics.moments_init(7), accumulate([(x[:1], None)])):
        with pytest.raises(ValueError, match="at least 2 images"):
            metrics.moments_finalize(few)
    assert_moments(accumulate([(x, None)]), x)


def test_moments_do_not_drift():
    """Fails if XLA removes the compensation: 4000 batches, each far below the sum's last bit."""
    x = np.full((1, 4), 0.1, np.float32)
    state = metrics.moments_init(4)
    state["count"], state["sum"] = jnp.float32(1), jnp.full((4,), 2.0**21, jnp.float32)
    state["outer"] = jnp.full((4, 4), 2.0**18, jnp.float32)

    @jax.jit
    def many(state):
        return jax.lax.fori_loop(0, 4000, lambda _, s: metrics.moments_update(s, x), state)

    mu, sigma = metrics.moments_finalize(many(state))
    total = 2.0**21 + 4000 * np.float64(x[0])
    np.testing.assert_allclose(mu * 4001, total, rtol=1e-7)
    outer = 2.0**18 + 4000 * np.float64(x[0, 0]) ** 2
    # Of the state's own mean: 1e-7 of the sum above would be 6e-5 of this difference.
    np.testing.assert_allclose(sigma * 4000 + 4001 * np.outer(mu, mu), outer, rtol=1e-6)


def test_moments_on_all_devices():
    """Fails if a sharded batch adds each device's rows more or less than once."""
    x = rows(48)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = [(jax.device_put(x[i : i + 24], sharding), None) for i in (0, 24)]
    assert_moments(accumulate(batches), x)


def test_few_samples_are_biased(caplog):
    """Fails if the warning has the wrong threshold or is silent."""
    with caplog.at_level(logging.WARNING):
        assert not metrics.biased(2048) and not caplog.records
        assert metrics.biased(2047) and "2047" in caplog.text


def covariance_root_trace(a, b):
    """tr((S_a S_b)^(1/2)) from the rows: the nuclear norm of the centred cross product."""
    a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (a.astype(float), b.astype(float)))
    return np.linalg.svd(a @ b.T, compute_uv=False).sum()


@pytest.mark.parametrize("counts", [(300, 400), (300, 20), (20, 300), (20, 30), (41, 41)])
def test_frechet_distance_of_any_rank(counts):
    """Fails if a rank-deficient covariance gives NaN, an imaginary part or a wrong trace."""
    random = np.random.RandomState(1)
    mix = random.randn(40, 40)
    a, b = (random.randn(n, 40) @ mix * s + s for n, s in zip(counts, (1.0, 1.2), strict=True))
    statistics = [v for x in (a, b) for v in (x.mean(0), np.cov(x, rowvar=False))]
    expected = ((statistics[0] - statistics[2]) ** 2).sum() - 2 * covariance_root_trace(a, b)
    expected += np.trace(statistics[1]) + np.trace(statistics[3])
    np.testing.assert_allclose(metrics.frechet_distance(*statistics), expected, rtol=1e-7)
    swapped = metrics.frechet_distance(*statistics[2:], *statistics[:2])
    np.testing.assert_allclose(swapped, expected, rtol=1e-7)
    assert metrics.frechet_distance(*statistics[:2], *statistics[:2]) < 1e-6


@pytest.mark.parametrize("scale", [4.0**-40, 4.0, 4.0**40])
def test_frechet_distance_leaves_out_the_noise_of_a_singular_covariance(scale):
    """Fails if eigenvalues that rounding made of 0 are counted, or small true ones are not."""
    sigma = scale * np.ones((200, 200))  # rank 1, eigenvalue 200 * scale
    expected = 2 * np.trace(sigma) - 2 * np.sqrt(200) * scale
    zero = np.zeros(200)
    found = metrics.frechet_distance(zero, sigma, zero, scale * np.eye(200))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_frechet_distance_edge_cases():
    """Fails if a point mass breaks it, NaN passes for a number, or two networks are mixed."""
    zero, mu, eye = np.zeros((3, 3)), np.array([1.0, 2.0, 2.0]), np.eye(3)
    assert metrics.frechet_distance(mu, zero, 0 * mu, zero) == 9.0
    np.testing.assert_allclose(metrics.frechet_distance(mu, 4 * eye, mu, 9 * eye), 3.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.frechet_distance(mu * np.nan, eye, mu, eye)
    with pytest.raises(ValueError, match="one network"):
        metrics.frechet_distance(mu, eye, np.zeros(4), np.eye(4))


def test_fid_equals_torch_fidelity():
    """Fails if device sums, their merge or the trace leave torch-fidelity's FID (1e-4)."""
    generated, real, _ = synthetic()
    update = jax.jit(metrics.moments_update)
    halves = [update(metrics.moments_init(), generated[i : i + 2048]) for i in (0, 2048)]
    merged = union(*halves)
    one_pass = metrics.moments_finalize(update(halves[0], generated[2048:]))
    for a, b in zip(merged, one_pass, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())
    other = metrics.moments_finalize(update(metrics.moments_init(), real))
    with threadpool_limits(1):  # BLAS threads that wait for a core of other tests take a minute
        fid = metrics.frechet_distance(*merged, *other)
    np.testing.assert_allclose(fid, golden()["frechet_inception_distance"], rtol=1e-4)


def assert_feature_metrics(numbers, generated, real, logits, subsets):
    mean, deviation = metrics.inception_score(logits)
    np.testing.assert_allclose(mean, numbers["inception_score_mean"], rtol=1e-5)
    np.testing.assert_allclose(deviation, numbers["inception_score_std"], rtol=1e-5)
    mean, deviation = metrics.kernel_distance(generated, real, subsets=subsets)
    np.testing.assert_allclose(mean, numbers["kernel_inception_distance_mean"], atol=1e-6)
    np.testing.assert_allclose(deviation, numbers["kernel_inception_distance_std"], atol=1e-6)
    precision, recall = metrics.precision_recall(generated, real)
    expected = [round(numbers[k] * len(generated)) for k in ("precision", "recall")]
    assert [precision * len(generated), recall * len(real)] == expected


def test_scores_equal_torch_fidelity():
    """Fails on another order of random draws, kernel, split or k, or on exchanged sets."""
    assert_feature_metrics(golden("features, 10 subsets"), *synthetic(), subsets=10)


@pytest.mark.slow
def test_kernel_distance_equals_torch_fidelity_in_full():
    """Fails if the draws part ways after the first subsets: all 100 of them."""
    generated, real, _ = synthetic()
    mean, deviation = metrics.kernel_distance(generated, real)
    np.testing.assert_allclose(mean, golden()["kernel_inception_distance_mean"], atol=1e-6)
    np.testing.assert_allclose(deviation, golden()["kernel_inception_distance_std"], atol=1e-6)


@pytest.mark.torch
def test_scores_equal_torch_fidelity_live():
    """Fails if the golden numbers hide a difference: other features, torch-fidelity run now."""
    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    generated, real, logits = judges.synthetic(1500, 96)
    numbers = judges.fidelity_numbers(real, generated, logits, subsets=7)
    assert_feature_metrics(numbers, real, generated, logits, subsets=7)
    update = jax.jit(metrics.moments_update)
    sums = [update(metrics.moments_init(96), x) for x in (real, generated)]
    fid = metrics.frechet_distance(*(v for s in sums for v in metrics.moments_finalize(s)))
    np.testing.assert_allclose(fid, numbers["frechet_inception_distance"], rtol=1e-4)


@pytest.mark.torch
@pytest.mark.slow
def test_golden_numbers_are_those_of_torch_fidelity():
    """Fails if the golden file no longer says what torch-fidelity does with all 4096 rows."""
    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    numbers = judges.fidelity_numbers(*synthetic(), subsets=10)
    for name, value in golden("features, 10 subsets").items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_scores_refuse_too_few_rows():
    """Fails if too few rows give NaN or a numpy traceback instead of one line with the remedy."""
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="subset_size=4"):
        metrics.kernel_distance(x, x)
    with pytest.raises(ValueError, match="more than k=3"):
        metrics.precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="10 splits"):
        metrics.inception_score(x)
    with pytest.raises(ValueError, match="one network"):
        metrics.precision_recall(x, np.zeros((4, 2)))


def test_ssim_of_dark_images_is_scikit_images():
    """Catches another constant of the luminance term, which brighter images hide."""
    from skimage.metrics import structural_similarity

    random = np.random.default_rng(0)
    x = np.abs(random.normal(2, 1, (24, 24))).round()
    y = np.abs(x + random.normal(1, 1, x.shape)).round()
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    _, want = structural_similarity(x, y, full=True, **options)
    found = metrics.ssim_map(*(v[None, :, :, None].astype(np.float32) for v in (x, y)))
    np.testing.assert_allclose(found[0, 5:-5, 5:-5, 0], want[5:-5, 5:-5], atol=1e-4)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    """Catches a term of p log p that is not 0 where p is."""
    logits = np.tile(np.eye(4, dtype=np.float32) * 1e4, (5, 1))
    np.testing.assert_allclose(metrics.inception_score(logits, splits=1), (4, 0), atol=1e-9)
