# SPDX-License-Identifier: Apache-2.0
"""DiT on latents (arXiv:2212.09748; DC-AE, section 4.3): learned sigma, adaLN-zero.

    python -m dcae_jax.main --config=configs/dit.py:xl --workdir=runs/dit \
        --config.data.path=runs/latents

The authors' recipe for s, b, l and xl; with batch_size=1024 they use a learning rate of 2e-4.
"""

from dcae_jax import config as config_lib


def get_config(variant="xl"):
    config = config_lib.default()
    config.model.name = "dit"
    config.model.variant = variant
    config.objective = "learned_sigma"
    config.data.source = "latents"
    config.batch_size = 256
    config.steps = 3_000_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 0.0
    config.sample.steps = 250
    config.sample.guidance = 1.3
    config.evaluate_every = 10_000
    if variant == "xl":
        config.remat = "blocks"  # 16 samples per chip: 2 GB instead of 16 (docs/scaling.md)
    if variant == "tiny":
        config.batch_size = 64
        config.steps = 1500
        config.optimizer.learning_rate = 1e-3
        config.optimizer.schedule = "cosine"
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 50
        config.save_every = 250
        config.evaluate_every = 500
        config.sample.steps = 50
        config.sample.count = 18
    return config
