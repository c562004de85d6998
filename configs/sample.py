# SPDX-License-Identifier: Apache-2.0
"""Samples from a diffusion model, ours or published (docs/diffusion.md).

    python -m dcae_jax.main --config=configs/sample.py --workdir=runs/samples \
        --config.init_from=runs/uvit --config.sample.guidance=1.5
    python -m dcae_jax.main --config=configs/sample.py --workdir=runs/fid \
        --config.init_from=runs/uvit --config.sample.format=npz --config.sample.count=50000 \
        --config.sample.batch_size=256

Rerun the same command to resume. `:VARIANT` sets the number of heads of published weights whose
width is not a variant's.
"""

from dcae_jax import config as config_lib


def get_config(variant=""):
    config = config_lib.default()
    config.job = "sample"
    config.model.variant = variant
    return config
