# SPDX-License-Identifier: Apache-2.0
"""A trained flow model made to sample in 1 to 4 steps, in a few thousand (AnyFlow's first stage).

    python -m dcae_jax.main --config=configs/fewstep.py:h --workdir=runs/fewstep \
        --config.data.path=runs/latents --config.init_from=runs/usit

`s`, `h`, `2b` and `tiny` are UViTs, `b`, `l` and `xl` DiTs, as in configs/meanflow.py. The times,
weights and AdamW are AnyFlow's (arXiv:2605.13724), which trains few parameters of a video model;
batch size and guidance are ours. docs/fewstep.md.
"""

import os

from dcae_jax import config as config_lib


def get_config(variant="h"):
    here = os.path.dirname(os.path.abspath(__file__))
    base = "dit.py" if variant in ("b", "l", "xl") else "usit.py"
    config = config_lib.load_file(os.path.join(here, base), variant)
    config.objective = "meanflow"
    config.needs_weights = True
    config.init_parts = (r"(?!h_embedder\.).*",)  # the rest starts at zero
    config.batch_size = 256
    config.steps = 6000
    config.ema_decay = 0.999
    config.ema_warmup = 1000
    config.optimizer.learning_rate = 5e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_steps = 1000
    config.evaluate_every = 1000
    m = config.meanflow
    m.equal = 0.5
    m.to_data = 0.25
    m.times = "uniform"
    m.shift = 5.0
    m.weighting = "anyflow"
    m.adaptive = 0.0
    m.balance = True
    m.guidance = config.sample.guidance  # the flow model's
    m.mix = 1 - 1 / m.guidance  # so w = 1: the target's variance is that without guidance
    config.sample.guidance = 1.0  # folded in
    config.sample.steps = 4
    config.sample.sampler = ""
    if variant == "tiny":
        config.batch_size = 64
        config.steps = 600
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 50
        config.save_every = 200
        config.evaluate_every = 300
        # Jumps from all times are worth training on a few latents of 4 x 4.
        m.shift = 2.0
        m.weighting = "none"
        m.mix = 0.5
    return config
