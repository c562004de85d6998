# SPDX-License-Identifier: Apache-2.0
"""The moments of a set from those of its parts, in float64."""

import numpy as np

from dcae_jax.evaluation import metrics


def union(a, b):
    """States of `metrics.moments_update` of two sets -> (mu, sigma) of both together."""
    (mu_a, sigma_a), (mu_b, sigma_b) = metrics.moments_finalize(a), metrics.moments_finalize(b)
    n, m = float(a["count"]), float(b["count"])
    apart = mu_a - mu_b
    scatter = (n - 1) * sigma_a + (m - 1) * sigma_b + n * m / (n + m) * np.outer(apart, apart)
    return (n * mu_a + m * mu_b) / (n + m), scatter / (n + m - 1)
