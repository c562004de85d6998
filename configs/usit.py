# SPDX-License-Identifier: Apache-2.0
"""USiT: UViT's network with SiT's objective, the velocity from noise to data (DC-AE, section 4.3).

    python -m dcae_jax.main --config=configs/usit.py:2b --workdir=runs/usit \
        --config.data.path=runs/latents

As configs/uvit.py, except for the objective, the learning rate and the weight decay. `make demo`
trains `:tiny`.
"""

import os

from dcae_jax import config as config_lib


def get_config(variant="h"):
    here = os.path.dirname(os.path.abspath(__file__))
    config = config_lib.load_file(os.path.join(here, "uvit.py"), variant)
    config.objective = "flow"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.sample.guidance = 1.15 if variant == "2b" else 1.2
    if variant == "tiny":
        config.steps = 3000
        config.optimizer.learning_rate = 2e-3
        config.save_every = 500
        config.evaluate_every = 1000
        config.sample.sampler = "heun"  # the adaptive solver takes several times as many steps
        config.sample.guidance = 4.0
    return config
