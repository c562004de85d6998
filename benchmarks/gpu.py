# SPDX-License-Identifier: Apache-2.0
"""`make bench-gpu`: measures this project and its PyTorch peers on one GPU, part by part.

    python benchmarks/gpu.py --tier=1 --limit=480 --out=gpu.jsonl
    python benchmarks/gpu.py --parts='ae-*,uvit-h-f64p1-train:4096'
    python benchmarks/gpu.py --tiny            the same code at toy sizes, on a CPU
    python benchmarks/gpu.py --table=gpu.jsonl only prints what earlier runs measured

Each part runs in its own process, which exits before the next one starts. Rows are printed, and
appended to --out, as they arrive; a part that fails or times out loses only its own rows. FLOPs are
XLA's count of the model without rematerialisation, compared with the rate of a bfloat16 matmul of
size 8192, which is measured first. Peers use our FLOPs, since they are the same networks.
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, NamedTuple

Row = dict[str, Any]


class Part(NamedTuple):
    """What a part runs: module.function(batch=batch, tiny=..., **settings), which yields rows."""

    tier: int  # 0: always, before the others
    run: str
    batch: int
    # About what it takes on an H100 with nothing compiled yet. With less left it doesn't start.
    seconds: int
    settings: dict[str, Any] = {}
    peer: str = ""  # the part of ours that this is the peer of


def _ours(tier: int, what: str, size: int, batch: int, seconds: int, **settings: Any) -> Part:
    settings = {"what": what, "size": size} | settings
    return Part(tier, "gpu_parts.coder", batch, seconds, settings)


def _phase(tier: int, file: str, size: int, batch: int, seconds: int, **settings: Any) -> Part:
    settings = {"file": file, "size": size} | settings
    return Part(tier, "gpu_parts.autoencoder_step", batch, seconds, settings)


def _torch(what: str, compiled: bool) -> Part:
    batch, peer = (32, "phase1-l1") if what == "train-256" else (16, f"ae-{what}")
    function = "train" if what == "train-256" else "coder"
    settings = {"what": what.split("-")[0], "size": int(what.split("-")[1]), "compiled": compiled}
    return Part(2, f"torch_peers.{function}", batch, 150 if compiled else 35, settings, peer)


F64P1 = {"config": "uvit:h", "autoencoder": "f64c128", "patch": 1}  # 64 tokens
F32P1 = {"config": "uvit:h", "autoencoder": "f32c32", "patch": 1}  # 256
F8P2 = {"config": "uvit:h", "autoencoder": "sd-vae-f8", "patch": 2}  # 1024
DIT = {"config": "dit:xl", "autoencoder": "f32c32", "patch": 1}  # 256
LATENTS_F64P1 = {"side": 8, "channels": 128, "patch": 1}
LATENTS_F8P2 = {"side": 64, "channels": 4, "patch": 2}

PARTS = {
    "matmul": Part(0, "gpu_parts.matmul", 1, 15),
    "attention": Part(1, "gpu_layers.attention", 65536, 45),
    "depthwise": Part(1, "gpu_layers.depthwise", 16, 35),
    "uvit-h-f64p1-train": Part(1, "gpu_parts.denoiser_step", 1024, 50, F64P1),
    "uvit-h-f8p2-train": Part(1, "gpu_parts.denoiser_step", 128, 60, F8P2),
    "ae-decode-512": _ours(1, "decode", 512, 16, 38),
    "ae-encode-512": _ours(1, "encode", 512, 16, 95),
    "phase1-l1": _phase(1, "phase1", 256, 32, 135, lpips=False),
    "phase1": _phase(1, "phase1", 256, 32, 150),
    "uvit-h-f64p1-sample": Part(1, "gpu_parts.sampling", 512, 110, F64P1 | {"whole": True}),
    "uvit-h-f8p2-sample": Part(1, "gpu_parts.sampling", 64, 40, F8P2 | {"whole": False}),
    "phase2": _phase(1, "phase2", 512, 16, 150),
    "phase3": _phase(1, "phase3", 256, 32, 150),
    "ae-decode-1024": _ours(1, "decode", 1024, 4, 45),
    "ae-encode-1024": _ours(1, "encode", 1024, 4, 105),
    "torch-ae-encode-512": _torch("encode-512", False),
    "torch-ae-decode-512": _torch("decode-512", False),
    "torch-ae-train-256": _torch("train-256", False),
    "torch-ae-encode-512-compiled": _torch("encode-512", True),
    "torch-ae-decode-512-compiled": _torch("decode-512", True),
    "torch-ae-train-256-compiled": _torch("train-256", True),
    "torch-uvit-h-f64p1-train": Part(
        2, "torch_peers.uvit", 1024, 60, LATENTS_F64P1, "uvit-h-f64p1-train"
    ),
    "torch-uvit-h-f8p2-train": Part(
        2, "torch_peers.uvit", 128, 60, LATENTS_F8P2, "uvit-h-f8p2-train"
    ),
    "uvit-h-f32p1-train": Part(2, "gpu_parts.denoiser_step", 512, 55, F32P1),
    "dit-xl-f32p1-train": Part(2, "gpu_parts.denoiser_step", 512, 55, DIT),
    "ae-encode-256": _ours(2, "encode", 256, 64, 100),
    "ae-decode-256": _ours(2, "decode", 256, 64, 40),
    "ae-encode-2048": _ours(2, "encode", 2048, 1, 110),
    "ae-decode-2048": _ours(2, "decode", 2048, 1, 50),
    # Straight after phase1-l1 it finds its step in the compile cache.
    "input": Part(2, "gpu_parts.inputs", 32, 60, {}, "phase1-l1"),
    "ae-encode-512-f64": _ours(3, "encode", 512, 16, 120, variant="f64c128"),
    "ae-decode-512-f64": _ours(3, "decode", 512, 16, 60, variant="f64c128"),
    "ae-encode-512-f128": _ours(3, "encode", 512, 16, 140, variant="f128c512"),
    "ae-decode-512-f128": _ours(3, "decode", 512, 16, 70, variant="f128c512"),
    "ae-encode-512-float32": _ours(3, "encode", 512, 16, 110, dtype="float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="", help="NAME[:BATCH],...; a name may have * and ?")
    parser.add_argument("--tier", type=int, choices=(1, 2, 3), help="without --parts; default: all")
    parser.add_argument("--limit", type=float, default=float("inf"), help="time budget in seconds")
    parser.add_argument("--part-limit", type=float, default=300, help="seconds per part")
    parser.add_argument("--attention", choices=("plain", "cudnn"), help="default: the project's")
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--cache", help="folder of compiled programs; default: a new one each run")
    parser.add_argument("--logs", help="folder for what the parts print to stderr")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--table", metavar="FILE", help="only print the rows of an earlier --out")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one part, NAME:BATCH
    given = parser.parse_args()
    if given.child:
        return child(given)
    if given.table:
        with open(given.table, encoding="utf-8") as file:
            return print(table([json.loads(line) for line in file]))
    if not given.tiny and not shutil.which("nvidia-smi"):
        raise SystemExit("there is no nvidia-smi, so no NVIDIA GPU; try the parts with --tiny")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the part that runs ends, too
    chosen = choose(given.parts, given.tier)
    ends = time.monotonic() + given.limit
    rows = [machine(given.tiny)]
    logs = given.logs or tempfile.mkdtemp(prefix="bench-gpu-")
    os.makedirs(logs, exist_ok=True)
    print(f"{rows[0]['machine']}\n\n{head()}", flush=True)
    keep(rows[0], given.out)
    with tempfile.TemporaryDirectory() as fresh:
        cache = os.path.abspath(given.cache or fresh)
        for name, batch in chosen:
            rest = ends - time.monotonic()
            if rest < PARTS[name].seconds and not given.tiny:
                found = [{"part": name, "skipped": f"{rest:.0f} s are left"}]
            else:
                found = run(name, batch, given, cache, logs, min(rest, given.part_limit))
            for row in found:
                rows.append(row)
                print(line(row, rows), flush=True)
                keep(row, given.out)
    print(f"\n{table(rows)}", flush=True)


def choose(patterns: str, tier: int | None) -> list[tuple[str, int]]:
    """[(part, batch)], those of tier 0 first."""
    chosen = [(name, part.batch) for name, part in PARTS.items() if part.tier == 0]
    if not patterns:
        rest = [(n, p.batch) for n, p in PARTS.items() if p.tier and tier in (None, p.tier)]
        return chosen + rest
    for pattern in patterns.split(","):
        name, _, batch = pattern.partition(":")
        found = fnmatch.filter(PARTS, name)
        if not found:
            raise SystemExit(f"--parts: {name!r} is not a part; choose from {', '.join(PARTS)}")
        chosen += [(n, int(batch or PARTS[n].batch)) for n in found if PARTS[n].tier]
    return chosen


# --- one part -------------------------------------------------------------------------------------


def run(name: str, batch: int, given: argparse.Namespace, cache: str, logs: str, limit: float):
    """Yields a part's rows as it reports them; if it failed, the last one has the reason."""
    command = [sys.executable, os.path.abspath(__file__), f"--child={name}:{batch}"]
    command += ["--tiny"] * given.tiny + [f"--attention={given.attention}"] * bool(given.attention)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu" if given.tiny else "cuda,cpu",  # FLOPs are counted on the CPU
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as jobs set it
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "torch"),
    }
    log = os.path.join(logs, f"{name}-{batch}.log")
    began, failure = time.monotonic(), "no row"
    with open(log, "w", encoding="utf-8") as errors:
        # A group of its own, so that its compile workers end with it.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(limit, _end, (process.pid,))
        timer.start()
        try:
            for text in process.stdout or ():
                row = json.loads(text)
                failure = "" if "case" in row else row.get("failed", "")
                if failure:
                    continue
                if given.attention and "config" in PARTS[name].settings:
                    row["case"] = f"{row.get('case', '')} {given.attention} attention".strip()
                yield {"part": name, "batch": batch} | row
            status = process.wait()
        finally:
            timer.cancel()
            _end(process.pid)
    if time.monotonic() - began >= limit:
        failure = f"ended after {limit:.0f} s"
    elif status and not failure:
        failure = f"status {status}"
    if failure:
        if failure == "no row" or status < 0:
            with open(log, encoding="utf-8", errors="replace") as file:
                lines = [text.strip() for text in file if text.strip()]
            failure += f": {lines[-1][:200]}" if lines else ""
        yield {"part": name, "batch": batch, "failed": f"{failure} ({log})"}


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def child(given: argparse.Namespace) -> None:
    """Runs one part in this process and writes its rows to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print are not rows
    name, _, batch = given.child.partition(":")
    module, function = PARTS[name].run.split(".")
    os.environ["BENCH_ATTENTION"] = given.attention or ""
    try:
        call = getattr(importlib.import_module(module), function)
        for row in call(batch=int(batch), tiny=given.tiny, **PARTS[name].settings):
            answers.write(json.dumps(row) + "\n")
            answers.flush()
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip() or "no message").splitlines()[0]
        answers.write(json.dumps({"failed": f"{type(error).__name__}: {text[:300]}"}) + "\n")
        answers.flush()
        os._exit(1)


# --- the table ------------------------------------------------------------------------------------

HEAD = (
    "part",
    "batch",
    "ms",
    "least to most",
    "images/s",
    "of matmul rate",
    "peak GB",
    "lower, compile, again s",
    "ours / theirs",
)


def machine(tiny: bool) -> Row:
    """The first row: the card, its driver, the versions and the date."""
    card = "toy sizes, CPU"
    if not tiny:
        query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True).stdout.strip()
    wanted = ("jax", "jaxlib", "torch", "diffusers", "nvidia-cudnn", "nvidia-cuda-runtime")
    found = {package.name or "": package.version for package in importlib.metadata.distributions()}
    found = [f"{n} {v}" for n, v in sorted(found.items()) if {n, n.rpartition("-")[0]} & {*wanted}]
    return {"machine": "; ".join([card, *found, f"{datetime.date.today():%Y-%m-%d}"])}


def head() -> str:
    return f"| {' | '.join(HEAD)} |\n|{'---|' * 2}{'---:|' * (len(HEAD) - 2)}"


def line(row: Row, rows: list[Row]) -> str:
    """A row of the table in Markdown. rows: all so far, including the matmul rate and the peers."""
    name = f"{row['part']} {row.get('case', '')}".strip()
    if "failed" in row or "skipped" in row:
        what = next(key for key in ("failed", "skipped") if key in row)
        return f"| {name} | {what}: {row[what]} |{' |' * (len(HEAD) - 2)}"
    rate = next((r["rate"] for r in rows if "rate" in r), None)
    ours = _peer(row, rows)
    each = row["seconds"] / row["batch"]
    flops = row.get("flops")
    if ours and not flops:
        flops = ours["flops"] / ours["batch"] * row["batch"]
    compile_s = [row.get(key) for key in ("lower_s", "compile_s", "again_s")]
    cells = [
        name,
        row["batch"],
        f"{1e3 * row['seconds']:.4g}",
        f"{1e3 * row['least']:.4g} to {1e3 * row['most']:.4g}",
        f"{row['images_per_s']:.4g}" if "images_per_s" in row else "",
        f"{flops / row['seconds'] / rate:.0%}" if flops and rate else "",
        f"{row['peak_gb']:.1f}" if row.get("peak_gb") else "",
        ", ".join("-" if s is None else f"{s:.1f}" for s in compile_s) if any(compile_s) else "",
        f"{ours['seconds'] / ours['batch'] / each:.2f}" if ours else "",
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _peer(row: Row, rows: list[Row]) -> Row | None:
    """Our row, if `row` is its peer's."""
    name = PARTS[row["part"]].peer
    same = [r for r in rows if r.get("part") == name and "seconds" in r]
    return same[-1] if name and same else None


def table(rows: list[Row]) -> str:
    """All rows in Markdown, with each run's machine above its rows."""
    lines = []
    for number, row in enumerate(rows):
        if "machine" in row:
            lines += ([""] if number else []) + [row["machine"], "", head()]
        else:
            lines.append(line(row, rows))
    return "\n".join(lines)


def keep(row: Row, out: str | None) -> None:
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
