# SPDX-License-Identifier: Apache-2.0
"""Runs command lines of dcae_jax in forked processes, and has signals sent to them at set places.

    python tests/support/forks.py     reads one JSON order a line, answers one line

The imports are made once, here; no device is opened before the fork. An order: argv, stderr (a
file), signals: ((place, count, delay, number), ...). The signal `number` is sent `delay` seconds
after the place was reached for the `count`th time, by a thread that does nothing else, so it
comes from outside of whatever the run is doing. Places: start, read (a record), step, save,
commit (a save's files are complete, and have not their name yet), evaluate.
An order may also have: more, ((module, function, place), ...); powerless, true to run without
root's right to write everywhere; memory, bytes of address space left to it.
The answer: status (of waitpid, negative for a signal), steps (training steps begun when the first
signal was sent, -1 if none was).
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time


def run(order, report_to):
    """In the child: never returns."""
    with open(order["stderr"], "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    if order.get("powerless"):
        drop_capabilities()
    if order.get("memory"):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + order["memory"],) * 2)
    counts = {"step": 0}
    lock = threading.Lock()

    def send(number):
        with open(report_to, "a") as file:
            file.write(f"{counts['step']}\n")
        os.kill(os.getpid(), number)

    def reach(place):
        with lock:
            counts[place] = counts.get(place, 0) + 1
            due = [s for s in order["signals"] if s[0] == place and s[1] == counts[place]]
        for _, _, delay, number in due:
            if delay:
                timer = threading.Timer(delay, send, [number])
                timer.daemon = True
                timer.start()
            else:
                send(number)

    def watch(module, name, place):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            if place != "save":
                reach(place)
            out = function(*args, **kwargs)
            if place == "save":  # from here on it goes on in the background
                reach(place)
            return out

        setattr(module, name, watched)

    watch(data._Load, "example", "read")
    watch(checkpoint, "save", "save")
    watch(integrity, "write", "commit")
    watch(evaluate, "measure", "evaluate")
    for module, name, place in order.get("more", []):
        watch(importlib.import_module(module), name, place)
    put_batch = sharding.put_batch

    def step(batch, mesh):
        if "mask" not in batch:  # of an evaluation
            reach("step")
        return put_batch(batch, mesh)

    sharding.put_batch = step
    reach("start")
    status = main.main(["main", *order["argv"]])
    logging.shutdown()
    os._exit(status)


def drop_capabilities():
    """Root may then write what root owns and may write, as any other user."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def serve():
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.NamedTemporaryFile("r") as answer:
            began = time.time()
            child = os.fork()
            if child == 0:
                try:
                    run(order, answer.name)
                except BaseException:
                    traceback.print_exc()
                    os._exit(99)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            steps = [int(count) for count in answer.read().split()]
        reply = {"status": status, "steps": steps[0] if steps else -1, "s": time.time() - began}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import ctypes
    import importlib
    import logging
    import resource
    import traceback

    from dcae_jax import main
    from dcae_jax.checkpoints import integrity
    from dcae_jax.checkpoints import manager as checkpoint
    from dcae_jax.data import pipeline as data
    from dcae_jax.evaluation import reconstruction as evaluate
    from dcae_jax.runtime import mesh as sharding

    serve()
