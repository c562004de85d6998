# SPDX-License-Identifier: Apache-2.0
"""Inception's features and torch-fidelity's, with the same random weights.

python benchmarks/inception.py
"""

import os
import sys
import tempfile

import common

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "tests"))
CASES = ["Inception features, 299 pixels, batch 8"]


def ours(case: str):
    import jax
    from goldens import judges

    from dcae_jax.models import inception, inception_torch
    from dcae_jax.runtime import host_memory

    host_memory.keep()  # as main.py does
    weights = inception_torch.from_torch(judges.inception_state(inception.shapes()))
    weights = jax.device_put(weights)
    kind = inception.PREPROCESSINGS[0]
    levels = jax.device_put(judges.pictures(8, 299))
    program = (
        jax.jit(lambda w, x: inception.features(w, inception.preprocess(x, kind)))
        .lower(weights, levels)
        .compile()
    )
    cost = program.cost_analysis()
    facts = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
    return lambda: jax.block_until_ready(program(weights, levels)), facts


def theirs(case: str):
    import torch
    from goldens import judges

    from dcae_jax.models import inception

    torch.set_num_threads(common.THREADS)
    state = judges.inception_state(inception.shapes())
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, "weights.pth")
        torch.save({k: torch.from_numpy(v) for k, v in state.items()}, path)
        network = judges.fidelity_inception(path)
    levels = torch.from_numpy(judges.pictures(8, 299)).permute(0, 3, 1, 2).contiguous()

    def run():
        with torch.inference_mode():
            network(levels)

    return run, {}


if __name__ == "__main__":
    common.beside(__file__, __doc__, CASES, ours, theirs, default=7)
