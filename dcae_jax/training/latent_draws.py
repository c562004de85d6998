# SPDX-License-Identifier: Apache-2.0
"""What a step draws for its latents: how many channels to keep, and a transform.

Structured latents and augmented diffusion (DC-AE 1.5, arXiv:2508.00413) train on the first c' of c
channels. EQ-VAE (arXiv:2502.09509) decodes a transformed latent to the transformed image. The draws
are functions of (seed, step) alone: all devices, processes and microbatches share them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, Shaped

from dcae_jax.config.schema import Loss
from dcae_jax.models import layers
from dcae_jax.models.weights import Array

# Numbers for `fold_in`, far from those of `split`.
CHANNELS, TRANSFORM = 2**30, 2**30 + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentDraws:
    """The draws of one step; a field is None where the configuration asks for none."""

    channels: Array | None = None  # [n] int32: channels kept in each of n passes of the batch
    scale: Array | None = None  # 0: no transform, else 1 + its index in `scales`
    turn: Array | None = None  # quarter turns of the transform, 0..3

    @property
    def metrics(self) -> dict[str, Array]:
        """Mean number of channels; 1 where the latents were transformed."""
        found = {}
        if self.channels is not None:
            found["channels"] = jnp.mean(self.channels.astype(jnp.float32))
        if self.scale is not None:
            found["transformed"] = (self.scale > 0).astype(jnp.float32)
        return found


def channel_counts(
    choices: tuple[int, ...], count: int, last: int | None, key: Key[Array, ""]
) -> Int[Array, " n"] | None:
    """`count` draws from `choices` for the step with this key; None without choices.

    last: takes the place of the last draw; None: that one is drawn too.
    """
    if not choices:
        return None
    key = jax.random.fold_in(key, CHANNELS)
    number = jax.random.randint(key, (count,), 0, len(choices))
    counts = jnp.asarray(choices, jnp.int32)[number]
    return counts if last is None else counts.at[-1].set(last)


def transform(
    probability: float, scales: int, key: Key[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]] | tuple[None, None]:
    """(scale, turn) of `LatentDraws` for the step with this key; scales: how many there are."""
    if not probability:
        return None, None
    keys = jax.random.split(jax.random.fold_in(key, TRANSFORM), 3)
    drawn = jax.random.uniform(keys[0]) < probability
    scale = jnp.where(drawn, 1 + jax.random.randint(keys[1], (), 0, scales), 0)
    return scale, jax.random.randint(keys[2], (), 0, 4)


def repeated(
    x: Shaped[Array, "B ..."], channels: Int[Array, " n"] | None
) -> tuple[Shaped[Array, "Bn ..."], Int[Array, " Bn"] | None]:
    """(x with each example n times, the number of channels of each): one batch for all draws.

    Copies of an example are neighbours, so each device keeps its own. None: x as it is.
    """
    if channels is None:
        return x, None
    return jnp.repeat(x, len(channels), axis=0), jnp.tile(channels, x.shape[0])


def latents(
    encode: Callable[[Array], Array],
    images: Float[Array, "B H W 3"],
    draws: LatentDraws,
    scale: float | None,
) -> tuple[Float[Array, "Bn h w c"], Float[Array, "Bn H W 3"]]:
    """(latents to decode, their targets): those of `images`, changed as `draws` asks for.

    scale: of the transform; None: no transform.
    """
    if draws.channels is None and scale is None:
        return encode(images), images
    z, channels = repeated(encode(images), draws.channels)  # [Bn, H/f, W/f, c]
    targets, _ = repeated(images, draws.channels)
    if channels is not None:
        z = layers.first_channels(z, channels)
    if scale is not None:
        assert draws.turn is not None
        z, targets = (transformed(x, scale, draws.turn) for x in (z, targets))
    return z, targets


def transformed(
    x: Float[Array, "B H W C"], scale: float, turn: Int[Array, ""]
) -> Float[Array, "B h w C"]:
    """Square x, resized by `scale` (linear, with antialiasing) and turned by turn * 90 degrees."""
    if scale != 1:
        size = round(x.shape[1] * scale)
        x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "linear")
    turns = [lambda x, k=k: jnp.rot90(x, k, (1, 2)) for k in range(4)]
    return jax.lax.switch(turn, turns, x)


def scales(loss: Loss, size: int, compression: int) -> tuple[float, ...]:
    """Scales of the transforms of images of `size` pixels: those that leave a multiple of f.

    (1.0,), only turns, without loss.equivariance_scales; () if none of them fits.
    """
    given = loss.equivariance_scales or (1.0,)
    return tuple(s for s in given if s * size >= compression and s * size % compression == 0)
