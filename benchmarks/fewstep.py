# SPDX-License-Identifier: Apache-2.0
"""What do average velocities cost? A training step of the objective meanflow against one of flow,
and a sample in one step against one in 30 with guidance, without the decoder; prints tables.

    python benchmarks/fewstep.py
    python benchmarks/fewstep.py --run=demo-run --batch_size=16

With --run, the table is of images, decoder included, of the models that `make demo` trained.
The programs alternate, so that other load on the machine affects all. CPU seconds, of all threads,
depend on that load less than seconds do.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import generator
from dcae_jax.demo import diffusion as demo
from dcae_jax.diffusion import samplers
from dcae_jax.models import weights as weights_lib
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.setup import resolve
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")
NO_GUIDANCE = {"meanflow.guidance": 1.0, "meanflow.mix": 0.0}
STEPS = {  # name: (config file, changes)
    "flow": ("usit.py", {}),
    "meanflow": ("meanflow.py", NO_GUIDANCE),
    "meanflow, guidance folded": ("meanflow.py", {}),
    "few-step, guidance folded": ("fewstep.py", {"meanflow.guidance": 4.0, "meanflow.mix": 0.75}),
}
GOALS = {"meanflow": 1.6, "meanflow, guidance folded": 2.4, "1 step": 1 / 20}


def configuration(arguments: argparse.Namespace, name: str) -> config_lib.Config:
    """The configuration of a row of STEPS, on latents of f64c128."""
    file, changes = STEPS[name]
    config = config_lib.load_file(os.path.join(CONFIGS, file), arguments.variant)
    config.update_from_flattened_dict(changes)
    config.autoencoder, config.resolution = "f64c128", arguments.resolution
    config.batch_size, config.remat = arguments.batch_size, "none"
    return resolve.on_variant(config_lib.validate(config))


class Times:
    """Seconds and CPU seconds of the calls of a function."""

    def __init__(self, call: Callable[[], object]):
        self.call, self.seconds, self.cpu = call, [], []
        call()  # compiles, and touches memory for the first time

    def add(self) -> None:
        began, worked = time.perf_counter(), time.process_time()
        self.call()
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - worked)


def training(arguments: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, Times]:
    """{name: the times of its training step}; steps of models of one kind share a state."""
    states: dict[str, state_lib.TrainState] = {}

    def timed(name: str) -> Times:
        config = configuration(arguments, name)
        kind = config.objective
        spec = state_lib.train_spec(config, mesh)
        if kind not in states:
            states[kind] = state_lib.init_state(config, mesh, spec)
        shapes = run_lib.abstract_batch(config, config.model.latent_size, mesh)
        noise = np.random.default_rng(0).standard_normal(shapes["latent"].shape)
        batch = {
            "latent": jax.device_put(noise.astype(shapes["latent"].dtype)),
            "label": jax.device_put(np.zeros(config.batch_size, np.int32)),
        }
        program = jax.jit(step.make_step(config, spec), donate_argnums=0)

        def call() -> None:
            states[kind], metrics = program(states[kind], batch, {})
            jax.block_until_ready((states[kind], metrics))

        return Times(call)

    return {name: timed(name) for name in STEPS}


def sampling(arguments: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, Times]:
    """{name: the times of a batch of samples}: 30 evaluations of a guided flow model, and jumps."""

    def timed(name: str, steps: int, sampler: str, guidance: float) -> Times:
        config = configuration(arguments, name)
        model = state_lib.create_model(config.model, mesh, weights_lib.host_rngs(0), config)
        graph, weights, _ = weights_lib.split(model)
        m = config.model
        shape = (arguments.batch_size, m.latent_size, m.latent_size, m.latent_channels)
        x, labels = jnp.ones(shape), jnp.zeros(len(jnp.ones(shape)), jnp.int32)

        @jax.jit
        def run(weights: weights_lib.Weights) -> jax.Array:
            network = weights_lib.merge(graph, weights)
            network = samplers.guided(network, m.num_classes, guidance, objective=config.objective)
            settings = {"objective": config.objective, "sampler": sampler, "steps": steps}
            return samplers.sample(network, x, labels, **settings)

        return Times(lambda: jax.block_until_ready(run(weights)))

    return {
        "30 steps, guided": timed("flow", 30, "heun", 4.0),
        **{f"{n} step{'s' * (n > 1)}": timed("meanflow", n, "jumps", 1.0) for n in (1, 2, 4)},
    }


def decoding(run: str, batch: int) -> dict[str, Times]:
    """{name: the times of a batch of images} of the models in a demo's workdir."""
    decoder = os.path.join(run, "phase3")
    flow, few = (
        generator.load_generator(os.path.join(run, name), autoencoder=decoder)
        for name in (demo.RUN, demo.FEW)
    )
    labels = np.arange(batch) % flow.num_classes
    return {
        "30 steps, guided": Times(lambda: flow.sample(labels, 4.0, 30, sampler="heun")),
        **{
            f"{n} step{'s' * (n > 1)}": Times(lambda n=n: few.sample(labels, steps=n))
            for n in (1, 2, 4)
        },
    }


def report(first: str, times: dict[str, Times], rounds: int, images: int = 0) -> str:
    """Runs the rounds; a table of medians and ratios to the first row.

    images: of a call, for images/s.
    """
    for _ in range(rounds):
        for one in times.values():
            one.add()
    base = next(iter(times.values()))
    rows: list[list[object]] = [
        [first, "s", "CPU s", "ratio", "least", "most", "ratio of CPU s", "at most"]
    ]
    for name, one in times.items():
        ratios = [a / b for a, b in zip(one.seconds, base.seconds, strict=True)]
        cpu = [a / b for a, b in zip(one.cpu, base.cpu, strict=True)]
        middle = [statistics.median(values) for values in (one.seconds, one.cpu, ratios)]
        spread = (min(ratios), max(ratios), statistics.median(cpu))
        rows.append([name, *middle, *spread, GOALS.get(name, "")])
        if images:  # the goal is for latents alone
            rows[-1][-1] = images / middle[0]
            rows[0][-1] = "images/s"
    return files.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="s")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", default="", help="workdir of `make demo`")
    arguments = parser.parse_args()
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    batch, rounds = arguments.batch_size, arguments.rounds
    device = jax.devices()[0]
    what = (
        arguments.run
        or f"UViT-{arguments.variant.upper()}, {arguments.resolution} pixels on f64c128"
    )
    print(
        f"{what}, batch {batch}, {rounds} rounds; {device.platform} ({device.device_kind}), "
        f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}; load "
        f"{os.getloadavg()[0]:.1f}\n"
    )
    if arguments.run:
        print(report("images", decoding(arguments.run, batch), rounds, batch))
        return
    print(report("training step", training(arguments, mesh), rounds), flush=True)
    print()
    print(report("samples, latents alone", sampling(arguments, mesh), rounds))


if __name__ == "__main__":
    main()
