# SPDX-License-Identifier: Apache-2.0
"""The job `plan`: what another job would cost, on TPU slices you don't have."""

import logging
import os

from dcae_jax import files
from dcae_jax.config import Config
from dcae_jax.planner import chips, compile, cost
from dcae_jax.planner.cost import Row
from dcae_jax.runtime import lease

PLAN = "plan.json"


def run(config: Config, workdir: str) -> int:
    """Logs a table and writes WORKDIR/plan.json. Returns 0."""
    job = compile.target_job(config.plan)
    for topology in config.plan.topologies:
        chips.check_compiler(topology)
    effort = "=".join(map(str, compile.effort_option(config.plan.effort)))
    rows: list[Row] = []
    with lease.hold(workdir):
        for number, topology in enumerate(config.plan.topologies, 1):
            of = len(config.plan.topologies)
            what = config.plan.config, topology, number, of, effort
            logging.info("%s on %s: topology %d of %d, %s", *what)
            rows += cost.plan(config.plan, job, topology)
            files.write_json(os.path.join(workdir, PLAN), rows)
    logging.info("%s", cost.table(rows))
    logging.info("step s is an estimate: the larger of FLOPs and bytes over the chip's peaks")
    return 0
