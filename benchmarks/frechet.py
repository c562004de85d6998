# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance of `evaluation.metrics` against one with scipy's matrix square root.

    python benchmarks/frechet.py [--dim=2048] [--repeats=3]

Prints a table of regular covariances (more images than dimensions) and rank-deficient ones: the
best time of the repeats, the ratio, and the errors against the exact value, which is computed from
the singular values of the features themselves.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg

sys.path.insert(0, str(Path(__file__).parents[1]))
from dcae_jax.evaluation import metrics


def with_sqrtm(mu1, sigma1, mu2, sigma2):
    """The distance as pytorch-fid computes it."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    return float((mu1 - mu2) @ (mu1 - mu2) + trace)


def exact(a, b):
    """From the features: the trace of the root is the nuclear norm of the centred cross product."""
    rows = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + sum((x * x).sum() for x in rows) - 2 * root


def best_time(function, statistics, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = function(*statistics)
        times.append(time.perf_counter() - start)
    return min(times), value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    dim = flags.dim
    scale = np.linspace(0.05, 1.0, dim)
    versions = f"python {platform.python_version()}, numpy {np.__version__}"
    sys.stdout.write(
        f"{dim} dimensions, {os.cpu_count()} CPU cores, {versions}, scipy {scipy.__version__}\n\n"
        "| covariances | rows | scipy sqrtm, s | dcae_jax, s | ratio | sqrtm's error | ours |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    cases = (
        ("both regular", 2 * dim, 2 * dim),
        ("one singular", 2 * dim, dim // 3),
        ("both singular", dim // 3, dim // 4),
    )
    for name, *counts in cases:
        random = np.random.RandomState(0)
        a, b = (
            np.abs(random.randn(n, dim)) * scale * s for n, s in zip(counts, (1, 1.1), strict=True)
        )
        statistics = [v for x in (a, b) for v in (x.mean(0), np.cov(x, rowvar=False))]
        reference = exact(a, b)
        theirs, their_value = best_time(with_sqrtm, statistics, flags.repeats)
        ours, our_value = best_time(metrics.frechet_distance, statistics, flags.repeats)
        sys.stdout.write(
            f"| {name} | {counts[0]}, {counts[1]} | {theirs:.2f} | {ours:.2f} "
            f"| {ours / theirs:.3f} | {abs(their_value - reference):.1e} "
            f"| {abs(our_value - reference):.1e} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
