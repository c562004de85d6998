# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import logging
import os
from typing import Any

from dcae_jax import files
from dcae_jax.planner import chips, compile, cost
from dcae_jax.planner.cost import Row

PLAN = "plan.json"


def run(config: Any, workdir: str) -> int:
    """The job `plan`: prints a table and writes WORKDIR/plan.json. Returns 0."""
    job = compile.target(config.plan)
    for text in config.plan.topologies:
        chips.check_compiler(text)
    rows: list[Row] = []
    for text in config.plan.topologies:
        rows += cost.plan(config.plan, job, text)
        files.write_json(os.path.join(workdir, PLAN), rows)
    logging.info("%s", cost.table(rows))
    logging.info("step s is an estimate: the larger of FLOPs and bytes over the chip's peaks")
    return 0
