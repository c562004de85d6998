# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks: two sides timed alternately, and the peak rates of the machine.

Each side runs in its own process, as for its users: neither sees the other's threads or
allocator. A script calls `compare` in the parent; started with `--side=NAME` it is that side, which
prepares its cases and times one call whenever the parent requests one.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = os.cpu_count()
WARM = 2  # calls before the first that counts


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of each side's calls, alternating, and its other facts about the case."""

    case: str
    ours: list[float]
    theirs: list[float]
    facts: dict[str, float]  # of ours: 'flops' and 'bytes' where they are known

    @property
    def ratio(self) -> float:
        """Median over the rounds of ours / theirs."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]


class Side:
    """A process that runs one side's cases on request."""

    def __init__(self, script: str, name: str):
        self.process = subprocess.Popen(
            [sys.executable, script, f"--side={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
        )
        self.name = name

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.name!r} ended; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(prepare: Callable[[str], tuple[Callable[[], object], dict]]) -> None:
    """The loop of one side. prepare(case) -> (a blocking call, facts).

    A call that returns a number has measured its own seconds.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    run, facts = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            run = None  # what the last case held is free before the next is made
            run, facts = prepare(request["case"])
            for _ in range(WARM):
                run()
            answer = facts
        else:
            start = time.perf_counter()
            own = run()
            spent = time.perf_counter() - start
            answer = {"seconds": own if isinstance(own, float) else spent}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def plot(path: str, title: str, panels: list[tuple[str, str, dict]]) -> None:
    """Writes panels side by side as SVG: (label of x, label of y, {curve: [(x, y), ...]}).

    Both axes are logarithmic; the grey line through the first point has slope 1: linear growth.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(2.6 * len(panels), 2.8), layout="constrained")
    figure.suptitle(title)
    for axes, (x_label, y_label, curves) in zip(
        figure.subplots(1, len(panels)), panels, strict=True
    ):
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        for name, curve in curves.items():
            (x0, y0), (x1, _) = curve[0], curve[-1]
            axes.plot((x0, x1), (y0, y0 * x1 / x0), color="lightgrey")
            axes.plot(*zip(*curve, strict=True), label=name)
            axes.set_xticks([x for x, _ in curve], [f"{x:.3g}" for x, _ in curve])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
    save_svg(figure, path)


def save_svg(figure: Any, path: str) -> None:
    """Saves an SVG: deterministic, with text as text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dcae_jax"}):
        figure.savefig(path, metadata={"Date": None})


def compare(script: str, cases: list[str], rounds: int) -> Iterator[Result]:
    """Runs each case on both sides of `script`, alternating; one result per case."""
    for case in cases:
        # New processes for each case: what one leaves in memory is not the next one's.
        sides = [Side(script, name) for name in ("ours", "theirs")]
        facts = [side.ask(do="prepare", case=case) for side in sides]
        seconds = ([], [])
        for i in range(rounds):
            for k in (0, 1) if i % 2 else (1, 0):
                seconds[k].append(sides[k].ask(do="run")["seconds"])
        for side in sides:
            side.close()
        yield Result(case, *seconds, facts[0])


HEAD = ("case", "ours, s", "theirs, s", "ratio", "least", "most")
SHARES = ("GFLOP/s", "of matmul peak", "GB/s", "of bandwidth")


def row(result: Result, peak: tuple[float, float] | None = None) -> list:
    """The cells of HEAD, and with peak = (FLOP/s, bytes/s) those of SHARES."""
    ours = statistics.median(result.ours)
    cells = [result.case, f"{ours:.4g}", f"{statistics.median(result.theirs):.4g}"]
    cells += [f"{value:.2f}" for value in (result.ratio, min(result.ratios), max(result.ratios))]
    if peak:
        for key, limit in zip(("flops", "bytes"), peak, strict=True):
            rate = result.facts[key] / ours
            cells += [f"{rate / 1e9:.0f}", f"{rate / limit:.2f}"]
    return cells


def machine() -> str:
    """One line: the machine and its versions."""
    import jax

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return (
        f"{THREADS} CPU cores ({model}), Python {platform.python_version()}, jax {jax.__version__};"
        f" load before: {os.getloadavg()[0]:.1f}"
    )


def peaks() -> tuple[float, float]:
    """(FLOP/s of a float32 matmul of size 4096, bytes/s of a copy): the best of a few."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    size = 4096
    x = jnp.asarray(np.random.default_rng(0).random((size, size), np.float32))
    product = jax.jit(lambda a: a @ a)
    flops = 2 * size**3 / _least(lambda: product(x).block_until_ready())
    source, target = np.ones(1 << 26, np.float32), np.zeros(1 << 26, np.float32)
    parts = [
        slice(i * (1 << 26) // THREADS, (i + 1) * (1 << 26) // THREADS) for i in range(THREADS)
    ]

    with ThreadPoolExecutor(THREADS) as pool:
        seconds = _least(
            lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
        )
    return flops, 2 * source.nbytes / seconds


def _least(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def steady(
    call: Callable[[], None], wait: Callable[[], object], *, warm: int = 3, seconds: float = 3.0
) -> dict[str, float]:
    """Seconds per call, for calls issued back to back as in a training loop: the median of groups.

    call(): starts one; wait(): blocks until all are done. seconds: approximate total time.
    """
    start = time.perf_counter()
    for _ in range(warm):
        call()
        wait()
        if time.perf_counter() - start > seconds / 2:
            break
    start = time.perf_counter()
    call()
    wait()
    one = time.perf_counter() - start
    groups = max(2, min(7, int(seconds / one)))
    each = max(1, min(100, int(seconds / groups / one)))
    found = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(each):
            call()
        wait()
        found.append((time.perf_counter() - start) / each)
    return {"seconds": statistics.median(found), "least": min(found), "most": max(found)}


def put(doc: str, name: str, printed: str) -> None:
    """Writes a benchmark's output between the marks `<!-- name -->` in the file `doc`."""
    from dcae_jax import files as report

    with open(doc, encoding="utf-8") as file:
        text = file.read()
    text = between_marks(doc, text, name, f"```\n{printed.strip()}\n```")
    report.write_file(doc, text.encode())


def between_marks(doc: str, text: str, name: str, part: str) -> str:
    """`text`, the content of the file `doc`, with `part` between the marks of `name`."""
    marks = (f"<!-- {name} -->\n", f"<!-- end of {name} -->")
    if not all(mark in text for mark in marks):
        raise SystemExit(f"{os.path.basename(doc)} has no marks {marks}")
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    return f"{before}{marks[0]}{part}\n{marks[1]}{after}"


def beside(
    script: str,
    doc: str,
    cases: list[str],
    ours: Callable,
    theirs: Callable,
    *,
    rounds: Callable[[str], int] = lambda case: 1,
    default: int,
) -> None:
    """The `main` of a two-sided script; rows have each side's fraction of the machine's peaks.

    ours(case), theirs(case): the `prepare` of `serve`. rounds(case): multiplies `--rounds`, by
    default `default`.
    """
    given = arguments(doc, default)
    if given.side:
        return serve({"ours": ours, "theirs": theirs}[given.side])
    from dcae_jax import files as report

    print(machine())
    peak = peaks()
    print(f"matmul peak {peak[0] / 1e9:.0f} GFLOP/s, copy {peak[1] / 1e9:.1f} GB/s\n")
    rows = [(*HEAD, *SHARES)]
    for case in cases:
        if re.search(given.only, case):
            (result,) = compare(script, [case], given.rounds * rounds(case))
            rows.append(row(result, peak))
    print(report.table(rows))


def arguments(doc: str, rounds: int) -> argparse.Namespace:
    """--rounds, and --side if the script runs as one of the two sides."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side")
    parser.add_argument("--only", default="", help="regular expression of the cases' names")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    return parser.parse_args()
