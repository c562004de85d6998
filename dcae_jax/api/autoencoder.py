# SPDX-License-Identifier: Apache-2.0
"""TODO-DOC"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.api import tiling
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config import Config
from dcae_jax.config.schema import Model
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib

RANGE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A trained (or fresh) autoencoder on the devices of a mesh."""

    graph: nnx.GraphDef
    weights: Weights  # parameters and running statistics by path, float32
    architecture: Any  # a Variant of the model's file
    model_config: Model
    mesh: Mesh

    @property
    def compression(self) -> int:
        """Pixels a side that one latent position stands for."""
        return self.architecture.compression

    @property
    def latent_channels(self) -> int:
        return self.architecture.latent_channels

    @property
    def scaling_factor(self) -> float | None:
        """latent * scaling_factor has an rms of about 1; None where it is not known."""
        return self.architecture.scaling_factor

    @property
    def num_parameters(self) -> int:
        """Trained numbers; running statistics are not counted."""
        _, params, _ = weights_lib.split(weights_lib.merge(self.graph, self.weights))
        return sum(leaf.size for leaf in params.values())

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Latents on each side that (encode, decode) look at; None where they look at them all.

        Tiles that overlap by twice as much give what the whole gives.
        """
        return models.find(self.model_config).reach(self.architecture)

    @property
    def has_posterior(self) -> bool:
        """Whether the encoder gives a distribution, of which `encode` takes the mean."""
        return hasattr(weights_lib.merge(self.graph, self.weights), "posterior")

    def encode(
        self,
        x: Any,
        *,
        sample: bool = False,
        seed: int = 0,
        tile: int = 0,
        overlap: int | None = None,
        check: bool = False,
    ) -> Array | np.ndarray:
        """Images [B, H, W, 3] float32 in [-1, 1] -> latents [B, H/f, W/f, c] float32, unscaled.

        H and W are multiples of `compression`. With `tile`, an image of any size is encoded in
        squares of tile x tile latents that overlap by `overlap` latents (default: a quarter of the
        tile) and are blended there; the result is a NumPy array. NumPy input is checked in full; a
        jax.Array by shape and dtype only, unless `check`. With `sample`, a model that has a
        posterior (sd-vae-f8) gives a sample of it, fixed by `seed`, instead of its mean. Raises
        ValueError, naming the argument.
        """
        f = self.compression
        if sample:
            if tile or not self.has_posterior:
                what = "tiles" if tile else "a deterministic encoder"
                raise ValueError(f"sample=True does not go with {what}; leave it out")
            _check_input("x", x, 3, (f, f), check, limit=1.0)
            return self._sample(self.weights, self._place(x, f), jax.random.key(seed))
        if not tile:
            _check_input("x", x, 3, (f, f), check, limit=1.0)
            return self._encode(self.weights, self._place(x, f))
        _check_shape("x", x, 3, (f, f))
        run = functools.partial(self.encode, check=check)
        tiles = tiling.plan(tile, overlap, self.reach[0])
        return tiling.run(run, x, tiles, (f, 1), self.latent_channels)

    def decode(
        self, z: Any, *, tile: int = 0, overlap: int | None = None, check: bool = False
    ) -> Array | np.ndarray:
        """Latents [B, h, w, c], unscaled -> images [B, h*f, w*f, 3] float32, not clipped.

        Tiles, checks and errors as in `encode`.
        """
        if not tile:
            _check_input("z", z, self.latent_channels, (1, 1), check, limit=None)
            return self._decode(self.weights, self._place(z))
        _check_shape("z", z, self.latent_channels, (1, 1))
        run = functools.partial(self.decode, check=check)
        tiles = tiling.plan(tile, overlap, self.reach[1])
        return tiling.run(run, z, tiles, (1, self.compression), 3)

    @functools.cached_property
    def _encode(self):
        return jax.jit(lambda weights, x: weights_lib.merge(self.graph, weights).encode(x))

    @functools.cached_property
    def _sample(self):
        return jax.jit(
            lambda weights, x, key: weights_lib.merge(self.graph, weights).encode(x, key)
        )

    @functools.cached_property
    def _decode(self):
        def decode(weights, z):
            images = weights_lib.merge(self.graph, weights).decode(z)
            if self.mesh.shape["spatial"] == 1:
                return images
            # Also where the latents are too few to be split: the images are what takes memory.
            place = mesh_lib.image_sharding(self.mesh, images.shape, z.shape[1])
            return jax.lax.with_sharding_constraint(images, place)

        return jax.jit(decode)

    def _place(self, x: Any, f: int = 1) -> Array:
        """x, of which f rows belong to one row of latents, on the devices."""
        place = mesh_lib.image_sharding(self.mesh, x.shape, x.shape[1] // f)
        return jax.device_put(jnp.asarray(x), place)


def _check_shape(name, x, channels, multiples):
    """Raises ValueError unless x is [B, H, W, channels] floating, of sizes that divide."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise ValueError(f"{name} must be an array, not {type(x).__name__}")
    if x.dtype == np.uint8:
        raise ValueError(f"{name} is uint8; convert it: {name}.astype('float32') / 127.5 - 1")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; give float32")
    if len(shape) != 4 or shape[3] != channels or 0 in shape:
        raise ValueError(f"{name} has shape {tuple(shape)}; give [B, H, W, {channels}]")
    for size, multiple, side in zip(shape[1:3], multiples, ("height", "width"), strict=True):
        if size % multiple:
            low, high = size // multiple * multiple, -(-size // multiple) * multiple
            raise ValueError(
                f"{name} has {side} {size}, no multiple of {multiple}; pad to {high}"
                + (f" or crop to {low}" if low else "")
            )


def _check_input(name, x, channels, multiples, check, *, limit):
    """Raises ValueError unless shape, dtype and, where they are looked at, values make sense."""
    _check_shape(name, x, channels, multiples)
    if isinstance(x, np.ndarray) or check:
        values = np.asarray(x)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite; remove them")
        peak = float(np.abs(values).max())
        if limit is not None and peak > limit + RANGE_TOLERANCE:
            raise ValueError(f"{name} reaches {peak:.4g}; scale it to [-1, 1]")


def create_autoencoder(
    variant: str = "f32c32", seed: int = 0, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Autoencoder:
    """An autoencoder with random weights. `variant`: a name in models/dcae.py, or published."""
    config = api_config(dtype, Model(variant=variant))
    mesh = mesh or mesh_lib.make_mesh(config.mesh)
    return build_autoencoder(config, state_lib.random_weights(config.model, mesh, seed), mesh)


def load_autoencoder(
    path: str,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    weights: str = "ema",
    variant: str = "",
) -> Autoencoder:
    """The autoencoder in `path`: ours, or weights that were published for PyTorch.

    path: a workdir or one of its checkpoints/<step>, an export, a folder of diffusers or of
    DC-AE's authors, a .safetensors or .pt file, or a name on the Hugging Face hub. dtype: compute
    dtype, 'float32' or 'bfloat16' (default: bfloat16 except on CPUs). weights: 'ema' or 'raw', of
    a workdir. variant: what a file's weights are of; a published name sets the scaling factor too.
    Raises UserError, a ValueError, when there is nothing to load.
    """
    values, saved = checkpoint_weights.load_weights(path, weights, variant)
    config = api_config(dtype, saved.model)
    return build_autoencoder(config, values, mesh or mesh_lib.make_mesh(config.mesh))


def api_config(dtype: str | None, model: Model, **keys: Any) -> Config:
    """The configuration of a model that a library call makes. Raises UserError for the dtype."""
    given = config_lib.default()
    given.dtype = dtype or "auto"
    return config_lib.replace(config_lib.validate(given), model=model, **keys)


def build_autoencoder(config: Config, weights: Weights | None, mesh: Mesh) -> Autoencoder:
    """The model of config.model with `weights`, checked and placed on every device of the mesh.

    Empties `weights` on the way, so that they are never in memory twice. None: their shapes
    instead, for planning.
    """
    graph, params, stats = weights_lib.split(
        state_lib.abstract_model(config.model, mesh, dtype=config.dtype)
    )
    placed = _placed(weights, {**params, **stats}, mesh)
    arch = models.find(config.model).architecture(config.model)
    return Autoencoder(graph, placed, arch, config.model, mesh)


def _placed(weights: Weights | None, wanted: Weights, mesh: Mesh) -> Weights:
    """`weights` on every device of the mesh; empties the dict, so that they never lie twice.

    None: shapes, of what is `wanted`. Raises UserError for weights of another model.
    """
    if weights is None:
        place = mesh_lib.replicated(mesh)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for name, leaf in wanted.items()
        }
    state_lib.check_weights(weights, wanted)
    placed = {}
    for name in list(weights):
        # A copy, since a device array may alias a host array, and a file's pages can change.
        value = np.array(weights.pop(name), np.float32, order="C")
        placed[name] = mesh_lib.host_to_global(value, mesh_lib.replicated(mesh)).block_until_ready()
    return placed
