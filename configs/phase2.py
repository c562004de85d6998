# SPDX-License-Identifier: Apache-2.0
"""Phase 2, high-resolution latent adaptation: the middle of the model at 512 and 1024 pixels.

    python -m dcae_jax.main --config=configs/phase2.py --workdir=runs/phase2 \
        --config.init_from=runs/phase1 --config.data.source=folder \
        --config.data.path=/data/high_resolution --config.loss.lpips_weights=lpips-vgg.safetensors

Everything else is frozen, so no gradient runs through the encoder's large feature maps.
`:tiny` runs on two CPU cores on the embedded photographs.
"""

from dcae_jax import config as config_lib


def get_config(variant="f32c32"):
    config = config_lib.default()
    config.model.variant = variant
    config.needs_weights = True
    config.trainable = (
        r"encoder\.stages\.{deepest}\..*",
        r"encoder\.project_out\..*",
        r"decoder\.project_in\..*",
        r"decoder\.stages\.{deepest}\..*",
    )
    if variant == "sd-vae-f8":  # other names, and a separate middle between the stages
        config.trainable = (
            r"encoder\.(stages\.{deepest}|middle|norm_out|conv_out)\..*",
            r"(post_)?quant_conv\..*",
            r"decoder\.(conv_in|middle|stages\.{deepest})\..*",
        )
    # 256 keeps what phase 1 learned: without it, low resolution gets worse (docs/training.md).
    config.resolutions = (256, 512, 512, 1024)
    config.batch_size = 32
    config.steps = 20_000
    config.optimizer.learning_rate = 1.6e-5
    config.optimizer.weight_decay = 1e-3
    config.optimizer.warmup_steps = 1000
    config.evaluate.resolutions = (256, 512, 1024)
    config.evaluate_first = True
    if variant in ("tiny", "tiny-1.5", "tiny-lite"):
        config.resolutions = (64, 128, 128)
        config.steps = 200
        config.batch_size = 4
        config.loss.lpips_weight = 0.0
        config.optimizer.learning_rate = 3e-4
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 10
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 10
        config.save_every = 50
        config.evaluate_every = 0
        config.evaluate.resolutions = (64, 256)
        config.evaluate.count = 64
        config.evaluate.crops = 32
    if variant in ("small", "small-lite"):
        config.data.source = "folder"
        config.data.path = "photos/train"  # python benchmarks/photos.py --out=photos
        config.data.held_out_path = "photos/held_out"
        config.resolutions = (256, 512, 512)
        config.batch_size = 2
        config.steps = 150
        config.loss.lpips_weight = 0.0
        config.optimizer.muon = (".*kernel",)
        config.optimizer.learning_rate = 3e-4
        config.optimizer.b2 = 0.99
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 20
        config.optimizer.weight_decay = 0.01
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 20
        config.save_every = 50
        config.evaluate_every = 75
        config.evaluate.resolutions = (256, 512)
        config.evaluate.count = 0
        config.evaluate.crops = 1
    if "1.5" in variant:  # structured latents (docs/structured.md): 16, 20, ..., 128 channels
        full = 32 if variant == "tiny-1.5" else 128
        config.structured.channels = tuple(range(full // 8, full + 1, 4))
        config.evaluate.channels = (full // 8, full // 4, full // 2, full)
    if variant == "tiny-1.5":  # with so few steps, full latents need a share of each
        config.structured.count = 2
        config.structured.always_full = True
    return config
