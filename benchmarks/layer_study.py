# SPDX-License-Identifier: Apache-2.0
"""How many layers should phases 2 and 3 train? A small study on `tiny`; prints a table, writes
docs/layer_study.svg.

    python benchmarks/layer_study.py --run=runs/tiny

Each row starts from the same phase 1 (phase 2's rows) or phase 2 (phase 3's rows) and trains more
layers, outwards from the latent or inwards from the image.
"""

import argparse
import os
import tempfile

import common
import jax

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(HERE, os.pardir, "configs")

LATENT = (r"encoder\.project_out\..*", r"decoder\.project_in\..*")
MIDDLE = {
    "projections": LATENT,
    "+ deepest stages": (*LATENT, r"(en|de)coder\.stages\.4\..*"),
    "+ next stages": (*LATENT, r"(en|de)coder\.stages\.[34]\..*"),
    "everything": (r".*",),
}
OUTPUT = (r"decoder\.project_out\..*",)
HEAD = {
    "project_out": OUTPUT,
    "+ outermost blocks": (*OUTPUT, r"decoder\.stages\.1\.[1-9]\d*\..*"),
    "+ their upsampling": (*OUTPUT, r"decoder\.stages\.1\..*"),
    "+ next stage": (*OUTPUT, r"decoder\.stages\.[12]\..*"),
    "whole decoder": (r"decoder\..*",),
}


def one(phase: int, name: str, trainable: tuple, init_from: str, steps: int) -> list:
    """A row: how training these layers changed each score."""
    config = config_lib.load_file(os.path.join(CONFIGS, f"phase{phase}.py"), "tiny")
    config.init_from, config.trainable, config.steps = init_from, trainable, steps
    config.save_every = steps
    with tempfile.TemporaryDirectory() as workdir:
        train.run(config, workdir)
        rows = files.read_rows(workdir)
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices())
    spec = state_lib.train_spec(config, mesh)
    trained = sum(leaf.size for name, leaf in spec.params.items() if name in spec.trained)
    first, last = rows[0], rows[-1]
    scores = [last[key] - first[key] for key in ("psnr_64", "ssim_64", "psnr_256", "ssim_256")]
    return [f"phase {phase}", name, trained, *scores]


def plot(rows: list[list], path: str) -> None:
    """Change of PSNR at both sizes for each row, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.add_subplot(xlabel="change of PSNR, dB")
    places = range(len(rows))
    for shift, column, name in ((-0.2, 3, "64 pixels"), (0.2, 5, "256 pixels")):
        bars = axes.barh([y + shift for y in places], [r[column] for r in rows], 0.4, label=name)
        axes.bar_label(bars, fmt="{:+.2f}", fontsize="x-small", padding=2)
    axes.set_yticks(places, [f"{row[0]}: {row[1]}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0, color="grey", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    common.save_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="workdir of configs/phases.py:tiny")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    rows = []
    for phase, choices in ((2, MIDDLE), (3, HEAD)):
        before = os.path.join(arguments.run, f"phase{phase - 1}")
        for name, trainable in choices.items():
            rows.append(one(phase, name, trainable, before, arguments.steps))
            print(*rows[-1], flush=True)  # so that an interruption leaves what was measured
    head = ["", "trains", "parameters", "PSNR 64", "SSIM 64", "PSNR 256", "SSIM 256"]
    print(files.table([head, *rows]))
    plot(rows, os.path.join(HERE, os.pardir, "docs", "layer_study.svg"))


if __name__ == "__main__":
    main()
