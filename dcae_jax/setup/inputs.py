# SPDX-License-Identifier: Apache-2.0
"""Digests of a run's input files, which may change between a kill and a resume."""

import hashlib
import json
import os

from dcae_jax import files
from dcae_jax.config import Config
from dcae_jax.data import contents, sources
from dcae_jax.data.latents import Latents
from dcae_jax.data.sources import ImageSource
from dcae_jax.training import losses

# Keys that name inputs: if one was changed on purpose, so was the content of its section.
NAMES = ("source", "path", "parts", "name", "split", "data_dir", "held_out_path", "lpips_weights")


def digests(config: Config, source: ImageSource | Latents, teacher: str = "") -> dict[str, str]:
    """{key: digest of the input}, each key beginning with its section, as allow_change needs it.

    Images are represented by the names and sizes of their files, latents by their manifest, which
    has digests of the shards and the encoder: no data set is read. Weights of metric networks are
    left out. teacher: checksum of the weights of distill.teacher.
    """
    found = {}
    if isinstance(source, Latents):
        manifest = source.manifest
        found["data.encoder"] = f"weights {_short(manifest['encoder_checksum'])}"
        shards = hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode())
        found["data.content"] = f"{len(source):,} crops, {_short(shards.hexdigest())}"
    else:
        found["data.content"] = f"{len(source):,} images, index {_short(contents.index(source))}"
        if config.data.source in sources.FILES and config.data.held_out_path:
            held_out = sources.held_out_source(config.data)
            found["data.held_out_content"] = (
                f"{len(held_out):,} images, index {_short(contents.index(held_out))}"
            )
    path = files.local(config.loss.lpips_weights)
    if losses.uses_lpips(config) and os.path.isfile(path):
        found["loss.lpips_content"] = f"sha256 {_short(files.sha256(path))}"
    if teacher:
        found["distill.content"] = f"weights {_short(teacher)}"
    return found


def _short(digest: str) -> str:
    return digest[:16]
