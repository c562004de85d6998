# SPDX-License-Identifier: Apache-2.0
"""What `small` and its phases reach on held-out photographs, beside PCA of the same latent size.

    python benchmarks/photos.py --out=photos
    python benchmarks/small.py --photos=photos runs/small/phase1 runs/small/phase2 runs/small/phase3
    python benchmarks/small.py --photos=photos --image=small.jpg --only=flower,bee runs/small/phase3

Every photograph gives CROPS fixed crops of each of SIZES at its own scale. The spectrum column is
the power above half the Nyquist frequency relative to the photographs: 1 is as sharp as they are.
PCA is fitted on patches of the training photographs; a fit on twice the patches shows that it has
converged. --pca writes the latter, as the package ships it, or reads it if it is there. Appends a
JSON line per model to --out.

--image writes an image instead: the middle of centre crops of 512 pixels, and what the models make
of it.
"""

import argparse
import json
import os
import time

import numpy as np

from dcae_jax import files
from dcae_jax.config.schema import Evaluate
from dcae_jax.data import sources
from dcae_jax.demo import overview, pca, shipped

SIZES, CROPS = (256, 512), 8
PATCHES = (100_000, 200_000)


def high_power(images: np.ndarray) -> float:
    """Mean power of luminance above half the Nyquist frequency, of images [B, S, S, 3] uint8."""
    luma = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    size = luma.shape[1]
    window = np.outer(np.hanning(size), np.hanning(size))  # or the borders' steps fill it
    power = np.abs(np.fft.fft2((luma - luma.mean((1, 2), keepdims=True)) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    return float(power[:, (frequency > 0.25) & (frequency <= 0.5)].mean())


def score(reconstruct, settings: Evaluate, source: sources.Source) -> dict[str, float]:
    """PSNR, SSIM and the spectrum's ratio at each size; reconstruct: uint8 images -> uint8."""
    result = {}
    for size in settings.resolutions:
        rows, power = [], []
        for x, y in pca.pairs(reconstruct, settings, source, size):
            rows.append(pca.psnr_and_ssim(x, y))
            power.append((high_power(x) * len(x), high_power(y) * len(x)))
        psnr, ssim = np.concatenate(rows, axis=1).mean(1)
        photographs, outputs = np.sum(power, axis=0)
        result |= {
            f"psnr_{size}": float(psnr),
            f"ssim_{size}": float(ssim),
            f"spectrum_{size}": float(outputs / photographs),
        }
    return result


def draw(path: str, models: list[str], held_out: sources.Source) -> None:
    """A JPEG: a photograph per row; PCA and the models in columns, with their mean PSNR.

    PSNR is of centre crops of 512 pixels, whose middle is shown.
    """
    settings = Evaluate(resolutions=(512,), count=0, batch_size=len(held_out))
    each = [("PCA", pca.load(shipped.LINEAR).reconstruct)]
    each += [(os.path.basename(os.path.abspath(m)), shipped.reconstruction(m)) for m in models]
    columns = []
    for name, reconstruct in each:
        x, y = next(pca.pairs(reconstruct, settings, held_out, 512))
        columns = columns or [("photograph", x[:, 128:384, 128:384])]
        psnr = pca.psnr_and_ssim(x, y)[0].mean()
        columns.append((f"{name}: {psnr:.1f} dB", y[:, 128:384, 128:384]))
    overview.write(path, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="workdirs or exports")
    parser.add_argument("--photos", default="photos")
    parser.add_argument("--only", default="", help="score the held-out files whose names have this")
    parser.add_argument("--out", default="")
    parser.add_argument("--image", default="", help="write this JPEG instead of scores")
    parser.add_argument("--pca", default="", help="the fitted PCA: read, or written")
    given = parser.parse_args()
    settings = Evaluate(resolutions=SIZES, crops=CROPS, count=0)
    train = sources.folder(os.path.join(given.photos, "train"))
    held_out = sources.folder(os.path.join(given.photos, "held_out"))
    if given.only:
        names = [name for name in held_out.files if any(o in name for o in given.only.split(","))]
        held_out = sources.Folder(held_out.root, tuple(names), ())
    if given.image:
        return draw(given.image, given.models, held_out)
    rows = []

    def add(name: str, reconstruct) -> None:
        began = time.perf_counter()
        rows.append((name, score(reconstruct, settings, held_out)))
        print(name, rows[-1][1], f"{time.perf_counter() - began:.0f} s", flush=True)
        if given.out:
            with open(given.out, "a") as file:
                file.write(json.dumps({"model": name, **rows[-1][1]}) + "\n")

    if os.path.exists(given.pca):
        add("PCA", pca.load(given.pca).reconstruct)
    else:
        for patches in PATCHES:
            linear = pca.fit(train, 32, 32, patches)
            add(f"PCA, {patches} patches", linear.reconstruct)
        if given.pca:
            pca.save(linear, given.pca)
    for model in given.models:
        add(model, shipped.reconstruction(model))
    print(files.table([["model", *rows[0][1]], *([name, *r.values()] for name, r in rows)]))


if __name__ == "__main__":
    main()
