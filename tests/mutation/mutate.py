# SPDX-License-Identifier: Apache-2.0
"""Plants small faults in the numeric modules, and counts those that the fast tests notice.

    python tests/mutation/mutate.py [--count=300] [--seed=0] [--out=mutants.jsonl] [--again]

Samples `count` of all mutants. Each runs in a fork of this process, which
has imported all but dcae_jax, in a copy of the tree, until the first test fails. Appends one row
per mutant to `out`; the same command resumes. --again reruns those that survived. Prints a table
and the survivors.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402, F401  imports all that tests need, and sets their environment
import jax  # noqa: E402
import pytest  # noqa: E402
from mutation import mutants  # noqa: E402

TESTS = {  # {module of dcae_jax: the tests of it}
    "models/patchgan.py": ("models/test_patchgan.py",),
    "diffusion/objectives.py": ("diffusion/test_objectives.py", "diffusion/test_samplers.py"),
    "diffusion/dpm_solver.py": ("diffusion/test_dpm_solver.py",),
    "diffusion/samplers.py": ("diffusion/test_samplers.py", "diffusion/test_dpm_solver.py"),
    "diffusion/latent_spec.py": ("diffusion/test_latent_spec.py",),
    "evaluation/metrics.py": ("evaluation/test_metrics.py",),
    "training/losses.py": ("training/test_losses.py", "training/test_step.py"),
    "training/optim.py": ("training/test_optim.py", "training/test_step.py"),
    "training/step.py": ("training/test_step.py", "training/test_diffusion_step.py"),
    "training/state.py": (
        "training/test_patterns.py",
        "training/test_step.py",
        "models/test_patchgan.py",
    ),
}
SLACK = 60  # seconds that a mutant may take beyond three times the tests' own


class Tests:
    """A plugin of pytest: which tests run first, and what they did.

    First come those that reach the fault's line, and of these those that are fast for the faults
    that they found so far. For that, a run of the unchanged module keeps seconds and lines.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.Counter()
        self.lines: dict[str, list[int]] = {}
        self.kills: dict[str, int] = collections.Counter()
        self.failed: list[str] = []
        self.file, self.line = "", 0  # to be watched; of the fault

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def cost(item: pytest.Item) -> tuple[bool, float]:
            name = item.nodeid
            reached = self.line in self.lines.get(name, ())
            return not reached, self.seconds.get(name, 0) / (1 + self.kills.get(name, 0)) ** 2

        items.sort(key=cost)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        reached: set[int] = set()

        def inside(frame: types.FrameType, event: str, arg: object) -> Callable | None:
            reached.add(frame.f_lineno)
            return inside

        if self.file:
            sys.settrace(lambda f, *_: inside if f.f_code.co_filename == self.file else None)
        yield
        if self.file:
            sys.settrace(None)
            self.lines[item.nodeid] = sorted(reached)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.file:
            self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def run(tree: pathlib.Path, module: str, tests: Tests, limit: float) -> tuple[int, list[str]]:
    """(pytest's status, tests that failed) of a module's tests in a fork; 99: no answer came."""
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path[:2] = [str(tree), str(tree / "tests")]
        if not tests.file:  # a fault leaves nothing behind that the next one could find
            sys.dont_write_bytecode = True
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 3600)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        paths = [f"tests/{path}" for path in TESTS[module]]
        arguments = ["-x", "-m", "not slow and not torch", f"--basetemp={tree}/tmp", *paths]
        status = int(pytest.main(arguments, plugins=[tests]))
        answer.write_text(json.dumps([status, tests.failed, tests.seconds, tests.lines]))
        os._exit(0)
    until = time.time() + limit
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.time() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    if not answer.exists():
        return 99, []
    status, failed, tests.seconds, tests.lines = json.loads(answer.read_text())
    return status, failed


def judge(module: str, found: list[mutants.Mutant], out: pathlib.Path) -> None:
    """Runs the mutants of one module, each appended to `out`."""
    source, tests = (ROOT / "dcae_jax" / module).read_text(), Tests()
    tests.kills = collections.Counter(row["by"] for row in rows_of(out))
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        for part in ("dcae_jax", "tests", "configs"):
            shutil.copytree(ROOT / part, tree / part)
        shutil.copy(ROOT / "pyproject.toml", tree)
        path = tree / "dcae_jax" / module
        tests.file = str(path)
        status, _ = run(tree, module, tests, 3600)
        assert status == 0, (tree / "log.txt").read_text()[-3000:]
        tests.file, limit = "", 3 * sum(tests.seconds.values()) + SLACK
        for mutant in found:
            path.write_text(mutants.apply(source, mutant))
            began, tests.line = time.time(), mutant.line
            status, failed = run(tree, module, tests, limit)
            by = "no answer" if status == 99 else (*failed, "import")[0] if status else ""
            tests.kills.update([by])
            row = {"module": module, "line": mutant.line, "words": mutant.words, "by": by}
            with out.open("a") as file:
                file.write(json.dumps(row | {"s": round(time.time() - began, 1)}) + "\n")


def rows_of(out: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The counts of each module as Markdown, then the survivors."""
    lines = ["| module | mutants | killed | survived | share |", "|---|---|---|---|---|"]
    for module in (*TESTS, ""):
        own = [row for row in rows if row["module"] == module or not module]
        killed = sum(bool(row["by"]) for row in own)
        if own:
            name = f"`{module}`" if module else "all"
            share = f"{killed / len(own):.0%}"
            lines.append(f"| {name} | {len(own)} | {killed} | {len(own) - killed} | {share} |")
    return "\n".join(
        [*lines, "", *(f"{r['module']}:{r['line']}: {r['words']}" for r in rows if not r["by"])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("mutants.jsonl"))
    parser.add_argument("--again", action="store_true")
    flags = parser.parse_args()
    every = [(m, x) for m in TESTS for x in mutants.of((ROOT / "dcae_jax" / m).read_text())]
    chosen = random.Random(flags.seed).sample(every, min(flags.count, len(every)))
    rows = rows_of(flags.out)
    if flags.again:
        rows = [row for row in rows if row["by"]]
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {(row["module"], row["line"], row["words"]) for row in rows}
    for name in list(sys.modules):
        if name.split(".")[0] in ("dcae_jax", "conftest", "support", "goldens"):
            del sys.modules[name]
    for module in TESTS:
        left = [x for m, x in chosen if m == module and (m, x.line, x.words) not in done]
        if left:
            judge(module, left, flags.out)
    sys.stdout.write(f"{len(every)} mutants in all\n{table(rows_of(flags.out))}\n")


if __name__ == "__main__":
    main()
