# SPDX-License-Identifier: Apache-2.0
"""Costs of training or sampling on TPU slices you don't have: memory, FLOPs, chip-hours.

    python -m dcae_jax.main --config=configs/plan.py --workdir=plans/phase1 \
        --config.plan.config=configs/phase1.py:f32c32 \
        --config.plan.overrides="('batch_size=64','mesh.fsdp=4')" \
        --config.plan.topologies="('v5e:2x2','v6e:2x2')"

Prints a table and writes plans/phase1/plan.json. Needs `pip install 'jax[tpu]'`, except for the
topology cpu. For configs/sample.py, plan.generator names the file that trains its model
(docs/scaling.md).
"""

from dcae_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.job = "plan"
    return config
