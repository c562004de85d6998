# SPDX-License-Identifier: Apache-2.0
"""Decodes files of latents into PNG images.

    dcae-jax decode latents/ --model=runs/phase3 --out=images

Reads what `dcae-jax encode` wrote and writes OUT/NAME.png at each image's own size. The model may
have another decoder than the one that is named in the file, but must have the same encoder.
"""

import os

import numpy as np

from dcae_jax import files
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.errors import UserError
from dcae_jax.runtime import process
from dcae_jax.serve import inputs, latent_files, reconstruct
from dcae_jax.serve.latent_files import Facts


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax decode", __doc__)
    parser.add_argument("latents", nargs="+", help="files, folders or patterns in quotes")
    inputs.add_model(parser)
    inputs.add_quantize(parser)
    parser.add_argument("--out", required=True, help="folder of the PNG files")
    parser.add_argument("--batch_size", type=inputs.positive, default=8, help="of equal sizes")
    given = parser.parse_args(arguments)
    found = inputs.find(given.latents, latent_files.EXTENSIONS)
    files.check(given.out, "--out")
    files.check_folder(given.out)
    ae = inputs.load_autoencoder(given)
    encoder = ae.encoder_checksum

    def read(path: str) -> tuple[np.ndarray, Facts]:
        latent, facts = latent_files.read(path)
        _check(path, latent, facts, ae, encoder)
        return latent, facts

    for window in inputs.windows(found, read, lambda value: value[1].height * value[1].width):
        latents = [latent for _, (latent, _) in window]
        sizes = [(facts.height, facts.width) for _, (_, facts) in window]
        results = reconstruct.decode(latents, sizes, ae, given.batch_size)
        for (item, _), image in zip(window, results, strict=True):
            path = os.path.join(given.out, f"{item.name}.png")
            files.write_png(path, image)
            inputs.say(f"{item.path}: {image.shape[1]}x{image.shape[0]}, {path}")
    return process.DONE


def _check(path: str, latent: np.ndarray, facts: Facts, ae: Autoencoder, encoder: str) -> None:
    """Raises UserError unless the latents in `path` are those of this encoder."""
    ours, theirs = (ae.compression, ae.latent_channels), (facts.compression, latent.shape[2])
    if ours != theirs:
        what = "f{}c{}".format
        raise UserError(f"{path} has latents of {what(*theirs)}, but --model is {what(*ours)}")
    if facts.encoder != encoder:
        raise UserError(
            f"{path} is of another encoder: {facts.model} (checksum {facts.encoder[:12]}, that of "
            f"--model is {encoder[:12]}); give that model"
        )
