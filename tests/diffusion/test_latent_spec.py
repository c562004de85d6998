# SPDX-License-Identifier: Apache-2.0
"""What latents fix of a model's configuration, in numbers of the published autoencoders."""

import pytest

from dcae_jax.config.schema import Model
from dcae_jax.diffusion.latent_spec import LatentSpec, check_autoencoder
from dcae_jax.errors import UserError

MANIFEST = {
    "latent_size": 8,
    "latent_channels": 32,
    "num_classes": 10,
    "scaling_factor_multiplies_latent": 0.5,
    "encoder_checksum": "abc",
    "autoencoder": "runs/a",
}


def test_a_variant_fixes_what_its_latents_would():
    """Catches a size multiplied by the compression, classes that are not ImageNet's by default,
    and a factor other than the published one, or 0 where none is published."""
    assert LatentSpec.of_variant("dc-ae-f64c128-in-1.0", 512, 0) == LatentSpec(8, 128, 1000, 0.2889)
    assert LatentSpec.of_variant("tiny", 64, 7) == LatentSpec(4, 32, 7, 1.0)
    with pytest.raises(UserError, match="resolution=96 is not a multiple of 64"):
        LatentSpec.of_variant("f64c128", 96, 0)


def test_open_keys_are_filled_and_others_must_agree():
    """Catches a key that is overwritten in silence, more classes refused, or fewer taken."""
    spec = LatentSpec.of_manifest(MANIFEST)
    assert spec == LatentSpec(8, 32, 10, 0.5)
    model = Model(latent_size=8, num_classes=11, depth=3)
    done = spec.completed(model, "x")
    assert (done.latent_size, done.latent_channels, done.num_classes) == (8, 32, 11)
    assert (done.scaling_factor, done.depth) == (0.5, 3)
    assert spec.completed(Model(), "x").num_classes == 10
    wrong = {"latent_size": 16, "latent_channels": 64, "num_classes": 9, "scaling_factor": 1.0}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=f"model.{key}={value} does not fit here, which has"):
            spec.completed(Model(**{key: value}), "here")


def test_latents_know_the_autoencoder_that_made_them():
    """Catches latents decoded by another autoencoder than the one that encoded them."""
    check_autoencoder(MANIFEST, "runs/a", "abc")
    with pytest.raises(UserError, match="autoencoder='runs/b' did not make these latents .runs/a"):
        check_autoencoder(MANIFEST, "runs/b", "abd")
