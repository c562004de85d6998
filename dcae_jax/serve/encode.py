# SPDX-License-Identifier: Apache-2.0
"""Encodes image files into files of latents, which `dcae-jax decode` turns back into images.

    dcae-jax encode photos/ --model=runs/phase3 --out=latents
    dcae-jax encode photo.jpg --model=OWNER/NAME --out=latents --format=safetensors

Writes OUT/NAME.npz for each image: the latents, not scaled, with the image's size, the scaling
factor and the model. A data set to train diffusion on: the job configs/encode.py.
"""

import logging
import os

from dcae_jax import files
from dcae_jax.data import transforms
from dcae_jax.runtime import process
from dcae_jax.serve import inputs, latent_files, reconstruct


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax encode", __doc__)
    parser.add_argument("images", nargs="+", help="files, folders or patterns in quotes")
    inputs.add_model(parser)
    inputs.add_quantize(parser)
    parser.add_argument("--out", required=True, help="folder of the latents")
    parser.add_argument("--format", default="npz", choices=("npz", "safetensors"))
    reconstruct.add_sizes(parser)
    given = parser.parse_args(arguments)
    found = inputs.find(given.images, transforms.EXTENSIONS)
    files.check(given.out, "--out")
    files.check_folder(given.out)
    ae = inputs.load_autoencoder(given)
    multiple = reconstruct.checked_multiple(given.multiple, ae.compression)
    encoder = ae.encoder_checksum
    for window in inputs.windows(found, inputs.read_image, lambda p: p[..., 0].size):
        pixels = [image for _, image in window]
        latents = reconstruct.encode(pixels, ae, multiple, given.batch_size)
        for (item, image), latent in zip(window, latents, strict=True):
            height, width = image.shape[:2]
            facts = latent_files.Facts(
                height, width, ae.compression, ae.scaling_factor, given.model, encoder
            )
            path = os.path.join(given.out, f"{item.name}.{given.format}")
            latent_files.write(path, latent, facts)
            size = "x".join(map(str, latent.shape))
            inputs.say(f"{item.path}: {width}x{height}, latent {size}, {path}")
    if ae.scaling_factor is None:
        logging.info("the scaling factor of this model is unknown; the files say so")
    return process.DONE
