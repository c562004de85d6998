# SPDX-License-Identifier: Apache-2.0
"""Lists the models that --config=FILE:VARIANT can name, and those in folders of yours.

    dcae-jax models                  autoencoders and diffusion models, with their parameters
    dcae-jax models --diffusion      diffusion models only
    dcae-jax models runs exports     what --model and load_autoencoder can load from there

The size is that of float32 weights. A published name is a model of mit-han-lab on the Hugging Face
hub (docs/weights.md); its weights are not part of this package, and have a licence of their own.
"this package": --model and load_autoencoder take the variant's name, without a download.
Parameters of a diffusion model are counted for f32c32 latents at 512 pixels (16x16x32, one token
per position) and ImageNet's 1000 classes.
"""

import dataclasses
import functools
import math
import os
import re
import sys

from dcae_jax import files, models
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import AutoencoderModule, BackboneModule
from dcae_jax.runtime import process

# Latents for which the parameters of a backbone are counted.
LICENCES = {"dc-ae-f32c32-sana-1.1": "MIT"}  # as stated on the hub; others: see there
WEIGHTS = re.compile(r"\.(safetensors|pth?|bin|ckpt)\b")  # in file names
LATENTS = Model(latent_size=16, latent_channels=32, num_classes=1000)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax models", __doc__)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--autoencoders", action="store_true", help="list only autoencoders")
    kinds.add_argument("--diffusion", action="store_true", help="list only diffusion models")
    parser.add_argument("folders", nargs="*", help="list the models below these folders instead")
    given = parser.parse_args(arguments)
    if given.folders:
        rows = [row for folder in given.folders for row in local_rows(os.path.expanduser(folder))]
        head = ["model", "kind", "step", "weights"]
        sys.stdout.write(files.table([head, *rows]) + "\n")
        return process.DONE
    if not given.diffusion:
        head = ["autoencoder", "parameters", "f", "channels", "scaling factor", "published as"]
        head += ["size", "licence"]
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
    """Rows for an autoencoder module: one per published name, or one for another variant.

    f: pixels per side of a latent position. The scaling factor is that of the weights named;
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
            of_weights, licence = "-", "-"
            if published in bases:
                of_weights, licence = published, LICENCES.get(published, "see the hub")
            elif name in checkpoint_weights.shipped():
                of_weights, licence = "this package", "Apache-2.0"
                where = os.path.join(checkpoint_weights.SHIPPED, name, checkpoint_weights.EXPORT)
                scale = str((files.read_object(where) or {}).get("scaling_factor") or "-")
            row = [name, count, arch.compression, arch.latent_channels, scale, of_weights]
            rows.append([*row, megabytes(4 * count), licence])
    return rows


def local_rows(folder: str) -> list[list[object]]:
    """Rows for the models in and below a folder. Raises UserError if there are none."""
    rows: list[list[object]] = []
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in (checkpoints.FOLDER, "params"))
        if not {checkpoints.CONFIG, checkpoint_weights.EXPORT} & set(names):
            continue
        steps = checkpoints.saved_steps(parent)
        if not (steps or checkpoint_weights.EXPORT in names or WEIGHTS.search(" ".join(names))):
            continue  # a run that has saved nothing yet
        try:
            kind = checkpoint_weights.kind_of(parent)
        except UserError:  # weights of another kind of model
            continue
        where = parent
        if steps:
            where = os.path.join(checkpoints.step_folder(parent, steps[-1]), "weights")
        size = sum(files.size(os.path.join(where, name)) or 0 for name in files.walk(where))
        rows.append([parent, kind, str(steps[-1]) if steps else "-", megabytes(size)])
    if not rows:
        raise UserError(f"{folder!r} holds no model; name a folder of workdirs or exports")
    return rows


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def backbone_rows(module: BackboneModule) -> list[list[object]]:
    """One row per variant of a backbone module."""
    rows: list[list[object]] = []
    for name, row in module.VARIANTS.items():
        config = dataclasses.replace(LATENTS, variant=name)
        arch = module.architecture(config, patch_size=1, learn_sigma=False)
        count = sum(math.prod(shape) for shape in module.shapes(arch).values())
        rows.append([models.name_of(module), name, row.depth, row.width, row.heads, count])
    return rows
