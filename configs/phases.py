# SPDX-License-Identifier: Apache-2.0
"""Phases 1, 2 and 3, one after another, in WORKDIR/phase1, phase2 and phase3.

    python -m dcae_jax.main --config=configs/phases.py:tiny --workdir=runs/tiny

Each phase has the keys of its own file: --config.phase2.steps=1000 changes one of them.
Rerun the same command to resume the chain.
"""

import os

from ml_collections import ConfigDict

from dcae_jax import config as config_lib


def get_config(variant="f32c32"):
    here = os.path.dirname(os.path.abspath(__file__))
    config = ConfigDict({"job": "phases"})
    for phase in ("phase1", "phase2", "phase3"):
        config[phase] = config_lib.load_file(os.path.join(here, f"{phase}.py"), variant)
    return config
