# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md: jobs planned for TPU slices.

    python benchmarks/scaling.py                    # plans what is missing, writes the page
    python benchmarks/scaling.py --only=uvit-h      # only missing cells with this name
    python benchmarks/scaling.py --remake --only=f32c32-phase1-v5e
    python benchmarks/scaling.py --check            # status 1 if the page is out of date

A cell is one job on one slice. docs/scaling/plans.json stores all cells, docs/scaling/plans.csv has
a row for each, and the page shows a summary. A cell takes minutes and is planned once, so an
interrupted run resumes. Planning needs the TPU compiler (pip install -e '.[tpu]'); the page does
not.
"""

import argparse
import csv
import dataclasses
import io
import logging
import os
import re
import sys

import common

from dcae_jax import files
from dcae_jax.config.schema import Plan
from dcae_jax.planner import chips, compile, cost

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(HERE, os.pardir, "configs")
DOC = os.path.join(HERE, os.pardir, "docs", "scaling.md")
KEPT = os.path.join(HERE, os.pardir, "docs", "scaling", "plans.json")
CSV = os.path.join(HERE, os.pardir, "docs", "scaling", "plans.csv")

# One slice per generation; the chips of each cost about the same together.
AUTOENCODER_SLICES = ("v5e:4x8", "v5p:2x2x4", "v6e:4x4")
DIFFUSION_SLICES = ("v5e:4x4", "v5p:2x2x2", "v6e:2x4")


@dataclasses.dataclass(frozen=True)
class Cell:
    table: str
    job: str  # its name in the table
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    effort: float = -1.0  # plan.effort

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.=-]+", "-", f"{self.table}-{self.job}-{self.topology}").strip("-")


def all_cells() -> list[Cell]:
    """All cells, the most wanted first."""
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
    for variant in ("1.5-f32c128", "1.5-f64c128"):
        job, config = f"{variant} phase 1", f"phase1.py:{variant}"
        jobs.append(Cell("jobs", job, config, AUTOENCODER_SLICES[0], fsdp))
    two = ("autoencoder=1.5-f64c128", "resolution=512", "batch_size=1024", "augment.count=2")
    two += ("augment.channels=(16,32,48,64,80,96,112,128)",)
    jobs.append(Cell("jobs", "USiT-2B f64 x2", "usit.py:2b", DIFFUSION_SLICES[0], (*two, *fsdp)))
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


def kept_cells() -> dict[str, dict]:
    """{cell's name: its job, config, overrides and rows} of every cell planned so far."""
    return files.read_json(KEPT) or {}


def planned(cell: Cell) -> None:
    """Plans a cell and keeps its rows."""
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
    files.write_json(KEPT, kept_cells() | {cell.name: kept})


def rows_of(cells: list[Cell]) -> list[tuple[Cell, dict]]:
    """(cell, row) of the kept cells whose configuration is still the one asked for."""
    everything = kept_cells()
    found = []
    for cell in cells:
        kept = everything.get(cell.name, {"config": None, "overrides": None})
        if (kept["config"], kept["overrides"]) == (f"configs/{cell.config}", list(cell.overrides)):
            found += [(cell, row) for row in kept["rows"]]
    return found


# --- the page -------------------------------------------------------------------------------------


def summary(cells: list[Cell]) -> str:
    """One row per job: the slice of the smallest chips that it fits; its mean row in phase 2."""
    best: dict[str, tuple[Cell, dict]] = {}
    for cell, row in rows_of([cell for cell in cells if cell.table == "jobs"]):
        smaller = cell.job not in best or _memory(row) < _memory(best[cell.job][1])
        same_cell = cell.job in best and best[cell.job][0] == cell
        if row["fits"] and (smaller or same_cell):  # the last row of a cell is its mean
            best[cell.job] = cell, row
    head = ("model", "job", "slice", "batch", "size", *SHORT_HEAD)
    lines = []
    for variant in dict.fromkeys(job.split()[0] for job in best):
        for job in sorted(job for job in best if job.split()[0] == variant):
            cell, row = best[job]
            what = " ".join(job.split()[1:])
            if not what.startswith("phase"):
                what = f"training on {what.split()[0]} latents"
                what += ", augment.count=2" if job.endswith("x2") else ""
            size = "256 to 1024, drawn" if row["size"] == cost.MEAN else row["size"]
            lines.append((variant, what, cell.topology, row["batch_size"], size, *_short(row)))
    return _markdown(head, lines)


def parts(cells: list[Cell]) -> str:
    """The costs of training all layers, and of training some of them."""
    rows = rows_of([cell for cell in cells if cell.table == "parts"])
    lines = [(cell.job, *_short(row)) for cell, row in rows]
    return _markdown(("trained", *SHORT_HEAD), lines)


SHORT_HEAD = ("GB per chip", "TFLOP per chip", "roofline step, s", "images/s")


def _memory(row: dict) -> float:
    """Bytes of HBM per chip."""
    chip = chips.topology(row["topology"]).chip
    assert chip, row["topology"]
    return chip.hbm


def _short(row: dict) -> tuple[str, ...]:
    """A row's cells under SHORT_HEAD."""
    return (
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['step_s_roofline']:.3f}",
        f"{row['images_per_s']:,.0f}",
    )


def _markdown(head: tuple, rows: list[tuple]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    numbers = [all(str(row[i])[0].isdigit() for row in rows) for i in range(len(head))]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def table(cells: list[Cell]) -> str:
    """Every kept row as CSV, with the columns of the planner's own table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", "job", *cost.HEAD))
    for cell, row in rows_of(cells):
        numbers = [f"{x:.4g}" if isinstance(x, float) else x for x in cost.cells(row)]
        writer.writerow((cell.table, cell.job, *numbers))
    return out.getvalue()


def pages(cells: list[Cell]) -> dict[str, str]:
    """{path: text} of the files that the kept cells make."""
    with open(DOC, encoding="utf-8") as file:
        text = file.read()
    for name, part in (("summary", summary(cells)), ("parts", parts(cells))):
        text = common.between_marks(DOC, text, name, part)
    return {DOC: text, CSV: table(cells)}


def write(cells: list[Cell]) -> None:
    for path, text in pages(cells).items():
        files.write_file(path, text.encode())


def check(cells: list[Cell]) -> None:
    """Exits with status 1 if a file differs from what the kept cells make."""
    for path, text in pages(cells).items():
        with open(path, encoding="utf-8") as file:
            if file.read() != text:
                name = os.path.relpath(path, os.path.join(HERE, os.pardir))
                sys.exit(f"{name} is out of date; run python benchmarks/scaling.py --only=^$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of cells' names")
    parser.add_argument("--remake", action="store_true", help="plan cells that are kept, too")
    parser.add_argument("--check", action="store_true", help="compare the page with the kept cells")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells = all_cells()
    if arguments.check:
        return check(cells)
    for cell in cells:
        missing = arguments.remake or cell.name not in kept_cells()
        if re.search(arguments.only, cell.name) and missing:
            print(cell.name, flush=True)
            planned(cell)
            write(cells)
    write(cells)


if __name__ == "__main__":
    main()
