# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with resolution, batch and number of images; writes docs/growth.svg.

    python benchmarks/growth.py

`tiny`, float32. Memory is what the compiled program needs besides its weights. Work grows with the
pixels: linear attention and convolutions are linear in them.
"""

import os
import time

import common
import numpy as np

PLOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "docs", "growth.svg")


def measure(ae, side: int, batch: int, rounds: int) -> dict[str, float]:
    """Minimum seconds, and temporary MB, of encode and decode."""
    import jax

    x = jax.device_put(np.zeros((batch, side, side, 3), np.float32))
    z = ae.encode(x)
    found = {}
    for name, run, value in (("encode", ae.encode, x), ("decode", ae.decode, z)):
        program = jax.jit(lambda v, run=run: run(v)).lower(value).compile()
        found[f"{name} MB"] = program.memory_analysis().temp_size_in_bytes / 1e6
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(run(value))
            seconds.append(time.perf_counter() - start)
        found[f"{name} s"] = min(seconds[1:])
    return found


def main() -> None:
    given = common.arguments(__doc__, rounds=3)
    import dcae_jax
    from dcae_jax import files as report

    print(common.machine(), "\n")
    ae = dcae_jax.create_autoencoder("tiny", dtype="float32")
    names = ("encode s", "decode s", "encode MB", "decode MB")
    rows, curves = [["images", "pixels per side", *names]], []
    sweeps = {
        "megapixels, by resolution": [(side, 1) for side in (256, 512, 1024, 2048)],
        "megapixels, by batch at 256": [(256, batch) for batch in (1, 4, 16, 64)],
    }
    for cases in sweeps.values():
        found = {name: [] for name in names}
        for side, batch in cases:
            values = measure(ae, side, batch, given.rounds)
            rows.append([batch, side, *(float(f"{values[name]:.3g}") for name in names)])
            for name in names:
                found[name].append((side * side * batch / 1e6, values[name]))
        curves.append(found)
    # More images than one batch: one batch after the other.
    calls = [(n, _many(ae, n)) for n in (16, 64, 256)]
    for n, spent in calls:
        rows.append([f"{n}, 16 at a time", 256, spent, "-", "-", "-"])
    print(report.table(rows))
    panels = []
    for what, found in zip(sweeps, curves, strict=True):
        panels.append((what, "seconds", {n[:-2]: found[n] for n in names[:2]}))
        panels.append((what, "temporary MB", {n[:-3]: found[n] for n in names[2:]}))
    panels.append(("images, 16 at a time", "seconds", {"encode": calls}))
    common.plot(PLOT, "cost of tiny; grey: linear growth", panels)


def _many(ae, images: int) -> float:
    import jax

    x = jax.device_put(np.zeros((16, 256, 256, 3), np.float32))
    start = time.perf_counter()
    for _ in range(images // 16):
        jax.block_until_ready(ae.encode(x))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
