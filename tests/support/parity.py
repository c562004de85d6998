# SPDX-License-Identifier: Apache-2.0
"""Autoencoders beside diffusers' own."""

import jax
import numpy as np

from dcae_jax.models import weights as weights_lib

# Small programs compile for longer than they run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def close(ours, theirs):
    """Whether two outputs agree: 1e-3 of the deviation at most, 1e-4 of it on average."""
    error = np.abs(np.asarray(ours) - theirs) / theirs.std()
    return error.max() <= 1e-3 and error.mean() <= 1e-4


def round_trip(graph, quick=True):
    """A compiled function: (weights, x [B, H, W, 3]) -> (latents, images made of them)."""

    def run(weights, x):
        model = weights_lib.merge(graph, weights)
        z = model.encode(x)
        return z, model.decode(z)

    return jax.jit(run, compiler_options=QUICK if quick else None)
