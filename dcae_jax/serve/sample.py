# SPDX-License-Identifier: Apache-2.0
"""Samples images of classes from a diffusion model.

    dcae-jax sample --model=runs/usit --labels=0,3,5 --guidance=4 --out=samples
    dcae-jax sample --model=runs/usit --labels=0-9 --count=20 --out=samples

Writes OUT/0000-label3.png and so on, and the first 64 in OUT/grid.png. Sample i depends on the seed
and i alone. Many samples, resumed where they stopped: the job configs/sample.py.
"""

import os
import re

import numpy as np

from dcae_jax import files
from dcae_jax.api import generator
from dcae_jax.api.generator import Generator, SampleSettings
from dcae_jax.diffusion import samplers
from dcae_jax.errors import UserError
from dcae_jax.jobs import sample
from dcae_jax.runtime import process
from dcae_jax.serve import inputs

GRID = 64  # images in grid.png, at most
MOST_COUNT = 1_000_000


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax sample", __doc__)
    inputs.add_model(
        parser, "a diffusion model: a workdir, checkpoint, export or published weights"
    )
    parser.add_argument("--autoencoder", default="", help="default: that of the model's latents")
    parser.add_argument("--resolution", type=inputs.positive, default=0, help="of a published DiT")
    parser.add_argument("--labels", default="", help="as in 0,3,7-9; default: each class once")
    parser.add_argument("--count", type=inputs.positive, default=0, help="default: one per label")
    parser.add_argument("--out", required=True, help="folder of the PNG files")
    parser.add_argument("--batch_size", type=inputs.positive, default=8)
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none")
    parser.add_argument("--steps", type=int, default=30, help="model evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default="", help=f"one of {', '.join(samplers.SAMPLERS)}")
    given = parser.parse_args(arguments)
    labels = parse_labels(given.labels)
    settings = SampleSettings(given.guidance, given.steps, given.seed, given.sampler)
    if given.count > MOST_COUNT:
        raise UserError(f"--count={given.count} is more than {MOST_COUNT}; use configs/sample.py")
    files.check(given.out, "--out")
    files.check_folder(given.out)
    process.choose_platform()
    process.use_compile_cache()
    with inputs.naming_the_flag():
        model = generator.load_generator(
            given.model,
            autoencoder=given.autoencoder,
            dtype=given.dtype,
            weights=given.weights,
            variant=given.variant,
            resolution=given.resolution,
        )
    labels = labels or list(range(model.num_classes))
    draw(model, labels, given.count or len(labels), settings, given.batch_size, given.out)
    return process.DONE


def draw(
    model: Generator,
    labels: list[int],
    count: int,
    settings: SampleSettings,
    batch_size: int,
    out: str,
) -> None:
    """Writes `count` samples, the labels in turn, batch by batch, and the grid."""
    model.check_labels(labels)
    batch_size, shown, digits = min(batch_size, count), [], len(str(count - 1))
    for first in range(0, count, batch_size):
        # The last batch is filled up, so that one program is compiled.
        rows = [labels[i % len(labels)] for i in range(first, first + batch_size)]
        images = model.sample(
            rows,
            settings.guidance,
            settings.steps,
            settings.seed,
            sampler=settings.sampler,
            first=first,
        )
        for number, label, image in zip(range(first, count), rows, images, strict=False):
            path = os.path.join(out, f"{number:0{max(digits, 4)}d}-label{label}.png")
            files.write_png(path, image)
            shown += [image] if len(shown) < GRID else []
            inputs.say(f"label {label}, {image.shape[1]}x{image.shape[0]}, {path}")
    files.write_png(os.path.join(out, "grid.png"), sample.grid(np.stack(shown)))


def parse_labels(text: str) -> list[int]:
    """'0,3,7-9' -> [0, 3, 7, 8, 9]; '' -> []. Raises UserError."""
    labels: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--labels={text!r}: {part!r} is not a class; write 0,3,7-9")
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return labels
