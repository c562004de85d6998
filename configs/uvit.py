# SPDX-License-Identifier: Apache-2.0
"""UViT, a transformer with long skips, on latents (DC-AE, section 4.3; UViT, arXiv:2209.12152).

    python -m dcae_jax.main --config=configs/uvit.py:h --workdir=runs/uvit \
        --config.data.path=runs/latents

The authors' recipe for s, h and 2b. `:tiny` runs on two CPU cores on latents of the embedded
photographs (configs/encode.py:tiny).
"""

from dcae_jax import config as config_lib


def get_config(variant="h"):
    config = config_lib.default()
    config.model.name = "uvit"
    config.model.variant = variant
    config.objective = "epsilon"
    config.data.source = "latents"
    config.batch_size = 1024
    config.steps = 500_000
    config.ema_decay = 0.9999
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b1 = 0.99
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.03
    config.optimizer.decay = (".*",)  # every parameter, as the authors do
    config.optimizer.clip_norm = 0.0
    # (step + 1) / 5000 of the learning rate at step 0, 1, ...
    config.optimizer.warmup_steps = 4999
    config.optimizer.warmup_from = 1 / 5000
    if variant in ("h", "2b"):
        # h, 64 samples per chip: 2 GB instead of 21, for a fifth more FLOPs (docs/scaling.md).
        config.remat = "blocks"
    config.sample.guidance = 1.5
    config.evaluate_every = 10_000
    if variant == "tiny":
        config.batch_size = 64
        config.steps = 1500
        config.optimizer.learning_rate = 1e-3
        config.optimizer.schedule = "cosine"
        config.optimizer.b1 = 0.9
        config.optimizer.warmup_steps = 50
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 50
        config.save_every = 250
        config.evaluate_every = 500
        config.sample.count = 18
    return config
