# SPDX-License-Identifier: Apache-2.0
"""`make demo`: trains a tiny autoencoder and a tiny USiT on the embedded photographs.

    dcae-jax demo --workdir=demo-run

Writes WORKDIR/index.html, a self-contained page with curves, a table and images, and
WORKDIR/overview.jpg, the image in README.md. Takes 15 to 25 minutes on two CPU cores; rerun the
command to resume.
"""

import base64
import html
import io
import logging
import os
import time

import jax
import numpy as np
from PIL import Image

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import sources
from dcae_jax.demo import diffusion, overview, pca
from dcae_jax.evaluation import networks, reconstruction
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process

PCA_PATCHES = 20_000


def run(workdir: str) -> int:
    """Trains, evaluates and writes the page; work that an earlier call finished is not repeated."""
    began = time.perf_counter()
    given = config_lib.load_file(os.path.join(config_lib.SHIPPED, "phases.py"), "tiny")
    phases = config_lib.validate_phases(given)
    status = train.run_phases(phases, workdir) or diffusion.make(workdir)
    if status != train.DONE:
        return status
    rows, shown = evaluate(phases["phase1"], workdir)
    samples = diffusion.evaluate(workdir)
    head = ["on held-out crops", *rows[0][1]]
    text = files.table([head, *([name, *scores.values()] for name, scores in rows)])
    write_overview(workdir, shown[max(shown, key=int)], samples)
    page = write_page(workdir, rows, shown, samples, time.perf_counter() - began)
    logging.info(
        "%s\n\nnearest neighbour of the same class:\n%s\n\npage with curves and images: %s",
        text,
        files.table(diffusion.table(samples)),
        page,
    )
    return 0


def evaluate(config: Config, workdir: str) -> tuple[list, dict[str, list[np.ndarray]]]:
    """([(name, {score: value})] for PCA and each phase, {size: photographs and reconstructions}).

    The latter are arrays [N, size, size, 3] uint8: photographs, then one array per phase.
    """
    mesh = mesh_lib.make_mesh(config.mesh)
    source = sources.held_out_source(config.data)
    assert source is not None  # the photographs have held-out ones
    models = [
        autoencoder.load_autoencoder(os.path.join(workdir, phase), mesh=mesh) for phase in PHASES
    ]
    f, channels = models[0].compression, models[0].latent_channels
    name = f"PCA at the same size (f{f}, {channels} channels)"
    linear = pca.fit(sources.training_source(config.data), f, channels, PCA_PATCHES, config.seed)
    rows = [(name, pca.scores(linear, config.evaluate, source))]
    metric_networks = networks.load_networks(config.evaluate, mesh)
    shown: dict[str, list[np.ndarray]] = {}
    for phase, model in zip(PHASES, models, strict=True):
        results = reconstruction.evaluate(
            config.evaluate,
            config.data,
            model.graphdef,
            model.weights,
            mesh,
            source,
            metric_networks,
        )
        rows.append((phase.replace("phase", "after phase "), reconstruction.flat_scores(results)))
        for size, result in results.items():
            shown.setdefault(size, [result.images]).append(result.outputs)
    return rows, shown


def write_overview(workdir: str, shown: list[np.ndarray], samples: diffusion.Samples) -> None:
    """Writes WORKDIR/overview.jpg: one crop of each held-out photograph, samples of each class."""
    captions = ["held-out photograph", *(f"after {p.replace('phase', 'phase ')}" for p in PHASES)]
    columns = [(c, images[:2]) for c, images in zip(captions, shown, strict=True)]
    rows = [
        ("a crop of each training photograph, reconstructed", samples.crops[0]),
        ("diffusion samples, with that photograph as class label", samples.images[0]),
        ("more samples", samples.images[1]),
    ]
    overview.write(os.path.join(workdir, "overview.jpg"), columns, rows)


def columns(images: list[np.ndarray]) -> list[np.ndarray]:
    """Photographs, each phase's reconstructions, and four times the change of the last phase."""
    return [*images, files.difference(*images[-2:])]


# --- the page -------------------------------------------------------------------------------------


def write_page(
    workdir: str,
    rows: list,
    shown: dict[str, list[np.ndarray]],
    samples: diffusion.Samples,
    seconds: float,
) -> str:
    """Writes WORKDIR/index.html; returns its path."""
    head = ["", *(key.replace("_", " at ").upper().replace("AT", "at") for key in rows[0][1])]
    cells = [[name, *(f"{value:.3f}" for value in scores.values())] for name, scores in rows]
    curves = [_curve(workdir, "loss", "training loss (L1)"), _curve(workdir, "psnr", "PSNR, dB")]
    third = files.read_rows(os.path.join(workdir, "phase3"))
    gan = {
        "logits_real": "logits on real",
        "logits_fake": "logits on fake",
        "gan_accuracy": "accuracy",
    }
    curves.append(_lines([(gan[k], _points(third, k)) for k in gan], "phase 3: the discriminator"))
    uvit, few = (
        files.read_rows(os.path.join(workdir, run)) for run in (diffusion.RUN, diffusion.FEW)
    )
    images = "".join(
        f"<h3>{size} pixels</h3><p class='cap'>photograph | {' | '.join(PHASES)} | four times "
        "the change of phase 3, on grey: the texture that it learned</p>"
        + _png(files.image_grid(columns(c), tile=256), "reconstructions")
        for size, c in shown.items()
    )
    gap = np.full_like(samples.crops[0], 255)
    grid = [*samples.crops, gap, *samples.images]
    page = _PAGE.format(
        table=_html_table([head, *cells]),
        curves="".join(curves),
        images=images,
        samples=_png(files.image_grid(grid, tile=64), "crops and samples of each class"),
        classes=", ".join(name.rpartition(".")[0] for name in samples.classes),
        crops=diffusion.SHOWN[0],
        known=samples.known,
        neighbours=diffusion.NEIGHBOURS,
        held_out=samples.held_out,
        sampled=samples.sampled,
        ratio=samples.sampled / samples.held_out,
        few_table=_html_table(diffusion.table(samples)),
        few=_png(samples.few_grid, "samples by number of steps"),
        groups=" | ".join(f"{d.name}, {d.steps}" for d in samples.drawn),
        few_curve=_lines([("", _points(few, "mse"))], "few-step UViT: error of the velocity"),
        uvit=_lines([("", _points(uvit, "loss"))], "UViT: training loss"),
        note=f"{jax.devices()[0].platform.upper()}, this run took {seconds / 60:.1f} minutes.",
    )
    path = os.path.join(workdir, "index.html")
    files.write_file(path, page.encode())
    return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dcae_jax demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd }}
td:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100%; margin-right: 1rem }} .cap {{ color: #555 }}
</style></head><body>
<h1>A deep compression autoencoder, trained in three phases</h1>
<p>The model <code>tiny</code> (16 pixels per side of a latent position, 32 channels), on the
photographs that ship inside scikit-image and scikit-learn. Two of them, a flower and a cat, are
held out; all figures and images below are on fixed crops of those two. {note}</p>
<h2>Reconstruction of held-out images</h2>{table}
<p>PSNR in dB and SSIM, higher is better. Phase 1 trains everything at low resolution; phase 2 the
middle of the model at higher resolution; phase 3 the decoder's head with a discriminator, which
trades some PSNR for texture. PCA, solved in closed form, is the best <em>linear</em> autoencoder
of the same latent size: the baseline for a few minutes of training.</p>
<h2>Curves</h2>{curves}
<h2>Images</h2>{images}
<h2>Diffusion on its latents</h2>
<p>A tiny UViT is trained with SiT's objective on the latents of {known} crops of each photograph,
4x4 positions for 64x64 pixels; each photograph is a class. Rows are classes, from the top:
{classes}. Left: {crops} crops as the autoencoder reconstructs them. Right: samples with
guidance.</p>
{samples}
<p>The nearest neighbour among {neighbours} training crops per class, in the autoencoder's latents,
has the same class for {held_out:.1%} of the crops unseen in training, and for {sampled:.1%} of
the samples: {ratio:.2f} times as often.</p>{uvit}
<h2>In one to four steps</h2>
<p>The same network, trained further on average velocities (docs/fewstep.md): it jumps from noise to
data in one to four evaluations, with its guidance folded in, where the flow model evaluates itself
twice per step. For contrast, one step of the flow model.</p>{few_table}
<p class='cap'>model, steps: {groups}</p>{few}{few_curve}
</body></html>
"""


def _html_table(rows: list[list[str]]) -> str:
    out = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        out.append("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in out) + "</table>"


def _png(pixels: np.ndarray, alt: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return _image("png", file.getvalue(), alt)


def _image(kind: str, data: bytes, alt: str) -> str:
    """An image embedded in the page as base64."""
    text = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{text}" alt="{html.escape(alt)}">'


def _points(rows: list[dict], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _curve(workdir: str, key: str, title: str) -> str:
    lines = [(p, _points(files.read_rows(os.path.join(workdir, p)), key)) for p in PHASES]
    return _lines(lines, title)


def _lines(lines: list[tuple[str, list[tuple[float, float]]]], title: str) -> str:
    """(name, points) curves over steps, as an embedded image; '' if there are no points."""
    if not any(points for _, points in lines):
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step")
    for name, points in lines:
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, gid="curve")
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:  # beside the curves, never on them
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _image("svg+xml", file.getvalue(), title)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status, like a job."""
    parser = process.parser("dcae-jax demo", __doc__)
    parser.add_argument("--workdir", default="demo-run", help="folder for the runs and the page")
    process.set_up_logging()
    try:
        workdir = parser.parse_args(arguments).workdir
        folder = os.path.abspath(os.path.expanduser(workdir))
        files.check_folder(folder)
        process.choose_platform()
        process.use_compile_cache()
        return run(folder)
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)
