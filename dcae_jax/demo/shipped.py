# SPDX-License-Identifier: Apache-2.0
"""First part of `make demo`: the model that this package ships, beside PCA of its latent size."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Evaluate
from dcae_jax.data import sources, transforms
from dcae_jax.demo import pca
from dcae_jax.demo.markup import Scores

MODEL = os.path.join(checkpoint_weights.SHIPPED, "small")
LINEAR = os.path.join(MODEL, "pca.npz")  # fitted on small's training photographs
SETTINGS = Evaluate(resolutions=(256, 512), crops=8, count=0, batch_size=8)


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Scores and images on fixed crops of flower and chelsea, which no model here has seen."""

    rows: Scores
    images: dict[int, list[np.ndarray]]  # {size: [photographs, PCA's, small's]}, [2, S, S, 3] uint8


def reconstruction(model: str) -> Callable[[np.ndarray], np.ndarray]:
    """[B, H, W, 3] uint8 -> the same from the autoencoder at `model`, in float32."""
    ae = autoencoder.load_autoencoder(model, dtype="float32")
    return lambda x: transforms.to_uint8(np.asarray(ae.decode(ae.encode(transforms.to_float(x)))))


def evaluate() -> Shipped:
    """Reconstructs with the shipped model and PCA, in under a minute on two CPU cores."""
    reconstruct, linear = reconstruction(MODEL), pca.load(LINEAR)
    source = sources.photos(sources.HELD_OUT_PHOTOS)
    # Crop n is of photograph n % 2, so the first two show both.
    images = {}
    for size in SETTINGS.resolutions:
        photographs, shown = next(pca.pairs(reconstruct, SETTINGS, source, size))
        images[size] = [photographs[:2], linear.reconstruct(photographs[:2]), shown[:2]]
    size = f"f{linear.compression}, {len(linear.components)} channels"
    rows = [
        (f"PCA ({size})", pca.scores(linear.reconstruct, SETTINGS, source)),
        (f"small ({size})", pca.scores(reconstruct, SETTINGS, source)),
    ]
    return Shipped(rows, images)
