# SPDX-License-Identifier: Apache-2.0
"""Average velocities from nothing: MeanFlow (arXiv:2505.13447), for samples in 1 to 4 steps.

    python -m dcae_jax.main --config=configs/meanflow.py:h --workdir=runs/meanflow \
        --config.data.path=runs/latents

`s`, `h`, `2b` and `tiny` are UViTs, `b`, `l` and `xl` DiTs. The settings are MeanFlow's of its DiT
at 256 pixels, 240 epochs of ImageNet. docs/fewstep.md; configs/fewstep.py starts from a flow model.
"""

import os

from dcae_jax import config as config_lib


def get_config(variant="h"):
    here = os.path.dirname(os.path.abspath(__file__))
    base = "dit.py" if variant in ("b", "l", "xl") else "uvit.py"
    config = config_lib.load_file(os.path.join(here, base), variant)
    config.objective = "meanflow"
    config.batch_size = 256
    config.steps = 1_200_000
    config.ema_decay = 0.9999
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.meanflow.guidance = 2.0  # w = 1, k = 0.5
    config.meanflow.mix = 0.5
    config.sample.guidance = 1.0  # folded in
    config.sample.steps = 1
    if variant == "tiny":
        config.batch_size = 64
        config.steps = 3000
        config.ema_decay = 0.99
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.clip_norm = 1.0
        config.meanflow.guidance = 4.0
        config.meanflow.mix = 0.75
        config.save_every = 500
        config.evaluate_every = 1000
    return config
