# SPDX-License-Identifier: Apache-2.0
"""JPEG to batch: this project's Grain pipeline beside torch's DataLoader with PIL.

    python benchmarks/loader.py

Both decode, crop to 256 pixels, flip and stack batches of 16 with the same number of workers:
threads for ours (`data.workers=0`), processes for torch. Seconds are for a fixed number of batches
after the prefetched ones.
"""

import os
import re
import tempfile
import time

import common
import numpy as np
from PIL import Image

SIZE, BATCH, WORKERS, FILES, AHEAD = 256, 16, 2, 48, 2
CROPS = ("random", "center", "random_resized")
CASES = [f"{crop}, JPEG of {pixels} pixels" for pixels in (512, 2048) for crop in CROPS]
AREA = (0.25, 1.0)


def _case(case: str) -> tuple[str, int, int]:
    """(crop, pixels, batches to time)."""
    crop, rest = case.split(", ")
    pixels = int(rest.split()[2])
    return crop, pixels, 40 if pixels == 512 else 8


def folder(pixels: int) -> str:
    """JPEGs of the embedded photographs, enlarged; created once."""
    path = os.path.join(tempfile.gettempdir(), f"dcae_jax-jpegs-{pixels}")
    if not os.path.isdir(path):
        from dcae_jax import files as report
        from dcae_jax.data import sources
        from dcae_jax.data import transforms as crops

        photos = sources.photos()
        with report.atomic_folder(path) as beside:
            for i in range(FILES):
                image = crops.center_crop(photos[i % len(photos)][0], 400).rotate(90 * (i % 4))
                image = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
                image.save(os.path.join(beside, f"{i:03d}.jpg"), quality=90)
    return path


def ours(case: str):
    from dcae_jax import config as config_lib
    from dcae_jax.data import pipeline as data
    from dcae_jax.data import sources

    crop, pixels, batches = _case(case)
    config = config_lib.default()
    config.data.source, config.data.path, config.data.held_out = "folder", folder(pixels), 0.0
    config.data.crop, config.data.crop_area = crop, AREA
    config.data.threads, config.data.prefetch = WORKERS, WORKERS * AHEAD

    def run():
        source = sources.training_source(config.data)
        stream = data.training_batches(
            source, config.data, seed=config.seed, batch_size=BATCH, sizes=(SIZE,), start=0
        )
        return _seconds(stream, batches)

    return run, {}


def theirs(case: str):
    import torch

    crop, pixels, batches = _case(case)
    root = folder(pixels)

    class Files(torch.utils.data.Dataset):
        files = sorted(os.listdir(root))

        def __len__(self):
            return 1 << 20  # an epoch that does not end inside the measurement

        def __getitem__(self, i):
            rng = np.random.default_rng(i)
            with Image.open(os.path.join(root, self.files[i % len(self.files)])) as file:
                image = file.convert("RGB")
            if crop == "center":  # ADM's
                while min(image.size) >= 2 * SIZE:
                    image = image.resize((image.width // 2, image.height // 2), Image.BOX)
                scale = SIZE / min(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.BICUBIC
                )
                side = SIZE
                left, top = (image.width - side) // 2, (image.height - side) // 2
            else:
                side = SIZE
                if crop == "random_resized":
                    side = int((image.width * image.height * rng.uniform(*AREA)) ** 0.5)
                left = int(rng.integers(image.width - side + 1))
                top = int(rng.integers(image.height - side + 1))
            image = image.crop((left, top, left + side, top + side))
            if side != SIZE:
                image = image.resize((SIZE, SIZE), Image.BICUBIC)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), 0

    def run():
        loader = torch.utils.data.DataLoader(
            Files(), batch_size=BATCH, num_workers=WORKERS, prefetch_factor=AHEAD, shuffle=False
        )
        return _seconds(iter(loader), batches)

    return run, {}


def _seconds(stream, batches: int) -> float:
    """Of this many batches, after as many as may have been prefetched."""
    for _ in range(2 * WORKERS * AHEAD):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return time.perf_counter() - start


def main() -> None:
    given = common.arguments(__doc__, rounds=5)
    if given.side:
        return common.serve({"ours": ours, "theirs": theirs}[given.side])
    from dcae_jax import files as report

    print(common.machine(), "\n")
    rows = [(*common.HEAD, "images/s", "a worker")]
    for result in common.compare(
        __file__, [case for case in CASES if re.search(given.only, case)], given.rounds
    ):
        images = _case(result.case)[2] * BATCH / sorted(result.ours)[len(result.ours) // 2]
        rows.append([*common.row(result), f"{images:.0f}", f"{images / WORKERS:.0f}"])
    print(report.table(rows))


if __name__ == "__main__":
    main()
