# SPDX-License-Identifier: Apache-2.0
"""Losses against their formulas, in numbers that one can check by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax.training import losses


def test_hinge_by_its_formula():
    """Catches swapped signs, with which the discriminator learns to be wrong."""
    real, fake = jnp.asarray([[[2.0, 0.5]]]), jnp.asarray([[[-3.0, 0.0]]])
    assert float(losses.hinge(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
    assert float(losses.hinge(-real, -fake)) > 1
    assert float(losses.generator_hinge(fake)) == 1.5


def test_the_adaptive_weight_is_bounded():
    """Catches the ratio of gradient norms exploding when the discriminator's gradient vanishes."""
    assert float(losses.adaptive_weight(jnp.asarray(3.0), jnp.asarray(2.0), 10.0)) == (
        pytest.approx(1.5, rel=1e-4)
    )
    assert float(losses.adaptive_weight(jnp.asarray(3.0), jnp.asarray(0.0), 10.0)) == 10.0


def test_l1_and_psnr_by_their_formulas():
    """Catches a sum in place of a mean, a peak of 1 in place of 2, and outputs not clipped."""
    x = jnp.asarray([[[[0.5] * 3], [[-3.0] * 3]]])
    y = jnp.asarray([[[[0.3] * 3], [[-1.0] * 3]]])
    assert float(losses.l1(x, y)) == pytest.approx((0.2 + 2) / 2)
    assert float(losses.psnr(x, y)) == pytest.approx(10 * np.log10(4 / (0.04 / 2)), rel=1e-5)


def test_a_term_of_weight_zero_is_not_computed():
    """Catches VGG16 that runs, or whose weights are asked for, in a loss without it."""
    loss = config_lib.default().loss
    loss.l1_weight, loss.lpips_weight = 0.3, 0.7
    weights = {name: weight for name, (_, weight) in losses.reconstruction_terms(loss).items()}
    assert weights == {"l1": 0.3, "lpips": 0.7}
    loss.lpips_weight = 0.0
    assert losses.reconstruction_terms(loss).keys() == {"l1"}


def test_terms_to_the_teacher_have_weights_of_their_own():
    """Catches the teacher's terms under the names, or with the weights, of those to the image."""
    config = config_lib.default()
    config.distill.teacher, config.distill.l1_weight, config.distill.lpips_weight = "t", 0.3, 0.7
    config.loss.lpips_weight = 0.0
    config = config_lib.validate(config)
    terms = losses.distillation_terms(config.distill)
    weights = {name: weight for name, (_, weight) in terms.items()}
    assert weights == {"teacher_l1": 0.3, "teacher_lpips": 0.7}
    assert losses.uses_lpips(config)
    without = config_lib.replace(config, distill={"lpips_weight": 0.0})
    assert not losses.uses_lpips(without)
    assert losses.distillation_terms(without.distill).keys() == {"teacher_l1"}
