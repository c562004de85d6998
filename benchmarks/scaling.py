# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md: jobs planned for slices of TPUs.

    python benchmarks/scaling.py                    # plans what is missing, writes the tables
    python benchmarks/scaling.py --only=uvit-h      # of what is missing, cells named so
    python benchmarks/scaling.py --remake --only=f32c32-phase1-v5e

A cell is one job on one slice, kept as docs/scaling/CELL.json. Each takes minutes; what is there is
not planned again, so an interrupted run goes on. Needs the TPU compiler: pip install -e '.[tpu]'.
"""

import argparse
import dataclasses
import logging
import os
import re

import common

from dcae_jax import files
from dcae_jax.config.schema import Plan
from dcae_jax.planner import compile, cost

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(HERE, os.pardir, "configs")
DOC = os.path.join(HERE, os.pardir, "docs", "scaling.md")
CACHE = os.path.join(HERE, os.pardir, "docs", "scaling")

# One slice a generation, of chips that together cost about the same.
AUTOENCODER_SLICES = ("v5e:4x8", "v5p:2x2x4", "v6e:4x4")
DIFFUSION_SLICES = ("v5e:4x4", "v5p:2x2x2", "v6e:2x4")


@dataclasses.dataclass(frozen=True)
class Cell:
    table: str
    job: str  # as the table calls it
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    effort: float = -1.0  # plan.effort

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.=-]+", "-", f"{self.table}-{self.job}-{self.topology}").strip("-")


def all_cells() -> list[Cell]:
    """The most wanted first."""
    found = []
    one = ("resolution=512", "resolutions=()", "batch_size=8", "loss.lpips_weight=0.0")
    one += ("ema_decay=0.0", "loss.gan_weight=0.0")
    for number, what in ((1, "everything"), (2, "middle layers"), (3, "head")):
        found.append(Cell("parts", what, f"phase{number}.py:f32c32", "v5p:1x1x1", one))

    fsdp = ("mesh.data=1", "mesh.fsdp=-1")
    latents = ("autoencoder=f64c128", "resolution=512", "batch_size=1024")
    diffusion = (
        ("UViT-H f64", "uvit.py:h", latents),
        ("UViT-2B f64", "uvit.py:2b", latents),
        ("DiT-XL f32", "dit.py:xl", ("autoencoder=f32c32", "resolution=512")),
    )
    jobs = []
    for slice_ in range(3):
        for variant in ("f32c32", "f64c128", "f128c512"):
            for number in (1, 2, 3):
                job = f"{variant} phase {number}"
                topology = AUTOENCODER_SLICES[slice_]
                jobs.append(Cell("jobs", job, f"phase{number}.py:{variant}", topology, fsdp))
        for job, config, overrides in diffusion:
            topology = DIFFUSION_SLICES[slice_]
            jobs.append(Cell("jobs", job, config, topology, (*overrides, *fsdp)))
    # The first of each kind on the smallest chips, then the rest.
    found += sorted(jobs, key=lambda cell: (cell.topology[:3] != "v5e", "phase 2" in cell.job))

    for model, config, overrides in (diffusion[0], diffusion[2]):
        for size in (1, 4, 16):
            mesh = ("mesh.data=-1", f"mesh.fsdp={size}")
            job = f"{model.split()[0]} fsdp={size}"
            found.append(Cell("fsdp", job, config, "v5e:4x4", (*overrides, *mesh)))
    for effort in (-1.0, 0.0):  # as the planner compiles, and as training does
        for unroll in (False, True):
            job = f"UViT-H {'unrolled' if unroll else 'scanned'} effort={effort:.0f}"
            overrides = (*latents, *fsdp, f"unroll={unroll}")
            found.append(Cell("loop", job, "uvit.py:h", "v5e:4x4", overrides, effort))
    for model, config, overrides in diffusion:
        for remat in ("none", "blocks"):
            job = f"{model} remat={remat}"
            changed = (*overrides, *fsdp, f"remat={remat}")
            found.append(Cell("remat", job, config, "v5e:4x4", changed))
    return found


def path(cell: Cell) -> str:
    return os.path.join(CACHE, f"{cell.name}.json")


def planned(cell: Cell) -> dict:
    """Plans a cell and keeps what came of it."""
    settings = Plan(
        config=os.path.join(CONFIGS, cell.config), overrides=cell.overrides, effort=cell.effort
    )
    job = compile.target_job(settings)
    kept = {
        "job": cell.job,
        "config": f"configs/{cell.config}",
        "overrides": list(cell.overrides),
        "rows": cost.plan(settings, job, cell.topology),
    }
    files.write_json(path(cell), kept)
    return kept


def table(cells: list[Cell]) -> str:
    """The kept cells of one table, with the name of the job before each row."""
    rows = []
    for cell in cells:
        kept = files.read_json(path(cell))
        if kept and (kept["config"], kept["overrides"]) == (
            f"configs/{cell.config}",
            list(cell.overrides),
        ):
            rows += [[cell.job, *cost.cells(row)] for row in kept["rows"]]
    return files.table([["job", *cost.HEAD], *rows]) if rows else "(not planned yet)"


def write(cells: list[Cell]) -> None:
    """Puts each table between its marks in docs/scaling.md."""
    for name in dict.fromkeys(cell.table for cell in cells):
        common.put(DOC, name, table([cell for cell in cells if cell.table == name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of cells' names")
    parser.add_argument("--remake", action="store_true", help="plan what is there, too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells = all_cells()
    for cell in cells:
        if re.search(arguments.only, cell.name) and (
            arguments.remake or not os.path.exists(path(cell))
        ):
            print(cell.name, flush=True)
            planned(cell)
            write(cells)
    write(cells)


if __name__ == "__main__":
    main()
