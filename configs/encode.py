# SPDX-License-Identifier: Apache-2.0
"""Latents of images, computed once, for diffusion models to train on (docs/latents.md).

    python -m dcae_jax.main --config=configs/encode.py --workdir=latents/imagenet-512 \
        --config.init_from=mit-han-lab/dc-ae-f64c128-in-1.0 --config.data.source=folder \
        --config.data.path=/data/imagenet/train

`:VARIANT` names the model of a weights file without a config.json. `:tiny` takes 200 crops of 64
pixels from each of the embedded photographs; the model `tiny` encodes each to 4x4 latents.
"""

from dcae_jax import config as config_lib


def get_config(variant=""):
    config = config_lib.default()
    config.job = "encode"
    config.model.variant = variant
    config.resolution = 512
    if variant in ("tiny", "tiny-1.5", "tiny-lite"):
        config.resolution = 64
        config.encode.crops = 200
        config.encode.shard_size = 600
    return config
