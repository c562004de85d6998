# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained autoencoder on a data set or one image, or evaluates samples.

    python -m dcae_jax.main --config=configs/evaluate.py --workdir=runs/evaluation \
        --config.init_from=runs/phase1 --config.data.source=folder --config.data.path=/data/val
    python -m dcae_jax.main --config=configs/evaluate.py --workdir=runs/evaluation \
        --config.evaluate.samples=samples.npz --config.evaluate.reference=/data/train \
        --config.evaluate.inception_weights=inception.safetensors

`:VARIANT` names the model of a weights file without a config.json.
"""

from dcae_jax import config as config_lib


def get_config(variant=""):
    config = config_lib.default()
    config.job = "evaluate"
    config.model.variant = variant
    config.data.split = "validation"
    config.evaluate.resolutions = ()
    config.evaluate.count = 0
    return config
