# SPDX-License-Identifier: Apache-2.0
"""Phase 1, low-resolution full training: everything, at 256 pixels, L1 + LPIPS (DC-AE, 3.3).

    python -m dcae_jax.main --config=configs/phase1.py --workdir=runs/phase1 \
        --config.data.source=folder --config.data.path=/data/imagenet/train \
        --config.loss.lpips_weights=lpips-vgg.safetensors

`:tiny` runs on two CPU cores on the embedded photographs, with no file to download. `:small` takes
hours there, on the photographs that benchmarks/photos.py gathers.
"""

from dcae_jax import config as config_lib


def get_config(variant="f32c32"):
    config = config_lib.default()
    config.model.variant = variant
    if variant in ("f64c128", "f128c512"):
        config.remat = "blocks"  # without it, eight images per chip need 17 GB (docs/scaling.md)
    if variant in ("tiny", "tiny-1.5", "tiny-lite"):
        config.steps = 1200
        config.batch_size = 4
        config.resolution = 64
        config.loss.lpips_weight = 0.0
        config.optimizer.learning_rate = 8e-4
        config.optimizer.b2 = 0.99
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 20
        config.optimizer.weight_decay = 0.01
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 20
        config.save_every = 200
        config.evaluate_every = 400
        config.evaluate.resolutions = (64, 256)
        config.evaluate.count = 64
        config.evaluate.crops = 32
    if variant in ("small", "small-lite"):
        config.data.source = "folder"
        config.data.path = "photos/train"  # python benchmarks/photos.py --out=photos
        config.data.held_out_path = "photos/held_out"
        config.steps = 2500
        config.batch_size = 8
        config.resolution = 128
        config.loss.lpips_weight = 0.0
        config.optimizer.muon = (".*kernel",)
        config.optimizer.learning_rate = 1e-3
        config.optimizer.b2 = 0.99
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 100
        config.optimizer.weight_decay = 0.01
        config.ema_decay = 0.997
        config.ema_warmup = 200
        config.log_every = 50
        config.save_every = 500
        config.evaluate_every = 500
        config.evaluate.resolutions = (256,)
        config.evaluate.count = 0
        config.evaluate.crops = 2
    if "1.5" in variant:  # structured latents (docs/structured.md): 16, 20, ..., 128 channels
        full = 32 if variant == "tiny-1.5" else 128
        config.structured.channels = tuple(range(full // 8, full + 1, 4))
        config.evaluate.channels = (full // 8, full // 4, full // 2, full)
    if variant == "tiny-1.5":  # with so few steps, full latents need a share of each
        config.structured.count = 2
        config.structured.always_full = True
    return config
