# SPDX-License-Identifier: Apache-2.0
"""DiT and SiT under the weight names of the DiT and DC-AE repositories."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcae_jax.errors import UserError
from dcae_jax.models import dit, torch_layout, transformer
from dcae_jax.models.dit import Architecture

TITLE = "DiT"
FIRST = "x_embedder.proj.weight"  # a tensor that no other model has
# Objective -> the authors' name for a model trained on it.
KINDS = {"learned_sigma": "dit", "flow": "sit"}

_LABELS, _LAST = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
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

    Includes the positions.
    """
    out = torch_layout.to_torch(weights, _TABLE, dit.shapes(arch))
    out[_POSITIONS] = dit.positions(arch.latent_size // arch.patch_size, arch.width)[None]
    return {prefix + name: value for name, value in out.items()}


def from_torch(
    tensors: Mapping[str, Any], arch: Architecture, prefix: str = ""
) -> dict[str, np.ndarray]:
    """{prefix + name in DiT's or DC-AE's repository: array} -> {our path: float32 array}.

    Names without the prefix are ignored; the positions may be missing. Raises UserError, in one
    line with the first names, if a tensor is missing, unknown or misshapen, or if the positions
    differ from `dit.positions`.
    """
    own = torch_layout.below(tensors, prefix)
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
    """The architecture of these weights, inferred from their shapes; None if they are not a DiT's.

    heads: see `transformer.architecture_of`. Raises UserError if this file cannot build a DiT of
    these shapes.
    """
    own = {k: tuple(v.shape) for k, v in torch_layout.below(tensors, prefix).items()}
    ranks = {FIRST: 4, _LAST: 2, _LABELS: 2} | ({_POSITIONS: 3} if _POSITIONS in own else {})
    if not torch_layout.has(own, ranks):
        return None
    return transformer.architecture_of(
        own,
        embed=FIRST,
        labels=_LABELS,
        predict=_LAST,
        depth=sum(bool(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)) for name in own),
        extras=0,
        heads=heads,
        variants=dit.VARIANTS,
    )
