# SPDX-License-Identifier: Apache-2.0
"""Does phase 3 diverge? 300 steps of `tiny` from the same phase 2, with five seeds; prints a table.

python benchmarks/phase3_seeds.py --init_from=runs/tiny/phase2
"""

import argparse
import os
import tempfile

import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.jobs import train

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")


def one(seed: int, init_from: str, steps: int) -> list:
    """A row of the table: the discriminator and the scores with `seed`."""
    config = config_lib.load_file(os.path.join(CONFIGS, "phase3.py"), "tiny")
    config.init_from, config.seed, config.steps = init_from, seed, steps
    config.save_every = steps
    with tempfile.TemporaryDirectory() as workdir:
        train.run(config, workdir)
        rows = files.read_rows(workdir)
    logs = [row for row in rows if "gan_accuracy" in row]
    accuracy = [row["gan_accuracy"] for row in logs]
    first, last = rows[0], rows[-1]
    return [
        seed,
        int(last["skipped"]),
        float(np.mean(accuracy)),
        min(accuracy),
        max(accuracy),
        float(np.mean([row["gan_d_loss"] for row in logs])),
        max(row["gan_weight"] for row in logs),
        first["psnr_64"],
        last["psnr_64"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init_from", required=True, help="workdir of a phase 2 of `tiny`")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    head = ["seed", "skipped", "accuracy", "least", "most", "D loss", "largest weight"]
    head += ["PSNR before", "after"]
    rows = [one(seed, arguments.init_from, arguments.steps) for seed in range(arguments.seeds)]
    print(files.table([head, *rows]))


if __name__ == "__main__":
    main()
