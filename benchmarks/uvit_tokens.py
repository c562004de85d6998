# SPDX-License-Identifier: Apache-2.0
"""What do fewer tokens save? One training step of the same UViT on latents of f8 with patches of 2
(1024 patches at 512 pixels) and of f64 with patches of 1 (64 patches); prints a table.

    python benchmarks/uvit_tokens.py

The two alternate, so that other load on the machine affects both.
"""

import argparse
import os
import platform
import statistics
import time

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")
SETTINGS = {"f8, patch 2": ("sd-vae-f8", 2), "f64, patch 1": ("f64c128", 1)}


def configuration(arguments: argparse.Namespace, autoencoder: str, patch_size: int):
    """configs/uvit.py on latents of `autoencoder`, whose shapes are all that is needed."""
    config = config_lib.load_file(os.path.join(CONFIGS, "uvit.py"), arguments.variant)
    config.autoencoder, config.patch_size = autoencoder, patch_size
    config.resolution, config.batch_size = arguments.resolution, arguments.batch_size
    return resolve.on_variant(config_lib.validate(config))


class Runner:
    """A compiled training step, its state and a batch of noise."""

    def __init__(self, config, mesh):
        spec = state_lib.train_spec(config, mesh)
        size = config.model.latent_size
        shapes = run_lib.abstract_batch(config, size, mesh)
        abstract = state_lib.abstract_state(config.sharding, mesh, spec)
        program = jax.jit(step.make_step(config, spec), donate_argnums=0)
        self.step = program.lower(abstract, shapes, {}).compile()
        self.state = state_lib.init_state(config, mesh, spec)
        noise = np.random.default_rng(0).standard_normal(shapes["latent"].shape)
        self.batch = {
            "latent": jax.device_put(noise.astype(shapes["latent"].dtype)),
            "label": jax.device_put(np.zeros(config.batch_size, np.int32)),
        }
        # XLA counts a loop's body once: the cost is that of the unrolled program, not compiled.
        config = config_lib.replace(config, unroll=True)
        spec = state_lib.train_spec(config, mesh)
        unrolled = jax.jit(step.make_step(config, spec)).lower(abstract, shapes, {})
        self.flops = unrolled.cost_analysis()["flops"]
        self.seconds = []

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch, {})
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="s")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    runners = {
        name: Runner(configuration(arguments, *setting), mesh) for name, setting in SETTINGS.items()
    }
    for runner in runners.values():
        runner.run()  # the first touches memory for the first time
    for _ in range(arguments.rounds):
        for runner in runners.values():
            runner.seconds.append(runner.run())
    rows = [["latents", "patches", "GFLOP a step", "s a step, median", "least", "most"]]
    for (name, (autoencoder, patch)), runner in zip(
        SETTINGS.items(), runners.values(), strict=True
    ):
        tokens = (configuration(arguments, autoencoder, patch).model.latent_size // patch) ** 2
        middle = statistics.median(runner.seconds)
        spread = (min(runner.seconds), max(runner.seconds))
        rows.append([name, tokens, runner.flops / 1e9, middle, *spread])
    wide, narrow = runners.values()
    ratios = [a / b for a, b in zip(wide.seconds, narrow.seconds, strict=True)]
    device = jax.devices()[0]
    print(
        f"UViT-{arguments.variant.upper()}, {arguments.resolution} pixels, batch "
        f"{arguments.batch_size}, {arguments.rounds} rounds; {device.platform} "
        f"({device.device_kind}), {os.cpu_count()} cores, {platform.machine()}, "
        f"jax {jax.__version__}; load {os.getloadavg()[0]:.1f}\n"
    )
    print(files.table(rows))
    print(
        f"\nf8, patch 2 over f64, patch 1: {wide.flops / narrow.flops:.1f} times the FLOPs, "
        f"{statistics.median(ratios):.1f} times the seconds (rounds: {min(ratios):.1f} to "
        f"{max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
