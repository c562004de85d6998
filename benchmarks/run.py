# SPDX-License-Identifier: Apache-2.0
"""`make bench`: runs the benchmarks one after another and writes their output to
docs/benchmarks.md.

    python benchmarks/run.py [--only=loader]

The peers need torch and diffusers (and torch-fidelity for Inception).
"""

import argparse
import os
import re
import subprocess
import sys

import common

HERE = os.path.dirname(os.path.abspath(__file__))
DOC = os.path.join(HERE, os.pardir, "docs", "benchmarks.md")
SCRIPTS = ("autoencoder", "transformer", "loader", "inception", "startup", "memory", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression of the scripts' names")
    given = parser.parse_args()
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    for name in SCRIPTS:
        if re.search(given.only, name):
            print(f"== benchmarks/{name}.py", flush=True)
            command = [sys.executable, os.path.join(HERE, f"{name}.py")]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            print(done.stdout, flush=True)
            if done.returncode:
                raise SystemExit(f"benchmarks/{name}.py ended with {done.returncode}")
            common.put(DOC, name, done.stdout)


if __name__ == "__main__":
    main()
