# SPDX-License-Identifier: Apache-2.0
"""What the comparison page computes: one image through several autoencoders, and samples."""

import time
from collections.abc import Callable

import jax
import numpy as np

from dcae_jax import files
from dcae_jax.api import images
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.api.generator import Generator, SampleSettings
from dcae_jax.data import transforms
from dcae_jax.errors import UserError
from dcae_jax.evaluation import pairs
from dcae_jax.jobs import sample

MOST_PIXELS = 2**23  # of an uploaded image
MOST_SAMPLES = 16  # drawn at once
MOST_STEPS = 250
ORIGINAL = "original"
HEAD = ("model", "PSNR, dB", "SSIM", "latent", "fewer values", "encode, ms", "decode, ms")

Views = dict[str, np.ndarray]  # name -> [H, W, 3] uint8
_compiled: set[tuple[int, tuple[int, ...]]] = set()  # programs that have run: (model, shape)


def views(pixels: np.ndarray, models: dict[str, Autoencoder]) -> tuple[Views, list[list[str]]]:
    """(images to look at, rows of a table under HEAD) of an image [H, W, 3] uint8.

    The images: the original, and for each model its reconstruction and the difference. Times are
    of programs that are compiled already.
    """
    height, width = pixels.shape[:2]
    if height * width > MOST_PIXELS:
        most = MOST_PIXELS / 1e6
        raise UserError(f"{width}x{height} is more than {most:.1f} million pixels; use reconstruct")
    shown, rows = {ORIGINAL: pixels}, []
    for name, ae in models.items():
        x = images.pad(transforms.to_float(pixels)[None], ae.compression)
        tile = images.tile_for(x.shape[1], x.shape[2], ae.compression)
        z, encode_ms = _timed(lambda: ae.encode(x, tile=tile), (id(ae), x.shape))  # noqa: B023
        y, decode_ms = _timed(lambda: ae.decode(z, tile=tile), (id(ae), z.shape))  # noqa: B023
        result = images.to_pixels(y[0], height, width)
        shown[name] = result
        shown[f"difference: {name}"] = files.difference(pixels, result)
        ssim = pairs.ssim(pixels, result)
        rows.append(
            [
                name,
                f"{pairs.psnr(pixels, result):.2f}",
                "-" if ssim is None else f"{ssim:.4f}",
                "x".join(map(str, z.shape[1:])),
                f"{pixels.size / z[0].size:.3g}x",
                f"{encode_ms:.0f}",
                f"{decode_ms:.0f}",
            ]
        )
    return shown, rows


def _timed(
    run: Callable[[], images.AnyArray], program: tuple[int, tuple[int, ...]]
) -> tuple[np.ndarray, float]:
    """(result, milliseconds) of a program that has been compiled before."""
    if program not in _compiled:
        jax.block_until_ready(run())
        _compiled.add(program)
    began = time.perf_counter()
    result = np.asarray(run())
    return result, 1000 * (time.perf_counter() - began)


def samples(
    model: Generator, label: int, count: int, settings: SampleSettings
) -> tuple[np.ndarray, str]:
    """(a grid of samples [*, *, 3] uint8, a line about them). Raises UserError."""
    if not 1 <= count <= MOST_SAMPLES or settings.steps > MOST_STEPS:
        raise UserError(f"at most {MOST_SAMPLES} samples of {MOST_STEPS} steps")
    began = time.perf_counter()
    drawn = model.sample(
        [label] * count, settings.guidance, settings.steps, settings.seed, sampler=settings.sampler
    )
    seconds = time.perf_counter() - began
    size = f"{model.resolution}x{model.resolution}"
    line = f"{count} of class {label}, {size}, seed {settings.seed}: {seconds:.1f} s"
    return sample.grid(drawn), f"{line}, with compiling if the settings are new"
