# SPDX-License-Identifier: Apache-2.0
"""Runs the net's cases and writes what they gave.

    [DCAE_NET_ROOT=CHECKOUT] python tests/net/record.py [--force] [--only=REGEX] [--out=FILE]

Without --out it writes recorded.json, the record that test_net.py compares with, always by the
code that is known to be right: DCAE_NET_ROOT names a checkout of commit e9d9a46. With --only, the
record's other cases are kept.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

# Before the first import of jax: as in tests/conftest.py, but on one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "dcae_jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = os.environ.get(
    "DCAE_NET_XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
HERE = os.path.dirname(os.path.abspath(__file__))
RECORD = os.path.join(HERE, "recorded.json")
sys.path.insert(0, HERE)

from space import ROOT, Space  # noqa: E402

sys.path.insert(0, ROOT)

from cases import CASES  # noqa: E402


def run(names: list[str], root: str, keep: Callable[[dict], None]) -> dict[str, dict]:
    """{case: its result, or {'error': traceback}, with 'seconds'}; `keep` takes what is there."""
    space, results = Space(root), {}
    for name in names:
        began, before = time.perf_counter(), sum(os.times()[:4])
        try:
            results[name] = CASES[name](space)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        seconds = time.perf_counter() - began
        results[name]["seconds"] = round(seconds, 1)
        keep(results)
        busy = sum(os.times()[:4]) - before  # of one core
        sys.stderr.write(f"{name}: {seconds:.1f} s, {busy:.1f} s of a core\n")
        sys.stderr.write(results[name].get("error", ""))
    return results


def rounded(tree):
    """Floats with nine digits: float32 takes no more, and the file stays small."""
    if isinstance(tree, float):
        return float(f"{tree:.9g}")
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return [rounded(value) for value in tree] if isinstance(tree, list) else tree


def write(results: dict[str, dict], path: str) -> None:
    """One line for each tensor, row or message, so that a change can be read in a diff."""

    def lines(tree, depth):
        if depth and isinstance(tree, dict | list) and tree:
            pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
            keyed = isinstance(tree, dict)
            inner = [
                (f"{json.dumps(key)}: " if keyed else "") + lines(value, depth - 1)
                for key, value in pairs
            ]
            return ("{\n" if keyed else "[\n") + ",\n".join(inner) + ("\n}" if keyed else "\n]")
        return json.dumps(tree)

    with open(path, "w") as file:
        file.write(lines(rounded(results), 4) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=RECORD)
    parser.add_argument("--only", default="")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    known = {}
    if options.out == RECORD and os.path.exists(RECORD):
        if not options.force:
            sys.stderr.write(f"{RECORD} is there; --force overwrites it\n")
            return 2
        with open(RECORD) as file:
            known = json.load(file)
    names = [name for name in CASES if re.search(options.only, name)]
    with tempfile.TemporaryDirectory(prefix="dcae_net") as root:
        keep = (lambda _: None) if options.out == RECORD else (lambda r: write(r, options.out))
        results = run(names, root, keep)
    failed = [name for name, result in results.items() if "error" in result]
    if options.out == RECORD:
        if failed:
            return 1
        for result in results.values():
            del result["seconds"]
        merged = known | results
        results = {name: merged[name] for name in CASES if name in merged}
    write(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
