# SPDX-License-Identifier: Apache-2.0
"""Structured latents and augmented diffusion on `tiny-1.5`: what they change (docs/structured.md).

    python benchmarks/structured.py --workdir=runs/structured autoencoder
    python benchmarks/structured.py --workdir=runs/structured diffusion

`autoencoder` trains `phase1.py:tiny-1.5` with and without structure, the same steps, two seeds, and
scores both at every eighth of their channels on the held-out photographs. `diffusion` encodes crops
with the models of the first seed and trains `usit.py:tiny` on each with and without augmentation;
it writes the loss on held-out crops and two measures of samples against steps. Both write
WORKDIR/<part>.json and .svg and go on where they were stopped.
"""

import argparse
import json
import os

import common
import jax
import numpy as np

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import generator
from dcae_jax.data import latents
from dcae_jax.demo import diffusion as demo
from dcae_jax.diffusion import objectives
from dcae_jax.evaluation import metrics
from dcae_jax.jobs import encode, train
from dcae_jax.models import weights as weights_lib
from dcae_jax.runtime import process

FULL = 32  # channels of tiny-1.5's latents
CUTS = tuple(range(4, FULL + 1, 4))
SEEDS = (0, 1)
MODES = ("structured", "plain")
PLAIN = {"structured": {"channels": (), "count": 1, "always_full": False}}
AUGMENT = {"channels": CUTS, "count": 2, "always_full": True}


def config(file: str, variant: str, **changes):
    path = os.path.join(config_lib.SHIPPED, file)
    return config_lib.replace(config_lib.validate(config_lib.load_file(path, variant)), **changes)


def autoencoders(workdir: str, steps: int) -> dict[str, list[list[float]]]:
    """{mode: [[PSNR at 64 pixels for each of CUTS] for each seed]}."""
    found: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for mode in MODES:
        for seed in SEEDS:
            folder = os.path.join(workdir, f"{mode}{seed}")
            run = config(
                "phase1.py",
                "tiny-1.5",
                seed=seed,
                steps=steps,
                evaluate_every=0,
                **({} if mode == "structured" else PLAIN),
                evaluate={"channels": CUTS, "resolutions": (64,)},
            )
            assert train.run(run, folder) == train.DONE
            row = files.read_rows(folder)[-1]
            found[mode].append([row[f"psnr_64_c{count}"] for count in CUTS])
            print(mode, seed, [f"{value:.2f}" for value in found[mode][-1]], flush=True)
    return found


def plot_autoencoders(found: dict[str, list[list[float]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="latent channels c'", ylabel="PSNR (dB), held-out crops")
    for mode, color in zip(MODES, ("C0", "C1"), strict=True):
        for seed, values in enumerate(found[mode]):
            axes.plot(CUTS, values, color, marker="o", ms=3, label=None if seed else mode)
    axes.set_xticks(CUTS)
    axes.legend(frameon=False)
    common.save_svg(figure, path)


def diffusion(workdir: str, steps: int, every: int) -> dict[str, list[dict[str, float]]]:
    """{'structured latents, augmented': [{step, loss, ...}, ...], ...}."""
    found = {}
    for mode in MODES:
        stored = os.path.join(workdir, f"{mode}0-latents")
        ae = os.path.join(workdir, f"{mode}0")
        assert encode.run(config("encode.py", "tiny-1.5", init_from=ae), stored) == encode.DONE
        for name, augment in (("plain", {}), ("augmented", AUGMENT)):
            folder = os.path.join(workdir, f"{mode}0-{name}")
            rows = found[f"{mode} latents, {name}"] = []
            for step in range(every, steps + 1, every):
                run = config(
                    "usit.py",
                    "tiny",
                    steps=step,
                    save_every=every,
                    evaluate_every=0,
                    keep=steps,
                    augment=augment,
                    data={"path": stored},
                    optimizer={"schedule": "constant"},
                    sample={"count": 9},
                )
                assert train.run(run, folder) == train.DONE
                rows.append({"step": step, **quality(folder, stored)})
                print(mode, name, rows[-1], flush=True)
    return found


def quality(folder: str, stored: str) -> dict[str, float]:
    """Scores of the newest checkpoint's EMA weights.

    loss: on held-out crops, all channels. class_rate: fraction of samples whose nearest training
    crop is of their class, and the same of held-out crops. distance: Frechet, between the channel
    means and deviations of samples and of held-out crops.
    """
    model = generator.load_generator(folder)
    known = latents.latents(stored)
    classes, sample = model.num_classes, config("usit.py", "tiny").sample
    count = demo.NEIGHBOURS * classes
    near = np.stack([known[n][0][0].astype(np.float32) for n in range(count)])
    unseen, labels = demo.held_out(model, len(known), count)

    @jax.jit
    def loss(weights, z, labels, key):
        network = weights_lib.merge(model.graphdef, weights)
        x0 = objectives.scaled(z, model.scaling_factor)
        return objectives.loss("flow", network, x0, labels, key)[0]

    values = [
        float(loss(model.weights, unseen, labels.astype(np.int32), jax.random.key(seed)))
        for seed in range(4)
    ]
    wanted = np.arange(demo.SAMPLED * classes) % classes
    settings = generator.SampleSettings(sample.guidance, sample.steps, 0, sample.sampler)
    drawn = model.sample_latents(wanted, settings)
    unguided = model.sample_latents(wanted, generator.SampleSettings(1.0, 30, 0, sample.sampler))
    of = np.arange(len(near)) % classes

    def moments(z):
        values = np.concatenate([z.mean((1, 2)), z.std((1, 2))], axis=-1) * model.scaling_factor
        return values.mean(0), np.cov(values, rowvar=False)

    return {
        "loss": float(np.mean(values)),
        "class_rate": float((demo.nearest(near, of, drawn) == wanted).mean()),
        "held_out_rate": float((demo.nearest(near, of, unseen) == labels).mean()),
        "distance": float(metrics.frechet_distance(*moments(unguided), *moments(unseen))),
    }


def plot_diffusion(found: dict[str, list[dict[str, float]]], path: str) -> None:
    from matplotlib.figure import Figure

    names = {"loss": "held-out loss", "distance": "Frechet distance", "class_rate": "class rate"}
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        axes.set(xlabel="step", ylabel=label)
        for name, rows in found.items():
            style = ("-" if "augmented" in name else "--") + (
                "C0" if name.startswith("structured") else "C1"
            )
            axes.plot([r["step"] for r in rows], [r[key] for r in rows], style, label=name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    common.save_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("autoencoder", "diffusion"))
    parser.add_argument("--workdir", default="runs/structured")
    parser.add_argument("--steps", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--every", type=int, default=500, help="steps between two measurements")
    given = parser.parse_args()
    process.set_up_logging()
    process.use_compile_cache()
    if given.part == "autoencoder":
        found = autoencoders(given.workdir, given.steps or config("phase1.py", "tiny-1.5").steps)
        plot_autoencoders(found, os.path.join(given.workdir, "autoencoder.svg"))
    else:
        found = diffusion(given.workdir, given.steps or 3000, given.every)
        plot_diffusion(found, os.path.join(given.workdir, "diffusion.svg"))
    with open(os.path.join(given.workdir, f"{given.part}.json"), "w") as file:
        json.dump({"version": dcae_jax.__version__, "results": found}, file, indent=1)


if __name__ == "__main__":
    main()
