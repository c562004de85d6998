# SPDX-License-Identifier: Apache-2.0
"""A phase on the paper's "mix": ImageNet, SA-1B, Mapillary Vistas and FFHQ (docs/data.md).

    python -m dcae_jax.main --config=configs/mix.py:f64c128,phase1 --workdir=runs/phase1 \
        --config.loss.lpips_weights=lpips-vgg.safetensors

The argument is VARIANT,PHASE. The folders below are examples: replace them with yours, here or
with --config.data.parts.
"""

import os

from dcae_jax import config as config_lib
from dcae_jax import errors


def get_config(argument="f32c32"):
    variant, _, phase = argument.partition(",")
    phase = phase or "phase1"
    if phase not in ("phase1", "phase2", "phase3"):
        raise errors.UserError(f"{argument!r}: write VARIANT,PHASE, as in {variant},phase2")
    here = os.path.dirname(os.path.abspath(__file__))
    config = config_lib.load_file(os.path.join(here, f"{phase}.py"), variant)
    config.data.source = "mixture"
    # Sampling weights, independent of the parts' sizes; the paper does not publish its own.
    config.data.parts = (
        (1.0, "folder", "/data/imagenet/train"),
        (1.0, "folder", "/data/sa1b"),
        (0.1, "folder", "/data/mapillary/training/images"),
        (0.1, "folder", "/data/ffhq/images1024x1024"),
    )
    return config
