# SPDX-License-Identifier: Apache-2.0
"""First part of `make demo`: the model that this package ships, beside PCA of its latent size."""

import dataclasses
import os

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
    """Scores and images on fixed crops of the two held-out photographs of scikit-image."""

    rows: Scores
    images: dict[int, list[np.ndarray]]  # {size: [photographs, PCA's, small's]}, [2, S, S, 3] uint8


def evaluate() -> Shipped:
    """Reconstructs with the shipped model and PCA. Takes seconds."""
    model = autoencoder.load_autoencoder(MODEL)
    linear = pca.load(LINEAR)

    def reconstruct(images: np.ndarray) -> np.ndarray:
        z = model.encode(transforms.to_float(images))
        return transforms.to_uint8(np.asarray(model.decode(z)))

    source = sources.photos(sources.HELD_OUT_PHOTOS)
    # Crop n is of photograph n % 2, so the first two show both.
    images = {}
    for size in SETTINGS.resolutions:
        photographs, shown = next(pca.pairs(reconstruct, SETTINGS, source, size))
        images[size] = [photographs[:2], linear.reconstruct(photographs[:2]), shown[:2]]
    size = f"f{model.compression}, {model.latent_channels} channels"
    rows = [
        (f"PCA ({size})", pca.scores(linear.reconstruct, SETTINGS, source)),
        (f"small ({size})", pca.scores(reconstruct, SETTINGS, source)),
    ]
    return Shipped(rows, images)
