# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import logging
import os
from typing import Any

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.planner import chips, compile
from dcae_jax.planner import plan as plan_lib
from dcae_jax.planner.plan import Row

PLAN = "plan.json"


def run(config: Any, workdir: str) -> int:
    """The job `plan`: prints a table and writes WORKDIR/plan.json. Returns 0."""
    config_lib.check(config)
    job = compile.target(config.plan)
    for text in config.plan.topologies:
        chips.check_compiler(text)
    rows: list[Row] = []
    for text in config.plan.topologies:
        rows += plan_lib.plan(config.plan, job, text)
        files.write_json(os.path.join(workdir, PLAN), rows)
    logging.info("%s", plan_lib.table(rows))
    logging.info("step s is an estimate: the larger of FLOPs and bytes over the chip's peaks")
    return 0
