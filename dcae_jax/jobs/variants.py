# SPDX-License-Identifier: Apache-2.0
"""Lists the models that --config=FILE:VARIANT can name.

    dcae-jax models                  autoencoders and diffusion models, with their parameters
    dcae-jax models --diffusion      diffusion models only

Parameters of a diffusion model are counted for f32c32 latents at 512 pixels (16x16x32, one token
per position) and ImageNet's 1000 classes.
"""

import dataclasses
import functools
import math
import sys

from dcae_jax import files, models
from dcae_jax.config.schema import Model
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import AutoencoderModule, BackboneModule
from dcae_jax.runtime import process

# Latents for which the parameters of a backbone are counted.
LATENTS = Model(latent_size=16, latent_channels=32, num_classes=1000)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax models", __doc__)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--autoencoders", action="store_true", help="list only autoencoders")
    kinds.add_argument("--diffusion", action="store_true", help="list only diffusion models")
    given = parser.parse_args(arguments)
    if not given.diffusion:
        head = ["autoencoder", "parameters", "f", "channels", "scaling factor", "published as"]
        rows = [row for module in models.autoencoders() for row in autoencoder_rows(module)]
        sys.stdout.write(files.table([head, *rows]) + "\n")
    if not given.diffusion and not given.autoencoders:
        sys.stdout.write("\n")
    if not given.autoencoders:
        head = ["diffusion", "VARIANT", "depth", "width", "heads", "parameters"]
        rows = [row for module in models.backbones() for row in backbone_rows(module)]
        sys.stdout.write(files.table([head, *rows]) + "\n")
    return process.DONE


def autoencoder_rows(module: AutoencoderModule) -> list[list[object]]:
    """Rows for an autoencoder module: one per published name, or one for an unpublished variant.

    f: pixels per side of a latent position. The scaling factor is that of the published weights;
    '-' if there is none.
    """
    bases = {name: base for name, (base, _) in getattr(module, "PUBLISHED", {}).items()}
    rows: list[list[object]] = []
    for name, arch in module.VARIANTS.items():
        config, rest = Model(variant=name), {"platform": "tpu", "remat": False, "dtype": "float32"}
        create = functools.partial(module.create, config, **rest)
        _, params, _ = weights_lib.split(weights_lib.abstract(lambda r, make=create: make(rngs=r)))
        count = sum(leaf.size for leaf in params.values())
        for published in [n for n, base in bases.items() if base == name] or [name]:
            scale = str(module.variant(published).scaling_factor or "-")  # every digit counts
            of_weights = published if published in bases else "-"
            rows.append([name, count, arch.compression, arch.latent_channels, scale, of_weights])
    return rows


def backbone_rows(module: BackboneModule) -> list[list[object]]:
    """One row per variant of a backbone module."""
    rows: list[list[object]] = []
    for name, row in module.VARIANTS.items():
        config = dataclasses.replace(LATENTS, variant=name)
        arch = module.architecture(config, patch_size=1, learn_sigma=False)
        count = sum(math.prod(shape) for shape in module.shapes(arch).values())
        rows.append([models.name_of(module), name, row.depth, row.width, row.heads, count])
    return rows
