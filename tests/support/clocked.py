# SPDX-License-Identifier: Apache-2.0
"""A clock outside of the code under test: the command line, with the times of what it does.

    python tests/support/clocked.py EVENTS [arguments of dcae_jax.main]

Appends 'seconds event step' lines to the file EVENTS: ask and got (a batch), begin and end (of an
evaluation or a save). Before a batch is asked for, the devices finish the step before it.
"""

import contextlib
import os
import sys
import time

import jax

from dcae_jax import main
from dcae_jax.checkpoints import manager
from dcae_jax.data import pipeline
from dcae_jax.jobs import hooks, metric_writer

FILE = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
STEP = {"now": 0, "output": None}


def note(event):
    os.write(FILE, f"{time.monotonic()} {event} {STEP['now']}\n".encode())


@contextlib.contextmanager
def noted(step):
    STEP["now"] = step
    note("begin")
    yield
    note("end")


def training_batches(*args, **kwargs):
    stream = read_batches(*args, **kwargs)
    STEP["now"] = kwargs["start"] // kwargs["batch_size"]
    while True:
        jax.block_until_ready(STEP["output"])
        note("ask")
        batch = next(stream)
        STEP["now"] += 1
        note("got")
        yield batch


def add(writer, metrics):
    STEP["output"] = metrics
    return add_metrics(writer, metrics)


def evaluation(run):
    evaluate = make_evaluation(run)

    def clocked(step, *rest):
        with noted(step):
            return evaluate(step, *rest)

    return clocked


def save(manager, state, means, step, next_example):
    with noted(step):
        save_state(manager, state, means, step, next_example)


read_batches, pipeline.training_batches = pipeline.training_batches, training_batches
add_metrics, metric_writer.MetricWriter.add = metric_writer.MetricWriter.add, add
make_evaluation, hooks.evaluation = hooks.evaluation, evaluation
save_state, manager.save = manager.save, save

if __name__ == "__main__":
    status = main.main(["main", *sys.argv[2:]])
    note("returned")  # what Python's exit takes is no part of any record
    sys.exit(status)
