# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes image files, and writes each beside its reconstruction.

    dcae-jax reconstruct photo.jpg --model=runs/phase3 --out=reconstructions
    dcae-jax reconstruct photos/ 'more/*.png' --model=OWNER/NAME --out=reconstructions

Writes OUT/NAME.png for each image, original on the left, and a line with its PSNR, SSIM and latent
size. Any size: images are padded to multiples of the model's compression (or of --multiple), and
those of more than 2 megapixels go through in tiles. Scores are of the real pixels alone.
"""

import argparse
import os

import numpy as np

from dcae_jax import files
from dcae_jax.api import images
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.data import transforms
from dcae_jax.errors import UserError
from dcae_jax.evaluation import pairs
from dcae_jax.runtime import process
from dcae_jax.serve import inputs


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax reconstruct", __doc__)
    parser.add_argument("images", nargs="+", help="files, folders or patterns in quotes")
    inputs.add_model(parser)
    inputs.add_quantize(parser)
    parser.add_argument("--out", required=True, help="folder of the PNG files")
    parser.add_argument("--alone", action="store_true", help="write the reconstruction alone")
    add_sizes(parser)
    given = parser.parse_args(arguments)
    found = inputs.find(given.images, transforms.EXTENSIONS)
    files.check(given.out, "--out")
    files.check_folder(given.out)
    ae = inputs.load_autoencoder(given)
    multiple = checked_multiple(given.multiple, ae.compression)
    scores: list[tuple[float, float | None]] = []
    try:
        for window in inputs.windows(found, inputs.read_image, lambda pixels: pixels[..., 0].size):
            pixels_of = [pixels for _, pixels in window]
            results = reconstruct(pixels_of, ae, multiple, given.batch_size)
            for (item, pixels), (result, latent) in zip(window, results, strict=True):
                path = os.path.join(given.out, f"{item.name}.png")
                both = (result,) if given.alone else (pixels, result)
                files.write_png(path, files.image_grid([image[None] for image in both], tile=1))
                scores.append((pairs.psnr(pixels, result), pairs.ssim(pixels, result)))
                inputs.say(f"{item.path}: {describe(pixels, *scores[-1], latent)}, {path}")
    finally:
        if len(scores) > 1:
            inputs.say(_mean(scores))
    return process.DONE


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how many programs are compiled."""
    parser.add_argument("--batch_size", type=inputs.positive, default=8, help="of equal sizes")
    parser.add_argument(
        "--multiple",
        type=inputs.positive,
        default=0,
        help="pad to multiples of so many pixels: fewer sizes, so fewer programs to compile",
    )


def checked_multiple(given: int, compression: int) -> int:
    """--multiple, or the compression. Raises UserError unless it is a multiple of that."""
    if given % compression:
        raise UserError(f"--multiple={given} is not a multiple of the compression, {compression}")
    return given or compression


def encode(
    pixels: list[np.ndarray], ae: Autoencoder, multiple: int, batch_size: int
) -> list[np.ndarray]:
    """The latents [h, w, c] float32 of images [H, W, 3] uint8, one program for each padded size."""
    padded = [images.pad(image, multiple) for image in pixels]
    latents: dict[int, np.ndarray] = {}
    shapes = [(image.shape[0], image.shape[1]) for image in padded]
    for rows in inputs.batches(shapes, lambda row: inputs.batch_size(batch_size, *shapes[row])):
        x = transforms.to_float(np.stack([padded[row] for row in rows]))
        tile = images.tile_for(*shapes[rows[0]], ae.compression)
        latents |= dict(zip(rows, np.asarray(ae.encode(x, tile=tile)), strict=True))
    return [latents[row] for row in range(len(pixels))]


def decode(
    latents: list[np.ndarray], sizes: list[tuple[int, int]], ae: Autoencoder, batch_size: int
) -> list[np.ndarray]:
    """Images [H, W, 3] uint8 of latents [h, w, c] and the images' own sizes (H, W)."""
    results: dict[int, np.ndarray] = {}
    f = ae.compression
    shapes = [(z.shape[0] * f, z.shape[1] * f) for z in latents]
    for rows in inputs.batches(shapes, lambda row: inputs.batch_size(batch_size, *shapes[row])):
        z = np.stack([latents[row] for row in rows])
        y = np.asarray(ae.decode(z, tile=images.tile_for(*shapes[rows[0]], f)))
        for row, image in zip(rows, y, strict=True):
            results[row] = images.to_pixels(image, *sizes[row])
    return [results[row] for row in range(len(latents))]


def reconstruct(
    pixels: list[np.ndarray], ae: Autoencoder, multiple: int, batch_size: int
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """(reconstruction [H, W, 3] uint8, shape of its latents) of each image."""
    latents = encode(pixels, ae, multiple, batch_size)
    sizes = [(image.shape[0], image.shape[1]) for image in pixels]
    results = decode(latents, sizes, ae, batch_size)
    return [(result, z.shape) for result, z in zip(results, latents, strict=True)]


def describe(pixels: np.ndarray, psnr: float, ssim: float | None, latent: tuple[int, ...]) -> str:
    """'640x480, PSNR 25.31 dB, SSIM 0.7123, latent 30x40x32 (24 times fewer values)'."""
    height, width = pixels.shape[:2]
    fewer = pixels.size / np.prod(latent)
    ratio = f"{fewer:.3g} times fewer values" if fewer >= 1 else f"{1 / fewer:.3g} times more"
    size = "x".join(map(str, latent))
    return f"{width}x{height}, {_scores(psnr, ssim)}, latent {size} ({ratio})"


def _scores(psnr: float, ssim: float | None) -> str:
    return f"PSNR {psnr:.2f} dB, SSIM {'-' if ssim is None else f'{ssim:.4f}'}"


def _mean(scores: list[tuple[float, float | None]]) -> str:
    known = [ssim for _, ssim in scores if ssim is not None]
    psnr = sum(psnr for psnr, _ in scores) / len(scores)
    ssim = sum(known) / len(known) if known else None
    return f"mean of {len(scores)} images: {_scores(psnr, ssim)}"
