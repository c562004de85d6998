# SPDX-License-Identifier: Apache-2.0
"""The demo's page and its linear baseline; the demo itself is `make demo`."""

import base64
import re

import numpy as np
from PIL import Image

from dcae_jax import files
from dcae_jax.demo import diffusion, shipped
from dcae_jax.demo import page as page_lib


def test_the_page_stands_alone_and_shows_every_figure(tmp_path):
    """Catches a page that links to files beside it, or drops a phase or a curve."""
    for phase in page_lib.PHASES:
        for step in (1, 2, 3):
            values = {"loss": 1 / step, "psnr": 20.0 + step, "logits_real": 0.1 * step}
            files.append_row(str(tmp_path / phase), step, values)
    rows = [("PCA", {"psnr_64": 29.123}), ("after phase 1", {"psnr_64": 23.456})]
    crops = np.zeros((2, 4, 4, 3), np.uint8)
    files.append_row(str(tmp_path / diffusion.RUN), 1, {"loss": 1.0})
    files.append_row(str(tmp_path / diffusion.FEW), 1, {"mse": 1.0})
    drawn = tuple(
        diffusion.Drawn(name, steps, hit, 0.0123, crops)
        for name, steps, hit in (("few-step", 1, 0.4), ("flow", 30, 0.6))
    )
    samples = diffusion.Samples(
        ("cat.png", "rocket.jpg"), 200, [crops], [crops], 0.8, crops[0], drawn
    )
    first = shipped.Shipped(
        [("PCA (f32)", {"psnr_512": 27.321}), ("small (f32)", {"psnr_512": 28.765})],
        {512: [crops] * 3},
    )
    sections = [
        page_lib._opening(first),
        page_lib._phases(str(tmp_path), rows, {"64": [crops] * 4}),
        page_lib._diffusion(str(tmp_path), samples),
        page_lib._taken(90.0),
    ]
    path = page_lib.write_page(str(tmp_path), sections)
    page = open(path, encoding="utf-8").read()
    assert "27.321" in page and "28.765" in page and page.index("<img") < page.index("<table")
    assert "29.123" in page and "23.456" in page and "1.5 minutes" in page
    drawn = []
    for image in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        axes, _, legend = base64.b64decode(image).partition(b'id="legend_1"')
        drawn.append((axes.count(b'id="curve"'), legend.count(b"<!-- ")))
    assert drawn == [(3, 3), (3, 3), (1, 1), (1, 0), (1, 0)], drawn
    assert "few-step, 1 | flow, 30" in page and "0.50" in page and "0.0123" in page
    assert "cat, rocket" in page and "80.0%" in page and "60.0%" in page and "0.75 times" in page
    assert "data:image/png;base64," in page and "src='http" not in page and "href" not in page


def test_the_grid_shows_what_phase_3_changed():
    """Catches the difference to the photograph, or of the other phases, under that heading."""
    photo, one, two, three = (np.full((1, 2, 2, 3), v, np.uint8) for v in (9, 50, 100, 100))
    three[0, 0, 0] += 5
    *first, change = page_lib.columns([photo, one, two, three])
    assert [c[0, 0, 0, 0] for c in first] == [9, 50, 100, 105]
    assert (change[0, 0, 0] == 128 + 4 * 5).all() and (change[0, 1] == 128).all()


def test_the_overview_has_each_image_under_its_caption(tmp_path):
    """Catches the smaller size, PCA shown as the model, and a photograph left out."""
    at_512 = [
        np.stack([np.full((8, 8, 3), v + i, np.uint8) for i in (0, 30)]) for v in (9, 90, 170)
    ]
    rows = [("PCA", {"psnr_512": 27.0}), ("small", {"psnr_512": 28.0})]
    first = shipped.Shipped(rows, {256: [np.zeros((2, 8, 8, 3), np.uint8)] * 3, 512: at_512})
    page_lib.write_overview(str(tmp_path), first)
    pixels = np.asarray(Image.open(tmp_path / "overview.jpg").convert("L")).astype(int)
    for row, added in ((100, 0), (500, 30)):
        found = pixels[row, [100, 450, 800]]
        np.testing.assert_allclose(found, [9 + added, 90 + added, 170 + added], atol=3)


def test_a_neighbour_is_found_by_mean_and_deviation_of_channels():
    """Catches classes distinguished by position, or by the mean alone."""
    rng = np.random.default_rng(0)
    known = rng.standard_normal((40, 4, 4, 3)).astype(np.float32)
    labels = np.arange(40) % 2
    known[labels == 1] *= 4  # the same mean, another deviation
    moved = known.reshape(40, 16, 3)[:, rng.permutation(16)].reshape(known.shape)
    np.testing.assert_array_equal(diffusion.nearest(known, labels, moved), labels)
