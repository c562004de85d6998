# SPDX-License-Identifier: Apache-2.0
"""A model's weights in another format: orbax, diffusers, authors or stablehlo (docs/weights.md).

    python -m dcae_jax.main --config=configs/export.py --config.init_from=runs/phase3 \
        --config.export.format=diffusers --config.export.out=exports/mine

`:VARIANT` names the model of a weights file without a config.json.
"""

from dcae_jax import config as config_lib


def get_config(variant=""):
    config = config_lib.default()
    config.job = "export"
    config.model.variant = variant
    return config
