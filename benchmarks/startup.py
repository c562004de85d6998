# SPDX-License-Identifier: Apache-2.0
"""Startup time: imports, --help, and a run's first step, cold and warm.

    python benchmarks/startup.py

Each row is a separate process; a run's first start has an empty compile cache.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import common

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
PYTHON = {
    "import jax, optax, flax.nnx": "import jax, optax, flax.nnx",
    "import dcae_jax": "import dcae_jax",
    "import dcae_jax; dcae_jax.load_autoencoder": "import dcae_jax; dcae_jax.load_autoencoder",
}
HELP = "python -m dcae_jax.main --help"
PHASES = ("phase1", "phase2", "phase3")


def seconds(command: list[str], until: str = "", **environment: str) -> float:
    """Wall time of a process, or until a line of its output matches `until`."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    spent, said = None, []
    for line in process.stdout:
        said.append(line)
        if until and spent is None and re.search(until, line):
            spent = time.perf_counter() - start
    if process.wait() or (until and spent is None):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)}")
    return time.perf_counter() - start if spent is None else spent


def imports(rounds: int) -> list[list]:
    commands = {name: [sys.executable, "-c", text] for name, text in PYTHON.items()}
    commands[HELP] = [sys.executable, "-m", "dcae_jax.main", "--help"]
    spent = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)  # the first reads the files from disk
    for _ in range(rounds):
        for name, command in commands.items():
            spent[name].append(seconds(command))
    base = next(iter(spent.values()))
    return [
        [
            name,
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, base, strict=True)),
        ]
        for name, own in spent.items()
    ]


def first_steps(rounds: int) -> list[list]:
    """Seconds to the log line of step 1 of the three tiny phases: first start, second start."""
    rows = {phase: [] for phase in PHASES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as root:
            before = ""
            for phase in PHASES:
                spent = []
                for start in ("first", "second"):
                    workdir = os.path.join(root, f"{phase}-{start}")
                    spent.append(
                        seconds(
                            [
                                *(sys.executable, "-m", "dcae_jax.main"),
                                f"--config=configs/{phase}.py:tiny",
                                f"--workdir={workdir}",
                                "--config.steps=3",  # the row of step 1 comes with the next
                                "--config.log_every=1",
                                *([f"--config.init_from={before}"] if before else []),
                            ],
                            until=r"^step 1 ",
                            XDG_CACHE_HOME=os.path.join(root, f"cache-{phase}"),
                        )
                    )
                rows[phase].append(spent)
                before = workdir
    return [
        [
            f"configs/{phase}.py:tiny",
            *(statistics.median(pair[i] for pair in pairs) for i in (0, 1)),
            statistics.median(warm / cold for cold, warm in pairs),
        ]
        for phase, pairs in rows.items()
    ]


def main() -> None:
    given = common.arguments(__doc__, rounds=5)
    from dcae_jax import files as report

    print(common.machine(), "\n")
    print(report.table([["", "s, median", "ratio to the first"], *imports(given.rounds)]), "\n")
    head = ["seconds to step 1", "first start", "second start", "ratio"]
    print(report.table([head, *first_steps(2)]))


if __name__ == "__main__":
    main()
