# SPDX-License-Identifier: Apache-2.0
"""Phase 3, low-resolution local refinement: the decoder's head, with a PatchGAN, at 256 pixels.

    python -m dcae_jax.main --config=configs/phase3.py --workdir=runs/phase3 \
        --config.init_from=runs/phase2 --config.data.source=folder \
        --config.data.path=/data/imagenet/train --config.loss.lpips_weights=lpips-vgg.safetensors

The encoder is frozen: latents stay bit-identical, and a diffusion model on them stays valid.
`:tiny` runs on two CPU cores on the embedded photographs.
"""

from dcae_jax import config as config_lib


def get_config(variant="f32c32"):
    config = config_lib.default()
    config.model.variant = variant
    config.needs_weights = True
    # Block 0, the stage's upsampling, stays frozen: the other blocks' input needs no gradient.
    config.trainable = (
        r"decoder\.stages\.{outermost}\.[1-9]\d*\..*",
        r"decoder\.project_out\..*",
    )
    if variant == "sd-vae-f8":
        config.trainable = (r"decoder\.(stages\.{outermost}|norm_out|conv_out)\..*",)
    config.batch_size = 96
    config.steps = 20_000
    config.loss.gan_weight = 0.5
    config.optimizer.learning_rate = 5.4e-5
    config.optimizer.b1 = 0.5
    config.optimizer.b2 = 0.9
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 1000
    config.evaluate.resolutions = (256, 512)
    config.evaluate_first = True
    if variant in ("tiny", "tiny-1.5", "tiny-lite"):
        config.resolution = 64
        config.steps = 300
        config.batch_size = 8
        config.loss.lpips_weight = 0.0
        config.loss.gan_channels = 32
        config.loss.gan_layers = 2
        config.loss.gan_warmup_steps = 80
        # Above the paper config's weight, so that 300 steps show the effect of the GAN.
        config.loss.gan_weight = 1.0
        config.loss.gan_learning_rate = 1e-3
        config.optimizer.learning_rate = 3e-4
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
        config.steps = 300
        config.batch_size = 4
        config.loss.lpips_weight = 0.0
        config.loss.gan_channels = 32
        config.loss.gan_warmup_steps = 75
        config.loss.gan_learning_rate = 3e-4
        config.optimizer.learning_rate = 2e-4
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 20
        config.save_every = 100
        config.evaluate_every = 150
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
