# SPDX-License-Identifier: Apache-2.0
"""Second half of `make demo`: latents of the photographs, a tiny UViT trained on them, samples.

Each photograph is a class; the objective is SiT's (configs/usit.py:tiny). Whether a sample belongs
to its class is measured by its nearest neighbour in the autoencoder's latents, and compared with
held-out crops.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from dcae_jax import config as config_lib
from dcae_jax.api import generator
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import latents, pipeline, sources, transforms
from dcae_jax.jobs import encode, train

RUN = "usit"  # folder of the diffusion model's run
NEIGHBOURS = 200  # crops per class: training crops to search, and as many held out
SAMPLED = 50  # samples per class
SHOWN = (3, 9)  # (crops, samples) per class on the page


@dataclasses.dataclass(frozen=True)
class Samples:
    """Diffusion results for the page."""

    classes: tuple[str, ...]
    known: int  # crops per class that training saw
    crops: list[np.ndarray]  # SHOWN[0] times [classes, H, W, 3] uint8, as the decoder shows them
    drawn: list[np.ndarray]  # SHOWN[1] times the same, samples
    held_out: float  # fraction of held-out crops whose nearest training crop is of their class
    sampled: float  # the same fraction of samples


def make(workdir: str) -> int:
    """Encodes crops to WORKDIR/latents, trains on them in WORKDIR/usit; returns the exit status.

    Work that an earlier call finished is not repeated.
    """
    config = _config("encode.py", init_from=os.path.join(workdir, PHASES[-1]))
    status = encode.run(config, os.path.join(workdir, "latents"))
    if status != encode.DONE:
        return status
    config = _config("usit.py", data={"path": os.path.join(workdir, "latents")})
    return train.run(config, os.path.join(workdir, RUN))


def _config(file: str, **changes: Any) -> Config:
    """The shipped configuration `file:tiny` with `changes`."""
    path = os.path.join(config_lib.SHIPPED, file)
    given = config_lib.validate(config_lib.load_file(path, "tiny"))
    return config_lib.replace(given, **changes)


def evaluate(workdir: str) -> Samples:
    """Samples from WORKDIR/usit and their scores, with crops for comparison."""
    model = generator.load_generator(os.path.join(workdir, RUN))
    config = _config("usit.py")
    known = latents.latents(os.path.join(workdir, "latents"))
    classes = tuple(known.manifest["class_names"])
    count = len(classes)
    # Crop n is of photograph n % count, here as in the job `encode`.
    near = np.stack([known[n][0][0].astype(np.float32) for n in range(NEIGHBOURS * count)])
    unseen, labels = held_out(model, len(known), NEIGHBOURS * count)
    wanted = np.arange(SAMPLED * count) % count
    c = config.sample
    settings = generator.SampleSettings(c.guidance, c.steps, config.seed, c.sampler)
    drawn = model.sample_latents(wanted, settings)
    hit = nearest(near, np.arange(len(near)) % count, unseen) == labels
    sampled_hit = nearest(near, np.arange(len(near)) % count, drawn) == wanted
    first, then = SHOWN
    shown = np.split(near[: first * count], first) + np.split(drawn[: then * count], then)
    columns = [transforms.to_uint8(np.asarray(model.autoencoder.decode(z))) for z in shown]
    return Samples(
        classes=classes,
        known=len(known) // count,
        crops=columns[:first],
        drawn=columns[first:],
        held_out=float(hit.mean()),
        sampled=float(sampled_hit.mean()),
    )


def held_out(model: generator.Generator, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(latents, labels) of `count` crops from number `first` on, unseen in training."""
    numbers = np.arange(first, first + count)
    batches = pipeline.fixed_crops(
        sources.photos(), numbers, size=model.resolution, batch_size=model.num_classes, crops=2
    )
    z = [np.asarray(model.autoencoder.encode(transforms.to_float(b["image"]))) for b in batches]
    return np.concatenate(z), numbers % model.num_classes


def nearest(known: np.ndarray, labels: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Labels [N] of the nearest neighbours of z [N, h, w, c] in `known`.

    Compares each channel's mean and standard deviation over positions.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def describe(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values.mean((1, 2)), values.std((1, 2))], axis=-1)

    return KNeighborsClassifier(1).fit(describe(known), labels).predict(describe(z))
