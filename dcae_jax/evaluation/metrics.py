# SPDX-License-Identifier: Apache-2.0
"""Image quality metrics: PSNR, SSIM, FID, Inception score, KID, precision and recall.

Functions of arrays: images, or the features that `models/inception.py` computes from them. Device
code runs in float32 with matrix products at the highest precision, host code in float64. FID and
rFID follow mseitzer/pytorch-fid; the Inception score, KID, precision and recall follow
torch-fidelity, including its order of random draws, so equal features give equal numbers.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Real, Shaped

from dcae_jax.models.weights import AnyArray, Array

Moments = dict[str, AnyArray]  # see `moments_init`

PSNR_CAP = 100.0  # dB, for identical images, so a mean over images stays finite
MIN_FRECHET_SAMPLES = 2048  # the features' dimension: with fewer the covariance is singular


def psnr(x: AnyArray, y: AnyArray) -> Float32[Array, " B"]:
    """Peak signal-to-noise ratio of each pair: 10 log10(255^2 / MSE).

    x, y: [B, H, W, C] levels 0..255 (`transforms.to_levels`) -> [B] float32 in dB. Identical images
    score `PSNR_CAP`, not infinity, so the mean of a set stays finite.
    """
    x, y = _pair(x, y)
    mse = jnp.mean(jnp.square(x - y), axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
    return 10 * jnp.log10(255.0**2 / jnp.maximum(mse, floor))


def ssim(x: AnyArray, y: AnyArray) -> Float32[Array, " B"]:
    """Structural similarity of each pair (Wang et al. 2004), as torchmetrics computes it.

    x, y: [B, H, W, C] levels 0..255, H and W at least 6 -> [B] float32 in [-1, 1]. A Gaussian
    window of 11x11 with sigma 1.5, K1 0.01, K2 0.03, each channel separately, reflect padding, the
    mean over the full image. On the interior (5 pixels cropped) it equals scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    """
    return jnp.mean(ssim_map(x, y), axis=(1, 2, 3))


def ssim_map(x: AnyArray, y: AnyArray) -> Float32[Array, "B H W C"]:
    """SSIM before the mean: [B, H, W, C], see `ssim`."""
    x, y = _pair(x, y)
    if min(x.shape[1:3]) < 6:
        raise ValueError(f"ssim needs images of at least 6x6 pixels, got {x.shape[1:3]}; enlarge")
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    # Subtracting a constant leaves variances as they are and costs float32 4 times less precision.
    a, b = x - 127.5, y - 127.5
    mean_a, mean_b, aa, bb, ab = (_gaussian_blur(v) for v in (a, b, a * a, b * b, a * b))
    var_a = jnp.maximum(aa - mean_a * mean_a, 0.0)
    var_b = jnp.maximum(bb - mean_b * mean_b, 0.0)
    covariance = ab - mean_a * mean_b
    mean_x, mean_y = mean_a + 127.5, mean_b + 127.5
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance * (2 * covariance + c2) / (var_a + var_b + c2)


def _pair(x: AnyArray, y: AnyArray) -> tuple[Float32[Array, "B H W C"], Float32[Array, "B H W C"]]:
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"a pair of images must share one shape [B, H, W, C], got {x.shape} and {y.shape}"
        )
    return x, y


def _gaussian_blur(x: Float32[Array, "B H W C"]) -> Float32[Array, "B H W C"]:
    """[B, H, W, C] -> the same shape, 11 taps of sigma 1.5 along H and W, reflect padding."""
    taps = np.exp(-np.square(np.arange(-5, 6) / 1.5) / 2)
    taps = (taps / taps.sum()).tolist()
    x = jnp.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
    for axis in (1, 2):  # sums of slices, not a convolution: exact float32 on every platform
        padded, size = x, x.shape[axis] - 10
        x = jnp.zeros((), x.dtype)
        for i, tap in enumerate(taps):
            x = x + tap * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
    return x


def moments_init(dim: int = 2048) -> Moments:
    """Empty sums for `moments_update`: a dict of float32 arrays on the devices.

    Keys: count [], shift [dim], sum and outer with their compensations sum_low and outer_low
    ([dim], [dim, dim]). The shift is the mean of the first batch; sums of x - shift stay
    precise where a feature's mean is large compared with its deviation.
    """
    vector, matrix = jnp.zeros((dim,), jnp.float32), jnp.zeros((dim, dim), jnp.float32)
    return {
        "count": jnp.zeros((), jnp.float32),
        "shift": vector,
        "sum": vector,
        "sum_low": vector,
        "outer": matrix,
        "outer_low": matrix,
    }


def moments_update(
    state: Moments,
    features: Real[AnyArray, "B dim"],
    weight: Shaped[AnyArray, " B"] | None = None,
) -> Moments:
    """Adds a batch to the sums. Pure, for use under jit; the batch may be sharded over a mesh.

    features: [B, dim]; weight: [B], 1 for a row that counts and 0 for padding (a padded row may
    hold anything, NaN too); None counts every row. -> the new state. Batches are added with
    compensation (Knuth's two-sum), so the error does not grow with their number.
    """
    x = jnp.asarray(features, jnp.float32)
    counts = jnp.ones(x.shape[0], bool) if weight is None else jnp.asarray(weight) > 0
    count = jnp.sum(counts.astype(jnp.float32))
    x = jnp.where(counts[:, None], x, 0.0)
    mean = jnp.sum(x, axis=0) / jnp.maximum(count, 1.0)
    shift = jnp.where(state["count"] == 0, mean, state["shift"])
    x = jnp.where(counts[:, None], x - shift, 0.0)
    outer = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    total, total_low = _two_sum(state["sum"], jnp.sum(x, axis=0))
    outer, outer_low = _two_sum(state["outer"], outer)
    return {
        "count": state["count"] + count,
        "shift": shift,
        "sum": total,
        "sum_low": state["sum_low"] + total_low,
        "outer": outer,
        "outer_low": state["outer_low"] + outer_low,
    }


def _two_sum(a: AnyArray, b: AnyArray) -> tuple[AnyArray, AnyArray]:
    """a + b rounded, and the rounding error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def moments_finalize(
    state: Moments,
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, "dim dim"]]:
    """State -> (mu [dim], sigma [dim, dim]), float64 NumPy; sigma divides by n - 1."""
    count = float(state["count"])
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {count:.0f}; give more")
    shift, total, total_low, outer, outer_low = (
        np.asarray(state[key], np.float64)
        for key in ("shift", "sum", "sum_low", "outer", "outer_low")
    )
    total, outer = total + total_low, outer + outer_low
    sigma = outer - np.outer(total, total) / count
    sigma = (sigma + sigma.T) / 2  # the device's float32 product is symmetric only to rounding
    return shift + total / count, sigma / (count - 1)


def biased(count: int) -> bool:
    """Whether `count` images are too few for a comparable FID; if so, logs a warning."""
    if count >= MIN_FRECHET_SAMPLES:
        return False
    logging.warning(
        "FID of %d images is biased upwards: its covariance needs at least %d, papers use 50000",
        count,
        MIN_FRECHET_SAMPLES,
    )
    return True


def frechet_distance(mu1: AnyArray, sigma1: AnyArray, mu2: AnyArray, sigma2: AnyArray) -> float:
    """Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu1, mu2: [d]; sigma1, sigma2: [d, d] symmetric positive semidefinite, of any
    rank -> float, never negative. Computed in float64 on the host. With S1 = L L^T the product
    S1 S2 has the eigenvalues of the symmetric L^T S2 L, so one Cholesky factor and one symmetric
    eigenvalue problem replace a matrix square root; a singular S1 gets its L from an
    eigendecomposition. Source of the formula: Heusel et al. 2017 (TTUR), equation 6.
    """
    import scipy.linalg

    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    dim = mu1.size
    if mu1.shape != (dim,) or mu2.shape != (dim,) or {sigma1.shape, sigma2.shape} != {(dim, dim)}:
        raise ValueError(
            "statistics must be mu [d] and sigma [d, d] with the same d, got "
            f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}: use one network for both"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics have NaN or infinity: look for non-finite images or weights")
    try:
        eigenvalues = scipy.linalg.eigh(
            sigma2, sigma1, type=2, driver="gv", eigvals_only=True, check_finite=False
        )
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma1)
        kept = values > max(values[-1], 0.0) * dim * np.finfo(np.float64).eps
        factor = vectors[:, kept] * np.sqrt(values[kept])
        eigenvalues = np.linalg.eigvalsh(factor.T @ sigma2 @ factor)
    trace_root = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return max(float(distance), 0.0)


def inception_score(logits: AnyArray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016): exp of the mean KL(p(y|x) || p(y)), over splits.

    logits: [N, classes] without the bias of the last layer, as in the original and torch-fidelity
    -> (mean, standard deviation) over the splits of the shuffled rows.
    Computed in float64; the shuffle is torch-fidelity's, `RandomState(seed).permutation(N)`.
    """
    logits = np.asarray(logits)
    count = len(logits)
    if logits.ndim != 2 or count < splits:
        raise ValueError(
            f"inception_score needs [N, classes] with N >= {splits} splits, got {logits.shape}; "
            "give more images or fewer splits"
        )
    order = np.random.RandomState(seed).permutation(count)
    scores = []
    for i in range(splits):
        rows = logits[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        rows = rows - rows.max(axis=1, keepdims=True)
        log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.where(p > 0, p * (log_p - np.log(p.mean(axis=0))), 0.0)
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features1: AnyArray,
    features2: AnyArray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel Inception distance (Binkowski et al. 2018): unbiased MMD^2 with (x.y/d + 1)^3.

    features1 (generated), features2 (reference): [N, d] and [M, d] -> (mean, standard deviation)
    over the subsets. Rows are drawn as in torch-fidelity: from `RandomState(seed)`, for each
    subset `choice` without replacement from the first set, then from the second. The kernels are
    computed on the default device in float32 and summed up in float64.
    """
    features1, features2 = _feature_pair(features1, features2)
    fewest = min(len(features1), len(features2))
    if fewest < subset_size:
        raise ValueError(
            f"kernel_distance draws {subset_size} rows, but a set has {fewest}; "
            f"give more images or subset_size={fewest}"
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = features1[random.choice(len(features1), subset_size, replace=False)]
        y = features2[random.choice(len(features2), subset_size, replace=False)]
        xx, yy, xy = (np.asarray(v, np.float64).sum() for v in _kernel_sums(x, y))
        pairs = subset_size * (subset_size - 1)
        distances.append((xx + yy) / pairs - 2 * xy / subset_size**2)
    return float(np.mean(distances)), float(np.std(distances))


@jax.jit
def _kernel_sums(x: AnyArray, y: AnyArray) -> tuple[jax.Array, ...]:
    """Row sums of the three kernel matrices, those of x and of y without their diagonals."""

    def kernel(a: AnyArray, b: AnyArray) -> jax.Array:
        root = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) / a.shape[1] + 1.0
        return root * root * root

    xx, yy = kernel(x, x), kernel(y, y)
    off_diagonal = (v.sum(axis=1) - jnp.diagonal(v) for v in (xx, yy))
    return *off_diagonal, kernel(x, y).sum(axis=1)


def precision_recall(
    generated: AnyArray, real: AnyArray, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), as torch-fidelity computes them.

    generated, real: [N, d] and [M, d] -> (precision, recall). Precision is the fraction of
    generated rows inside the ball of some real row, whose radius reaches its k-th nearest real
    neighbour; recall swaps the roles. Distances run on the default device in float32,
    `block` rows at a time (block x N floats of memory).
    """
    generated, real = _feature_pair(generated, real)
    if min(len(generated), len(real)) <= k:
        raise ValueError(
            f"precision_recall needs more than k={k} rows in each set, "
            f"got {len(generated)} and {len(real)}; give more images"
        )
    center = real.mean(axis=0, dtype=np.float64).astype(np.float32)
    generated, real = jnp.asarray(generated - center), jnp.asarray(real - center)
    precision = _covered(generated, real, k, block)
    recall = _covered(real, generated, k, block)
    return precision, recall


def _covered(
    queries: Float32[Array, "M d"], points: Float32[Array, "N d"], k: int, block: int
) -> float:
    """Fraction of queries closer to some point than that point is to its k-th neighbour."""
    radii = jnp.concatenate(
        [_kth_distance(points[i : i + block], points, k) for i in range(0, len(points), block)]
    )
    inside = [
        np.asarray(_inside(queries[i : i + block], points, radii))
        for i in range(0, len(queries), block)
    ]
    return float(np.concatenate(inside).mean())


@functools.partial(jax.jit, static_argnums=2)
def _kth_distance(
    rows: Float32[Array, "M d"], points: Float32[Array, "N d"], k: int
) -> Float32[Array, " M"]:
    nearest = -jax.lax.top_k(-_squared_distances(rows, points), k + 1)[0]
    # On CPUs a slice fused into top_k turns it into a full sort, five times slower.
    return jax.lax.optimization_barrier(nearest)[:, -1]


@jax.jit
def _inside(
    rows: Float32[Array, "M d"], points: Float32[Array, "N d"], radii: Float32[Array, " N"]
) -> Bool[Array, " M"]:
    return jnp.any(_squared_distances(rows, points) <= radii, axis=1)


def _squared_distances(a: Float32[Array, "M d"], b: Float32[Array, "N d"]) -> Float32[Array, "M N"]:
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2 * product


def _feature_pair(
    a: AnyArray, b: AnyArray
) -> tuple[Float32[np.ndarray, "N d"], Float32[np.ndarray, "M d"]]:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be [N, d] and [M, d] with the same d, got {a.shape} and {b.shape}: "
            "use one network for both"
        )
    return a, b
