# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the shipped model, then the training of tiny models that a person can watch.

    dcae-jax demo --workdir=demo-run

Writes WORKDIR/index.html, a self-contained page with images, tables and curves, and
WORKDIR/overview.jpg, the image in README.md. The page has its first part, `small` beside PCA, after
seconds; then it trains a tiny autoencoder and a tiny USiT on the embedded photographs, which takes
about 10 minutes on two CPU cores. Rerun the command to resume.
"""

import logging
import os
import time

import jax
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.api import autoencoder
from dcae_jax.config import Config
from dcae_jax.config.loading import PHASES
from dcae_jax.data import sources
from dcae_jax.demo import diffusion, markup, overview, pca, shipped
from dcae_jax.demo.markup import Scores
from dcae_jax.evaluation import networks, reconstruction
from dcae_jax.jobs import train
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process

PCA_PATCHES = 20_000


def run(workdir: str) -> int:
    """Trains, evaluates and writes the page; work that an earlier call finished is not repeated."""
    began = time.perf_counter()
    first = shipped.evaluate()
    write_overview(workdir, first)
    known = [_opening(first)]
    page = write_page(workdir, [*known, "<p>Training runs: reload this page in some minutes.</p>"])
    logging.info("the shipped model:\n%s\n\npage: %s", _text(first.rows), page)
    phases = _settings()
    status = train.run_phases(phases, workdir)
    if status != train.DONE:
        return status
    rows, shown = evaluate(phases["phase1"], workdir)
    known.append(_phases(workdir, rows, shown))
    write_page(workdir, [*known, "<p>The diffusion model trains: reload this page.</p>"])
    logging.info("tiny:\n%s", _text(rows))
    status = diffusion.make(workdir)
    if status != train.DONE:
        return status
    samples = diffusion.evaluate(workdir)
    known.append(_diffusion(workdir, samples))
    write_page(workdir, [*known, _taken(time.perf_counter() - began)])
    logging.info(
        "nearest neighbour of the same class:\n%s\n\npage with curves and images: %s",
        files.table(diffusion.table(samples)),
        page,
    )
    return 0


def _settings() -> dict[str, Config]:
    """phases.py:tiny with Muon in phase 1, which gets further in fewer steps."""
    given = config_lib.load_file(os.path.join(config_lib.SHIPPED, "phases.py"), "tiny")
    phases = config_lib.validate_phases(given)
    muon = {"muon": (".*kernel",), "learning_rate": 1e-3}
    return phases | {"phase1": config_lib.replace(phases["phase1"], steps=800, optimizer=muon)}


def _text(rows: Scores) -> str:
    head = ["on held-out crops", *rows[0][1]]
    return files.table([head, *([name, *scores.values()] for name, scores in rows)])


def evaluate(config: Config, workdir: str) -> tuple[Scores, dict[str, list[np.ndarray]]]:
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
    rows = [(name, pca.scores(linear.reconstruct, config.evaluate, source))]
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


def write_overview(workdir: str, first: shipped.Shipped) -> None:
    """Writes WORKDIR/overview.jpg: a crop of each held-out photograph, from PCA and from small."""
    size = max(first.images)
    columns = zip(_captions(first), first.images[size], strict=True)
    overview.write(os.path.join(workdir, "overview.jpg"), list(columns))


def _captions(first: shipped.Shipped) -> list[str]:
    """Of the columns of `first.images`."""
    scores = [f"{name}: {values['psnr_512']:.1f} dB" for name, values in first.rows]
    return ["held-out photograph", *scores]


def columns(images: list[np.ndarray]) -> list[np.ndarray]:
    """Photographs, each phase's reconstructions, and four times the change of the last phase."""
    return [*images, files.difference(*images[-2:])]


# --- the page -------------------------------------------------------------------------------------


def write_page(workdir: str, sections: list[str]) -> str:
    """Writes WORKDIR/index.html; returns its path."""
    path = os.path.join(workdir, "index.html")
    files.write_file(path, markup.document(sections).encode())
    return path


def _taken(seconds: float) -> str:
    where = jax.devices()[0].platform.upper()
    return f"<p class='cap'>On {where}, this run took {seconds / 60:.1f} minutes.</p>"


def _opening(first: shipped.Shipped) -> str:
    """What `small` reconstructs, and what is what on the page."""
    images = "".join(
        f"<h3>{size} pixels</h3><p class='cap'>photograph | PCA | small</p>"
        + markup.png(files.image_grid(columns), f"reconstructions at {size} pixels")
        for size, columns in sorted(first.images.items(), reverse=True)
    )
    return f"""<h1>Deep compression autoencoders</h1>
<p>Two photographs that no model on this page has seen. In the middle and on the right they are
decoded from a latent with 96 times fewer numbers than the image has: 32 for every 32x32
pixels.</p>
{images}
{markup.scores(first.rows)}
<p>PSNR in dB and SSIM, higher is better, on {shipped.SETTINGS.crops} fixed crops of each
photograph. PCA, solved in closed form, is the best <em>linear</em> autoencoder of the same latent
size.</p>
<h2>What is what</h2>
{markup.table(_WHAT, "words")}"""


_WHAT = [
    ["", "what it is", "a 256x256 image becomes", "trained on"],
    ["small", "the autoencoder in this package", "8x8x32", "150 photographs (its README.md)"],
    ["tiny", "an autoencoder of 1.5 M parameters", "16x16x32", "9 photographs, by this command"],
    ["PCA", "the best linear autoencoder", "as the model beside it", "the same photographs"],
    ["UViT", "a diffusion model", "on tiny's latents", "crops of the 9 photographs"],
]


def _phases(workdir: str, rows: Scores, shown: dict[str, list[np.ndarray]]) -> str:
    """What the three phases did to `tiny`."""
    curves = [_curve(workdir, "loss", "training loss (L1)"), _curve(workdir, "psnr", "PSNR, dB")]
    third = files.read_rows(os.path.join(workdir, "phase3"))
    gan = {
        "logits_real": "logits on real",
        "logits_fake": "logits on fake",
        "gan_accuracy": "accuracy",
    }
    lines = [(gan[k], markup.points(third, k)) for k in gan]
    curves.append(markup.curves(lines, "phase 3: the discriminator"))
    images = "".join(
        f"<h3>{size} pixels</h3><p class='cap'>photograph | {' | '.join(PHASES)} | four times "
        "the change of phase 3, on grey: the texture that it learned</p>"
        + markup.png(files.image_grid(columns(c), tile=256), "reconstructions")
        for size, c in shown.items()
    )
    return f"""<h2>An autoencoder, trained in three phases</h2>
<p>The model <code>tiny</code> (16 pixels per side of a latent position, 32 channels), on the
photographs inside scikit-image and scikit-learn but those two.</p>
{markup.scores(rows)}
<p>Phase 1 trains everything at low resolution; phase 2 the middle of the model at higher
resolution; phase 3 the decoder's head with a discriminator, which trades some PSNR for
texture.</p>
{"".join(curves)}{images}"""


def _diffusion(workdir: str, samples: diffusion.Samples) -> str:
    """Samples of the diffusion models on tiny's latents."""
    uvit, few = (
        files.read_rows(os.path.join(workdir, run)) for run in (diffusion.RUN, diffusion.FEW)
    )
    gap = np.full_like(samples.crops[0], 255)
    grid = files.image_grid([*samples.crops, gap, *samples.images], tile=64)
    classes = ", ".join(name.rpartition(".")[0] for name in samples.classes)
    groups = " | ".join(f"{d.name}, {d.steps}" for d in samples.drawn)
    return f"""<h2>Diffusion on its latents</h2>
<p>A tiny UViT is trained with SiT's objective on the latents of {samples.known} crops of each
photograph, 4x4 positions for 64x64 pixels; each photograph is a class. Rows are classes, from the
top: {classes}. Left: {diffusion.SHOWN[0]} crops as the autoencoder reconstructs them. Right:
samples with guidance.</p>
{markup.png(grid, "crops and samples of each class")}
<p>The nearest neighbour among {diffusion.NEIGHBOURS} training crops per class, in the autoencoder's
latents, has the same class for {samples.held_out:.1%} of the crops unseen in training, and for
{samples.sampled:.1%} of the samples: {samples.sampled / samples.held_out:.2f} times as often.</p>
{markup.curves([("", markup.points(uvit, "loss"))], "UViT: training loss")}
<h2>In one to four steps</h2>
<p>The same network, trained further on average velocities (docs/fewstep.md): it jumps from noise to
data in one to four evaluations, with its guidance folded in, where the flow model evaluates itself
twice per step. For contrast, one step of the flow model.</p>
{markup.table(diffusion.table(samples))}
<p class='cap'>model, steps: {groups}</p>
{markup.png(samples.few_grid, "samples by number of steps")}
{markup.curves([("", markup.points(few, "mse"))], "few-step UViT: error of the velocity")}"""


def _curve(workdir: str, key: str, title: str) -> str:
    rows = [(p, files.read_rows(os.path.join(workdir, p))) for p in PHASES]
    return markup.curves([(p, markup.points(r, key)) for p, r in rows], title)


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
