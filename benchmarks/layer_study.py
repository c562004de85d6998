# SPDX-License-Identifier: Apache-2.0
"""How many layers should phases 2 and 3 train? A small study on `tiny`; prints a table, writes
docs/layer_study.svg.

    python benchmarks/layer_study.py --run=demo-run

Each row starts from the same phase 1 (phase 2's rows) or phase 2 (phase 3's rows) and trains more
layers outwards from the latent, or inwards from the picture.
"""

import argparse
import os
import tempfile

import jax

from dcae_jax import config as config_lib
from dcae_jax import report, sharding, state, train

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
    """A row: what training these layers did to each score, against before."""
    config = config_lib.load_file(os.path.join(CONFIGS, f"phase{phase}.py"), "tiny")
    config.init_from, config.trainable, config.steps = init_from, trainable, steps
    config.save_every = steps
    with tempfile.TemporaryDirectory() as workdir:
        train.run(config, workdir)
        rows = report.read_rows(workdir)
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    spec = state.train_spec(config, mesh)
    trained = sum(leaf.size for name, leaf in spec.params.items() if name in spec.trained)
    first, last = rows[0], rows[-1]
    scores = [last[key] - first[key] for key in ("psnr_64", "ssim_64", "psnr_256", "ssim_256")]
    return [f"phase {phase}", name, trained, *scores]


def plot(rows: list[list], path: str) -> None:
    """Change of PSNR at both sizes for each row, as bars."""
    reach = max(abs(value) for row in rows for value in (row[3], row[5])) or 1.0
    parts, y = [], 24
    for row in rows:
        parts.append(f'<text x="190" y="{y + 12}" text-anchor="end">{row[0]}: {row[1]}</text>')
        for offset, value, colour in ((0, row[3], "#2563eb"), (8, row[5], "#d97706")):
            width = abs(value) / reach * 150
            x = 360 if value >= 0 else 360 - width
            parts.append(
                f'<rect x="{x:.1f}" y="{y + offset}" width="{width:.1f}" height="7" '
                f'fill="{colour}"/><text x="520" y="{y + offset + 7}" font-size="8" '
                f'fill="{colour}">{value:+.2f}</text>'
            )
        y += 24
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="{y + 8}" '
        'font-family="system-ui" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        '<text x="360" y="14" text-anchor="middle">change of PSNR, dB: '
        '<tspan fill="#2563eb">64</tspan>, <tspan fill="#d97706">256 pixels</tspan></text>'
        f'<path d="M360 18 V{y}" stroke="#888"/>{"".join(parts)}</svg>'
    )
    report.write_file(path, svg.encode())


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
    print(report.table([head, *rows]))
    plot(rows, os.path.join(HERE, os.pardir, "docs", "layer_study.svg"))


if __name__ == "__main__":
    main()
