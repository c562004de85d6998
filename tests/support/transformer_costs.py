# SPDX-License-Identifier: Apache-2.0
"""Sizes of UViT and DiT by hand: parameters and multiply-adds."""

import math

from dcae_jax.models import transformer, uvit
from dcae_jax.models.transformer import Architecture


def num_parameters(module, arch: Architecture) -> int:
    """Of `module`, uvit or dit."""
    return sum(math.prod(shape) for shape in module.shapes(arch).values())


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of one block's attention and MLP for one sample.

    The products of queries with keys and of weights with values count.
    """
    matrices = (3 + 1 + 2 * transformer.MLP_RATIO) * width**2
    return tokens * matrices + 2 * tokens**2 * width


def uvit_macs(arch: Architecture) -> int:
    """Multiply-adds of the matrix products of one forward pass of one sample."""
    width, tokens = arch.width, uvit.tokens(arch)
    patch = arch.patch_size**2 * (arch.latent_channels + arch.out_channels)
    return (
        (arch.depth + 1) * block_macs(tokens, width)
        + arch.depth // 2 * tokens * 2 * width**2  # skips
        + arch.patches * width * patch  # embedding and prediction
    )


def dit_macs(arch: Architecture) -> int:
    """Multiply-adds of the matrix products of one forward pass of one sample."""
    width = arch.width
    patch = arch.patch_size**2 * (arch.latent_channels + arch.out_channels)
    return (
        arch.depth * block_macs(arch.patches, width)
        + (6 * arch.depth + 2) * width**2  # modulation
        + transformer.FREQUENCIES * width
        + width**2  # the time's MLP
        + arch.patches * width * patch  # embedding and prediction
    )
