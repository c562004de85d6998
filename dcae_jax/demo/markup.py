# SPDX-License-Identifier: Apache-2.0
"""Parts of the demo's page: tables, images and curves as HTML that needs no other file."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

Scores = Sequence[tuple[str, dict[str, float]]]  # (model, {'psnr_256': ..., 'ssim_256': ...})

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dcae_jax demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
.numbers :is(td, th):not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100%; margin-right: 1rem }} .cap {{ color: #555 }}
</style></head><body>
{body}
</body></html>
"""


def document(sections: Iterable[str]) -> str:
    """A page of these sections."""
    return _PAGE.format(body="\n".join(sections))


def table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """The first row is the head. kind: 'numbers', aligned on the right, or 'words'."""
    out = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        out.append("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row))
    return f'<table class="{kind}">' + "".join(f"<tr>{row}</tr>" for row in out) + "</table>"


def scores(rows: Scores) -> str:
    """A table of these rows."""
    head = ["", *(key.replace("_", " at ").upper().replace("AT", "at") for key in rows[0][1])]
    return table([head, *([name, *(f"{v:.3f}" for v in r.values())] for name, r in rows)])


def png(pixels: np.ndarray, alt: str) -> str:
    """An image [H, W, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return _image("png", file.getvalue(), alt)


def _image(kind: str, data: bytes, alt: str) -> str:
    """An image embedded in the page as base64."""
    text = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{text}" alt="{html.escape(alt)}">'


def points(rows: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows of a run that have `key`."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def curves(lines: list[tuple[str, list[tuple[float, float]]]], title: str) -> str:
    """(name, points) curves over steps, as an embedded image; '' if there are no points."""
    if not any(line for _, line in lines):
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step")
    for name, line in lines:
        if line:
            axes.plot(*zip(*line, strict=True), label=name, linewidth=1.2, gid="curve")
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:  # beside the curves, never on them
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _image("svg+xml", file.getvalue(), title)
