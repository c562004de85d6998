# SPDX-License-Identifier: Apache-2.0
"""A cheaper decoder for a trained autoencoder: it learns from images and from the old decoder.

    python -m dcae_jax.main --config=configs/distill.py --workdir=runs/lite \
        --config.distill.teacher=mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers \
        --config.data.source=folder --config.data.path=/data/imagenet/train \
        --config.loss.lpips_weights=lpips-vgg.safetensors

The encoder is the teacher's and stays frozen: latents, and diffusion models on them, stay valid.
`:small-lite` learns from a `small`; `:tiny-lite`, from a `tiny`, runs on two CPU cores on the
embedded photographs. docs/distill.md.
"""

from dcae_jax import config as config_lib


def get_config(variant="f32c32-lite"):
    config = config_lib.default()
    config.model.variant = variant
    config.trainable = (r"decoder\..*",)
    config.distill.l1_weight = 1.0
    config.steps = 50_000
    config.batch_size = 96
    config.loss.gan_weight = 0.5
    config.loss.gan_warmup_steps = 40_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 1000
    config.evaluate.resolutions = (256, 512)
    if variant == "tiny-lite":
        config.resolution = 64
        config.steps = 1200
        config.batch_size = 8
        config.loss.lpips_weight = 0.0
        config.loss.gan_weight = 0.0
        config.optimizer.learning_rate = 8e-4
        config.optimizer.b2 = 0.99
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 20
        config.save_every = 200
        config.evaluate_every = 400
        config.evaluate.resolutions = (64, 256)
        config.evaluate.count = 64
        config.evaluate.crops = 32
    if variant == "small-lite":
        config.data.source = "folder"
        config.data.path = "photos/train"  # python benchmarks/photos.py --out=photos
        config.data.held_out_path = "photos/held_out"
        config.steps = 4000
        config.batch_size = 32
        config.loss.lpips_weight = 0.0
        config.loss.gan_warmup_steps = 3000
        config.loss.gan_learning_rate = 1e-4
        config.optimizer.learning_rate = 4e-4
        config.optimizer.b2 = 0.99
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 300
        config.ema_decay = 0.999
        config.ema_warmup = 200
        config.log_every = 50
        config.save_every = 1000
        config.evaluate_every = 1000
        config.evaluate.count = 0
        config.evaluate.crops = 8
    return config
