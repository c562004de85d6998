# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a trained autoencoder on your own folder of images.

    python -m dcae_jax.main --config=configs/finetune.py --workdir=runs/finetune \
        --config.init_from=runs/phase3 --config.data.source=folder --config.data.path=/data/mine \
        --config.loss.lpips_weights=lpips-vgg.safetensors

`:VARIANT,decoder` trains only the decoder, so latents stay valid for a diffusion model. The run
evaluates before the first step, to show whether the model needs fine-tuning.
"""

from dcae_jax import config as config_lib
from dcae_jax import errors


def get_config(argument="f32c32"):
    variant, _, part = argument.partition(",")
    if part not in ("", "decoder"):
        raise errors.UserError(f"{argument!r}: write VARIANT or VARIANT,decoder")
    config = config_lib.default()
    config.model.variant = variant
    config.needs_weights = True
    config.trainable = (r"decoder\..*",) if part == "decoder" else (".*",)
    config.steps = 10_000
    config.batch_size = 32
    config.data.crop = "random_resized"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 500
    config.ema_decay = 0.999
    config.evaluate_every = 1000
    config.evaluate_first = True
    if variant == "tiny":
        config.loss.lpips_weight = 0.0
        config.steps = 200
        config.batch_size = 8
        config.resolution = 64
        config.optimizer.learning_rate = 2e-4
        config.optimizer.warmup_steps = 10
        config.ema_decay = 0.99
        config.ema_warmup = 20
        config.log_every = 20
        config.save_every = 100
        config.evaluate_every = 100
        config.evaluate.resolutions = (64,)
        config.evaluate.count = 64
        config.evaluate.crops = 32
    return config
