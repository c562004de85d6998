# SPDX-License-Identifier: Apache-2.0
"""UViT and USiT under the weight names of the DC-AE and U-ViT repositories."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcae_jax.models import torch_layout, transformer, uvit
from dcae_jax.models.uvit import Architecture

TITLE = "UViT"
FIRST = "patch_embed.proj.weight"  # a tensor that no other model has
# Objective -> the authors' name for a model trained on it.
KINDS = {"epsilon": "uvit", "flow": "usit"}

_LABELS = "label_emb.embedding_table.weight"
_LABELS_BEFORE = "label_emb.weight"  # in U-ViT's own files
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def to_torch(
    weights: Mapping[str, Any], arch: Architecture, prefix: str = ""
) -> dict[str, np.ndarray]:
    """{our path: array} -> {prefix + name in DC-AE's repository: float32 array}."""
    out = torch_layout.to_torch(weights, _table(), uvit.shapes(arch))
    return {prefix + name: value for name, value in out.items()}


def from_torch(
    tensors: Mapping[str, Any], arch: Architecture, prefix: str = ""
) -> dict[str, np.ndarray]:
    """{prefix + name in DC-AE's or U-ViT's repository: array} -> {our path: float32 array}.

    Names without the prefix are ignored. Raises UserError, in one line with the first names, if
    a tensor is missing, unknown or misshapen.
    """
    cause = f"these are not weights of the UViT {arch}"
    return torch_layout.from_torch(
        _own(tensors, prefix), _table(), uvit.shapes(arch), lambda found: cause
    )


def _own(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors under `prefix`, which is removed, with old names updated."""
    own = torch_layout.below(tensors, prefix)
    return {_LABELS if name == _LABELS_BEFORE else name: value for name, value in own.items()}


def _table() -> dict[str, torch_layout.Layer]:
    """The name of each of our layers in PyTorch."""
    table = {name: name for name in ("pos_embed", "mid_block", "norm", "decoder_pred")}
    table["patch_embed"] = "patch_embed.proj"
    table["label_emb"] = "label_emb.embedding_table"
    for layer in _BLOCK:
        table[f"mid_block.{layer}"] = f"mid_block.{layer}"
    for side, own in (("in_blocks", _BLOCK), ("out_blocks", ("skip_linear", *_BLOCK))):
        table.update({f"{side}.*.{layer}": f"{side}.{{}}.{layer}" for layer in own})
    return torch_layout.linear_table(table)


def recognise(tensors: Mapping[str, Any], heads: int, prefix: str = "") -> Architecture | None:
    """The architecture of these weights, inferred from their shapes; None if they are not a UViT's.

    heads: see `transformer.architecture_of`. Raises UserError if this file cannot build a UViT of
    these shapes.
    """
    own = {name: tuple(tensor.shape) for name, tensor in _own(tensors, prefix).items()}
    ranks = {FIRST: 4, "decoder_pred.weight": 2, "pos_embed": 3, _LABELS: 2}
    if not torch_layout.has(own, ranks):
        return None
    return transformer.architecture_of(
        own,
        embed=FIRST,
        labels=_LABELS,
        predict="decoder_pred.weight",
        depth=2 * sum(bool(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", n)) for n in own),
        extras=uvit.EXTRAS,
        heads=heads,
        variants=uvit.VARIANTS,
    )
