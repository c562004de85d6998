# SPDX-License-Identifier: Apache-2.0
"""What does a lite decoder cost, and what does a teacher buy? (docs/distill.md)

    python benchmarks/distill.py --teacher=runs/tiny/phase3 --workdir=runs/distill

Trains `configs/distill.py:tiny-lite` on the embedded photographs, or on those of
`benchmarks/photos.py --out=DIR` with `--photos=DIR`, and once more without the teacher's images.
Scores all three on held-out crops, counts FLOPs of their decoders as XLA does, and times decoding,
alternately. A finished training is not repeated.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config import Config
from dcae_jax.data import sources
from dcae_jax.evaluation import reconstruction
from dcae_jax.jobs import train
from dcae_jax.models.weights import merge
from dcae_jax.runtime import process

SIZE, BATCH = 256, 4  # of the images that are decoded for FLOPs and seconds


def students(given: argparse.Namespace) -> dict[str, Config]:
    """{name: its training}: with the teacher, and from the same start without it."""
    raw = config_lib.load_file(os.path.join(config_lib.SHIPPED, "distill.py"), given.variant)
    if given.photos:
        raw.data.source, raw.data.path = "folder", os.path.join(given.photos, "train")
        raw.data.held_out_path = os.path.join(given.photos, "held_out")
    raw.distill.teacher, raw.steps = given.teacher, given.steps or raw.steps
    taught = config_lib.validate(raw)
    raw.update_from_flattened_dict({"distill.teacher": "", "distill.l1_weight": 0.0})
    raw.init_from, raw.init_parts = given.teacher, (r"encoder\..*",)
    return {"student": taught, "without a teacher": config_lib.validate(raw)}


def latents(size: int, ae: Autoencoder) -> jax.ShapeDtypeStruct:
    shape = (BATCH, size // ae.compression, size // ae.compression, ae.latent_channels)
    return jax.ShapeDtypeStruct(shape, np.float32)


def decoder_flops(ae: Autoencoder) -> float:
    """FLOPs per image of the decoder, as XLA counts them."""
    decode = jax.jit(lambda weights, z: merge(ae.graphdef, weights).decode(z))
    return decode.lower(ae.weights, latents(SIZE, ae)).cost_analysis()["flops"] / BATCH


def seconds(models: dict[str, Autoencoder], rounds: int) -> dict[str, tuple[float, float]]:
    """{name: median (seconds, CPU seconds of all threads) of decoding a batch}, alternately."""
    z = np.random.default_rng(0).standard_normal(latents(SIZE, next(iter(models.values()))).shape)
    z = z.astype(np.float32)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, ae in models.items():
            began, worked = time.perf_counter(), time.process_time()
            jax.block_until_ready(ae.decode(z))
            times[name].append((time.perf_counter() - began, time.process_time() - worked))
    return {  # the first call compiles
        name: tuple(statistics.median(values) for values in zip(*found[1:], strict=True))
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="workdir or export of a `tiny`")
    parser.add_argument("--variant", default="tiny-lite")
    parser.add_argument("--photos", default="", help="folder of train/ and held_out/")
    parser.add_argument("--workdir", default="runs/distill")
    parser.add_argument("--steps", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    process.set_up_logging()
    process.use_compile_cache()
    models = {"teacher": dcae_jax.load_autoencoder(given.teacher, "float32")}
    for name, config in students(given).items():
        folder = os.path.join(given.workdir, name.replace(" ", "_"))
        assert train.run(config, folder) == train.DONE
        models[name] = dcae_jax.load_autoencoder(folder, "float32")
    encoders = {checkpoint_weights.encoder_checksum(ae.weights) for ae in models.values()}
    assert len(encoders) == 1, "the encoder has changed"
    held_out = sources.held_out_source(config.data)
    times = seconds(models, given.rounds)
    rows = []
    for name, ae in models.items():
        results = reconstruction.evaluate(
            config.evaluate, config.data, ae.graphdef, ae.weights, ae.mesh, held_out, {}
        )
        scores = reconstruction.flat_scores(results)
        psnr = [scores[f"psnr_{size}"] for size in config.evaluate.resolutions]
        ratios = [a / b for a, b in zip(times[name], times["teacher"], strict=True)]
        flops = decoder_flops(ae), decoder_flops(models["teacher"])
        rows.append([name, *psnr, flops[0] / 1e6, flops[0] / flops[1], times[name][0], *ratios])
    head = ["", *(f"PSNR {size}" for size in config.evaluate.resolutions)]
    head += ["decoder MFLOP", "ratio", "decode s", "ratio", "ratio of CPU s"]
    print(f"{given.variant}, {len(held_out)} held-out photographs; decoding {BATCH} x {SIZE} px")
    print(files.table([head, *rows]))


if __name__ == "__main__":
    main()
