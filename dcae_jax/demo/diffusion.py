# SPDX-License-Identifier: Apache-2.0
"""Second half of `make demo`: latents of the photographs, tiny UViTs trained on them, samples.

Each photograph is a class; the objective is SiT's (configs/usit.py:tiny), then average velocities,
from that model (configs/fewstep.py:tiny). Whether a sample belongs to its class is measured by its
nearest neighbour in the autoencoder's latents, and compared with held-out crops.
"""

import dataclasses
import os
import time
from typing import Any

import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import generator
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import latents, pipeline, sources, transforms
from dcae_jax.jobs import encode, train

RUN, FEW = "usit", "fewstep"  # folders of the diffusion models' runs
STEPS, FEW_STEPS = 1500, 300  # of training and fine-tuning: half of the configurations'
JUMPS = (1, 2, 4)
NEIGHBOURS = 200  # crops per class: training crops to search, and as many held out
SAMPLED = 50  # samples per class
SHOWN = (3, 9)  # (crops, samples) per class on the page
SHOWN_FEW = 3  # samples per class and number of steps
TIMED = 16  # samples in the batch whose time is taken


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples of one model with one number of steps."""

    name: str
    steps: int
    hit: float  # fraction of samples whose nearest training crop is of their class
    seconds: float  # per image, decode included, in a batch of TIMED
    latents: np.ndarray  # [N, h, w, c]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Diffusion results for the page."""

    classes: tuple[str, ...]
    known: int  # crops per class that training saw
    crops: list[np.ndarray]  # SHOWN[0] times [classes, H, W, 3] uint8, as the decoder shows them
    images: list[np.ndarray]  # SHOWN[1] times the same, samples of the flow model
    held_out: float  # fraction of held-out crops whose nearest training crop is of their class
    few_grid: np.ndarray  # uint8: a row per class, a group of columns per entry of `drawn`
    drawn: tuple[Drawn, ...]  # the last: the flow model with all its steps

    @property
    def sampled(self) -> float:
        """The fraction `hit` of the flow model."""
        return self.drawn[-1].hit


def make(workdir: str) -> int:
    """Encodes crops to WORKDIR/latents, trains in WORKDIR/usit, then in WORKDIR/fewstep.

    Returns the exit status. Work that an earlier call finished is not repeated.
    """
    config = _config("encode.py", init_from=os.path.join(workdir, PHASES[-1]))
    status = encode.run(config, os.path.join(workdir, "latents"))
    if status != encode.DONE:
        return status
    data, flow = {"path": os.path.join(workdir, "latents")}, os.path.join(workdir, RUN)
    few = _config("fewstep.py", data=data, init_from=flow, steps=FEW_STEPS)
    return train.run(_config("usit.py", data=data, steps=STEPS), flow) or train.run(
        few, os.path.join(workdir, FEW)
    )


def _config(file: str, **changes: Any) -> Config:
    """The shipped configuration `file:tiny` with `changes`."""
    path = os.path.join(config_lib.SHIPPED, file)
    given = config_lib.validate(config_lib.load_file(path, "tiny"))
    return config_lib.replace(given, **changes)


def evaluate(workdir: str) -> Samples:
    """Samples from both models and their scores, with crops for comparison."""
    model = generator.load_generator(os.path.join(workdir, RUN))
    few = generator.load_generator(os.path.join(workdir, FEW))
    config = _config("usit.py")
    known = latents.latents(os.path.join(workdir, "latents"))
    classes = tuple(known.manifest["class_names"])
    count = len(classes)
    # Crop n is of photograph n % count, here as in the job `encode`.
    near = np.stack([known[n][0][0].astype(np.float32) for n in range(NEIGHBOURS * count)])
    near_labels = np.arange(len(near)) % count
    unseen, labels = held_out(model, len(known), NEIGHBOURS * count)
    wanted = np.arange(SAMPLED * count) % count
    c = config.sample

    def drawn(name: str, model: generator.Generator, settings: generator.SampleSettings) -> Drawn:
        z = model.sample_latents(wanted, settings)
        hit = (nearest(near, near_labels, z) == wanted).mean()
        return Drawn(name, settings.steps, float(hit), _seconds(model, settings), z)

    one = generator.SampleSettings(c.guidance, 1, config.seed, "euler")
    whole = generator.SampleSettings(c.guidance, c.steps, config.seed, c.sampler)
    each = (
        drawn("flow", model, one),
        *(
            drawn("few-step", few, generator.SampleSettings(steps=n, seed=config.seed))
            for n in JUMPS
        ),
        drawn("flow", model, whole),
    )
    hit = nearest(near, near_labels, unseen) == labels
    first, then = SHOWN

    def columns(z: np.ndarray, shown: int) -> list[np.ndarray]:
        parts = np.split(z[: shown * count], shown)
        return [transforms.to_uint8(np.asarray(model.autoencoder.decode(part))) for part in parts]

    crops = columns(near, first)
    gap = np.full_like(crops[0], 255)
    groups = [[*columns(part.latents, SHOWN_FEW), gap] for part in each]
    few_grid = files.image_grid(sum(groups, [])[:-1], tile=64)
    return Samples(
        classes=classes,
        known=len(known) // count,
        crops=crops,
        images=columns(each[-1].latents, then),
        held_out=float(hit.mean()),
        few_grid=few_grid,
        drawn=each,
    )


def _seconds(model: generator.Generator, settings: generator.SampleSettings) -> float:
    """Seconds per image of a second batch of TIMED; the first compiles the program."""
    labels = np.arange(TIMED) % model.num_classes
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        model.sample(
            labels, settings.guidance, settings.steps, settings.seed, sampler=settings.sampler
        )
    return (time.perf_counter() - began) / TIMED


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


def table(samples: Samples) -> list[list[str]]:
    """Rows of text: each model, its steps, its scores and seconds."""
    head = ["samples", "steps", "of their class", "against crops", "seconds per image"]
    rows = [
        [
            d.name,
            f"{d.steps}",
            f"{d.hit:.3f}",
            f"{d.hit / samples.held_out:.2f}",
            f"{d.seconds:.4f}",
        ]
        for d in samples.drawn
    ]
    return [head, ["held-out crops", "", f"{samples.held_out:.3f}", "1.00", ""], *rows]
