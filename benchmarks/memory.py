# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of the jobs, and whether training grows over 2,000 steps.

    python benchmarks/memory.py

`tiny`, each job in its own process.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time

import common

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
STEPS = 2000


def job(*arguments: str, watch: list | None = None) -> float:
    """Peak resident MB of a job; `watch` gets (seconds, MB) twice a second."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dcae_jax.main", *arguments],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    start = time.perf_counter()

    def look():
        while process.returncode is None:
            try:
                with open(f"/proc/{process.pid}/statm", encoding="utf-8") as file:
                    pages = int(file.read().split()[1])
            except (OSError, IndexError):
                return
            watch.append((time.perf_counter() - start, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
            time.sleep(0.5)

    if watch is not None:
        threading.Thread(target=look, daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return usage.ru_maxrss / 1e3


def main() -> None:
    common.arguments(__doc__, rounds=1)
    from dcae_jax import files as report
    from dcae_jax.data import sources

    print(common.machine(), "\n")
    with tempfile.TemporaryDirectory() as root:
        run, images = os.path.join(root, "run"), os.path.join(root, "images")
        os.makedirs(images)
        photos = sources.photos()
        for i, name in enumerate(photos.names):
            photos[i][0].save(os.path.join(images, os.path.splitext(name)[0] + ".png"))
        memory: list[tuple[float, float]] = []
        rows = [["job", "peak resident MB"]]
        train = ["--config=configs/phase1.py:tiny", f"--workdir={run}"]
        train += [f"--config.steps={STEPS}", f"--config.save_every={STEPS}"]
        rows.append(
            [f"train, {STEPS} steps", job(*train, "--config.evaluate_every=0", watch=memory)]
        )
        rows.append(
            [
                "encode",
                job(
                    "--config=configs/encode.py",
                    f"--workdir={root}/latents",
                    f"--config.init_from={run}",
                    "--config.data.source=folder",
                    f"--config.data.path={images}",
                    "--config.resolution=256",
                ),
            ]
        )
        rows.append(
            [
                "evaluate",
                job(
                    "--config=configs/evaluate.py",
                    f"--workdir={root}/scores",
                    f"--config.init_from={run}",
                    "--config.data.source=folder",
                    f"--config.data.path={images}",
                ),
            ]
        )
        rows.append(
            [
                "export, diffusers",
                job(
                    "--config=configs/export.py",
                    f"--config.init_from={run}",
                    "--config.export.format=diffusers",
                    f"--config.export.out={root}/export",
                ),
            ]
        )
    print(report.table(rows), "\n")
    end = memory[-1][0]
    quarters = [
        [mb for at, mb in memory if i * end / 4 <= at < (i + 1) * end / 4] for i in range(4)
    ]
    cells = [f"{sum(q) / len(q):.0f}" for q in quarters]
    print(report.table([["resident MB by quarter of the training", *"1234"], ["mean", *cells]]))


if __name__ == "__main__":
    main()
