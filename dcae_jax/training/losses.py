# SPDX-License-Identifier: Apache-2.0
"""Losses of the autoencoder and its discriminator; all float32, whatever the models' dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from dcae_jax.config import Config
from dcae_jax.config.schema import Distill, Loss
from dcae_jax.models import lpips
from dcae_jax.models.weights import Array, Weights

# (output, images, LPIPS weights) -> scalar; both batches are [B, H, W, 3] in [-1, 1].
ReconstructionTerm = Callable[[Array, Array, Weights], Array]


def reconstruction_terms(loss: Loss) -> dict[str, tuple[ReconstructionTerm, float]]:
    """The terms of the reconstruction loss, {name of its metric: (function, weight)}.

    A new term is one function and one weight in config.loss. Costly terms of weight 0 are skipped;
    L1 is always reported.
    """
    terms: dict[str, tuple[ReconstructionTerm, float]] = {
        "l1": (lambda output, images, _: l1(output, images), loss.l1_weight)
    }
    if loss.lpips_weight:
        terms["lpips"] = (
            lambda output, images, weights: perceptual(weights, output, images),
            loss.lpips_weight,
        )
    return terms


def distillation_terms(distill: Distill) -> dict[str, tuple[ReconstructionTerm, float]]:
    """The terms of the loss between a student's images and its teacher's, as above."""
    terms = reconstruction_terms(Loss(distill.l1_weight, distill.lpips_weight))
    return {f"teacher_{name}": term for name, term in terms.items()}


def uses_lpips(config: Config) -> bool:
    """Whether training needs the weights of LPIPS."""
    weights = config.loss.lpips_weight, config.distill.lpips_weight
    return not config.objective and any(weights)


def l1(x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]) -> Float32[Array, ""]:
    """Mean absolute difference of two batches of images in [-1, 1], a scalar."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def psnr(x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]) -> Float32[Array, ""]:
    """PSNR in dB over a batch of images in [-1, 1], without 8-bit rounding: for training curves.

    The reported metric is `metrics.psnr`: per image, on 8-bit levels.
    """
    error = jnp.mean(jnp.square(jnp.clip(x, -1, 1) - y.astype(jnp.float32)))
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def perceptual(
    weights: Weights, x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]
) -> Float32[Array, ""]:
    """Mean LPIPS (VGG16, v0.1) of two batches of images in [-1, 1], a scalar.

    Runs at JAX's default precision; the reported LPIPS uses the highest.
    """
    return jnp.mean(lpips.distance(weights, x, y, net="vgg", precision=None))


def hinge(real: Float[Array, "B h w"], fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """The discriminator's hinge loss on its logits: 1 at chance, 0 once all pass +-1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def generator_hinge(fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """The generator's side of the hinge loss: minus the mean logit of its outputs."""
    return -jnp.mean(fake)


def adaptive_weight(
    reconstruction_norm: Float[Array, ""], gan_norm: Float[Array, ""], limit: float
) -> Float[Array, ""]:
    """The factor that scales the GAN loss to the reconstruction loss (Esser et al. 2021).

    The norms are those of the two losses' gradients at the last layer's kernel. `limit` bounds the
    factor: the ratio explodes when the discriminator is confident.
    """
    return jnp.clip(reconstruction_norm / (gan_norm + 1e-6), 0, limit)
