# SPDX-License-Identifier: Apache-2.0
"""The linear baseline."""

import numpy as np
from sklearn.decomposition import PCA as Solver

from dcae_jax.config.schema import Evaluate
from dcae_jax.data import sources
from dcae_jax.demo import pca


def test_pca_is_the_best_linear_code_of_its_size():
    """Catches a baseline that is too weak: with as many numbers as pixels it is exact, with fewer
    it is worse."""
    settings = Evaluate(count=8, crops=32, resolutions=(32,))
    known, held_out = sources.photos(), sources.photos(sources.HELD_OUT_PHOTOS)
    few, more, exact = (
        pca.scores(pca.fit(known, 4, n, 5000).reconstruct, settings, held_out)["psnr_32"]
        for n in (2, 12, 48)
    )
    assert few < more < exact and exact > 50


def test_pca_of_patches_is_scikit_learns():
    """Catches patches cut or put back in another order, and a mean left out."""
    known = sources.photos()
    ours = pca.fit(known, 8, 16, 2000)
    x = np.asarray(known[0][0])[None, :64, :48]
    cut = [x[0, i : i + 8, j : j + 8].reshape(-1) for i in range(0, 64, 8) for j in range(0, 48, 8)]
    solver = Solver(16)
    solver.mean_, solver.components_ = ours.mean, ours.components
    theirs = solver.inverse_transform((np.stack(cut) - ours.mean) @ ours.components.T)
    theirs = theirs.reshape(8, 6, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(x.shape)
    np.testing.assert_allclose(ours.reconstruct(x), theirs.clip(0, 255), atol=0.51)
