# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of a trained autoencoder on images, or on one picture.

    python -m dcae_jax.main --config=configs/evaluate.py --workdir=runs/evaluation \
        --config.init_from=runs/phase1 --config.data.source=folder --config.data.path=/data/val
"""

from dcae_jax import config as base


def get_config():
    config = base.default()
    config.job = "evaluate"
    config.evaluate.count = 0
    return config
