# SPDX-License-Identifier: Apache-2.0
"""DiT and SiT under the names of DiT's and of DC-AE's repositories."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcae_jax.errors import UserError
from dcae_jax.models import dit, torch_layout, transformer
from dcae_jax.models.dit import Architecture

TITLE = "DiT"
FIRST = "x_embedder.proj.weight"  # a tensor that no other model has
# Objective -> what the authors call the model trained on it.
KINDS = {"learned_sigma": "dit", "flow": "sit"}

_POSITIONS = "pos_embed"  # stored there, computed here

_TABLE = torch_layout.linear_table(
    {
        "x_embedder": "x_embedder.proj",
        "t_embedder.fc1": "t_embedder.mlp.0",
        "t_embedder.fc2": "t_embedder.mlp.2",
        "y_embedder": "y_embedder.embedding_table",
        "final_layer.adaLN_modulation.linear": "final_layer.adaLN_modulation.1",
        "final_layer.linear": "final_layer.linear",
        "blocks.*.adaLN_modulation.linear": "blocks.{}.adaLN_modulation.1",
        "blocks.*.attn.qkv": "blocks.{}.attn.qkv",
        "blocks.*.attn.proj": "blocks.{}.attn.proj",
        "blocks.*.mlp.fc1": "blocks.{}.mlp.fc1",
        "blocks.*.mlp.fc2": "blocks.{}.mlp.fc2",
    }
)


def to_torch(
    weights: Mapping[str, Any], arch: Architecture, prefix: str = ""
) -> dict[str, np.ndarray]:
    """{our path: array} -> {prefix + name in DiT's and DC-AE's repositories: float32 array}.

    The positions are among them.
    """
    out = torch_layout.to_torch(weights, _TABLE, dit.shapes(arch))
    out[_POSITIONS] = dit.positions(arch.latent_size // arch.patch_size, arch.width)[None]
    return {prefix + name: value for name, value in out.items()}


def from_torch(
    tensors: Mapping[str, Any], arch: Architecture, prefix: str = ""
) -> dict[str, np.ndarray]:
    """{prefix + name in DiT's or DC-AE's repository: array} -> {our path: float32 array}.

    Names without the prefix are passed over; the positions may be left out. Raises UserError, in
    one line with the first names, when a tensor is missing, unknown or misshapen, and where the
    positions are not those of `dit.positions`.
    """
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    found = own.pop(_POSITIONS, None)
    weights = torch_layout.from_torch(
        own, _TABLE, dit.shapes(arch), lambda found: f"these are not weights of the DiT {arch}"
    )
    if found is not None:
        here = dit.positions(arch.latent_size // arch.patch_size, arch.width)[None]
        # Half precision rounds them by up to 2^-9.
        if here.shape != found.shape or np.abs(np.asarray(found, np.float32) - here).max() > 4e-3:
            raise UserError(
                f"{_POSITIONS} {tuple(found.shape)} is not the sin-cos table of "
                f"{here.shape[1]} patches; only DiT's fixed positions are supported"
            )
    return weights


def recognise(tensors: Mapping[str, Any], heads: int, prefix: str = "") -> Architecture | None:
    """The architecture whose weights these are, read off the shapes; None if they are no DiT's.

    heads: 0 takes those of the variant that has the width; no tensor tells them. latent_size is
    0 where the positions are left out. Raises UserError where the shapes are no DiT's that this
    file can build.
    """
    own = {
        k.removeprefix(prefix): tuple(v.shape) for k, v in tensors.items() if k.startswith(prefix)
    }
    labels = "y_embedder.embedding_table.weight"
    ranks = {FIRST: 4, "final_layer.linear.weight": 2, labels: 2}
    if _POSITIONS in own:
        ranks[_POSITIONS] = 3
    if not torch_layout.has(own, ranks):
        return None
    width, channels, patch, _ = own[FIRST]
    count = own[_POSITIONS][1] if _POSITIONS in own else 0
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError(f"{_POSITIONS} is {own[_POSITIONS]}: only square latents are supported")
    return Architecture(
        depth=sum(bool(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)) for name in own),
        width=width,
        heads=heads or transformer.heads_of(width, dit.VARIANTS),
        latent_size=side * patch,
        latent_channels=channels,
        out_channels=own["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        num_classes=own[labels][0] - 1,
    )
