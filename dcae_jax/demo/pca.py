# SPDX-License-Identifier: Apache-2.0
"""The best linear autoencoder of a given latent size: PCA on f x f patches, the baseline."""

import dataclasses
import io
from collections.abc import Callable, Iterator

import numpy as np

from dcae_jax import files
from dcae_jax.config.schema import Evaluate
from dcae_jax.data import pipeline
from dcae_jax.data.sources import Source
from dcae_jax.data.transforms import random_crop
from dcae_jax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class PCA:
    """Each f x f patch becomes its c coefficients: the latent size of an f{f}c{c} autoencoder."""

    mean: np.ndarray  # [f * f * 3] float32, levels 0..255
    components: np.ndarray  # [c, f * f * 3] float32, orthonormal rows

    @property
    def compression(self) -> int:
        """f: pixels per side of a patch."""
        return round((self.mean.size / 3) ** 0.5)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """[B, H, W, 3] uint8, H and W multiples of f -> the same, projected and rounded."""
        f = self.compression
        b, h, w, _ = images.shape
        cut = images.astype(np.float32).reshape(b, h // f, f, w // f, f, 3)
        x = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, f * f * 3) - self.mean
        y = x @ self.components.T @ self.components + self.mean
        y = y.reshape(b, h // f, w // f, f, f, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
        return np.clip(np.round(y), 0, 255).astype(np.uint8)


def fit(source: Source, f: int, channels: int, patches: int, seed: int = 0) -> PCA:
    """PCA of `patches` random f x f patches, taken in turn from the images of `source`.

    In closed form, so there is nothing to tune; 3072 dimensions (f = 32) take 12 kB per patch.
    """
    from sklearn.decomposition import PCA as Solver

    rng = np.random.default_rng(seed)
    data = np.empty((patches, f * f * 3), np.float32)
    for number, chosen in enumerate(np.array_split(np.arange(patches), len(source))):
        image, _ = source[number]  # decoded once
        for i in chosen:
            data[i] = np.asarray(random_crop(image, f, rng)).reshape(-1)
    solved = Solver(channels, svd_solver="covariance_eigh", copy=False).fit(data)
    return PCA(np.asarray(solved.mean_, np.float32), np.asarray(solved.components_, np.float32))


def save(pca: PCA, path: str) -> None:
    """Writes an .npz whose components are float16: 200 kB at f32c32."""
    file = io.BytesIO()
    np.savez_compressed(file, mean=pca.mean, components=pca.components.astype(np.float16))
    files.write_file(path, file.getvalue())


def load(path: str) -> PCA:
    """What `save` wrote."""
    with np.load(path) as found:
        return PCA(found["mean"], found["components"].astype(np.float32))


def pairs(
    reconstruct: Callable[[np.ndarray], np.ndarray], settings: Evaluate, source: Source, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of the crops that `evaluation.reconstruction` takes, and their reconstructions.

    reconstruct: [B, size, size, 3] uint8 -> the same. Yields two of those, without padding.
    """
    for batch in pipeline.evaluation_batches(
        source,
        size=size,
        batch_size=settings.batch_size,
        count=settings.count,
        crops=settings.crops,
    ):
        keep = batch["mask"] > 0
        yield batch["image"][keep], reconstruct(batch["image"])[keep]


def psnr_and_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[2, B] float: PSNR in dB and SSIM of each pair of images [B, H, W, 3] uint8."""
    levels = x.astype(np.float32), y.astype(np.float32)
    return np.stack([metrics.psnr(*levels), metrics.ssim(*levels)])


def scores(
    reconstruct: Callable[[np.ndarray], np.ndarray], settings: Evaluate, source: Source
) -> dict[str, float]:
    """Mean PSNR and SSIM at each of settings.resolutions: {'psnr_256': ..., 'ssim_256': ...}.

    reconstruct: as in `pairs`.
    """
    result = {}
    for size in settings.resolutions:
        rows = [psnr_and_ssim(*pair) for pair in pairs(reconstruct, settings, source, size)]
        means = np.concatenate(rows, axis=1).mean(1)
        result |= {f"psnr_{size}": float(means[0]), f"ssim_{size}": float(means[1])}
    return result
