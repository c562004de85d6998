# SPDX-License-Identifier: Apache-2.0
"""Python API for autoencoders: create, load, encode, decode and reconstruct, also in tiles."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from dcae_jax import models
from dcae_jax.api import calibration, images, tiling
from dcae_jax.api.tiling import AnyArray
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import MeshSizes, Model
from dcae_jax.errors import UserError
from dcae_jax.models import quantized
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import AutoencoderArchitecture
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import precision
from dcae_jax.training import state as state_lib

RANGE_TOLERANCE = 1e-3
NamedArrays = Iterable[tuple[str, AnyArray]]  # (path, weight) pairs, consumed one at a time


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A trained (or fresh) autoencoder on the devices of a mesh."""

    graphdef: nnx.GraphDef
    weights: Weights  # parameters and running statistics by path; float32, or as `quantize` says
    architecture: AutoencoderArchitecture
    model_config: Model
    mesh: Mesh
    dtype: str = "float32"  # compute dtype: float32 or bfloat16
    quantize: str = ""  # a key of quantized.FORMS; '': float32 weights
    float_encoder: str = ""  # checksum of the encoder that was quantised

    @property
    def compression(self) -> int:
        """Pixels per side of one latent position."""
        return self.architecture.compression

    @property
    def latent_channels(self) -> int:
        return self.architecture.latent_channels

    @property
    def scaling_factor(self) -> float | None:
        """latent * scaling_factor has an rms of about 1; None if unknown."""
        return self.architecture.scaling_factor

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: neither running statistics nor scales of int8."""
        _, params, _ = weights_lib.split(weights_lib.merge(self.graphdef, self.weights))
        return sum(leaf.size for name, leaf in params.items() if not name.endswith("_scale"))

    @property
    def encoder_checksum(self) -> str:
        """sha256 of the weights that latents depend on; of those before they were quantised."""
        return self.float_encoder or checkpoint_weights.encoder_checksum(self.weights)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Receptive field of (encode, decode): latents on each side; None if global.

        Tiling is exact if tiles overlap by at least twice as much.
        """
        return models.find(self.model_config).reach(self.architecture)

    @property
    def has_posterior(self) -> bool:
        """Whether the encoder outputs a distribution; `encode` then returns its mean."""
        return hasattr(weights_lib.merge(self.graphdef, self.weights), "posterior")

    def encode(
        self,
        x: AnyArray,
        *,
        sample: bool = False,
        seed: int = 0,
        tile: int = 0,
        overlap: int | None = None,
        check: bool = False,
        channels: int | None = None,
    ) -> AnyArray:
        """Images [B, H, W, 3] float32 in [-1, 1] -> latents [B, H/f, W/f, c] float32, unscaled.

        H and W are multiples of `compression`. With `tile`, an image of any size is encoded in
        squares of tile x tile latents, which overlap by `overlap` latents (default: a quarter of
        the tile) and are blended; the result is a NumPy array. NumPy input is checked in full; a
        jax.Array by shape and dtype only, unless `check`. With `sample`, a model with a posterior
        (sd-vae-f8) returns a sample drawn with `seed`, not the mean. `channels` keeps only the
        first channels, [B, H/f, W/f, channels], of a model without a latent shortcut
        (docs/structured.md). Raises ValueError, naming the argument.
        """
        f = self.compression
        if channels is not None:
            models.check_channels(self.architecture, [channels], "channels")
            z = self.encode(x, sample=sample, seed=seed, tile=tile, overlap=overlap, check=check)
            return z[..., :channels]
        if sample:
            if tile or not self.has_posterior:
                what = "tiles" if tile else "a deterministic encoder"
                raise ValueError(f"sample=True is not supported with {what}; leave it out")
            _check_input("x", x, 3, (f, f), check, limit=1.0)
            return self._encode(self.weights, self._place(x, f), jax.random.key(seed))
        if not tile:
            _check_input("x", x, 3, (f, f), check, limit=1.0)
            return self._encode(self.weights, self._place(x, f))
        _check_shape("x", x, 3, (f, f))
        run = functools.partial(self.encode, check=check)
        tiles = tiling.plan(tile, overlap, self.reach[0])
        return tiling.run(run, x, tiles, (f, 1), self.latent_channels)

    def decode(
        self,
        z: AnyArray,
        *,
        tile: int = 0,
        overlap: int | None = None,
        check: bool = False,
    ) -> AnyArray:
        """Latents [B, h, w, c], unscaled -> images [B, h*f, w*f, 3] float32, not clipped.

        A model without a latent shortcut also decodes latents of fewer channels, the first ones.
        Tiles, checks and errors as in `encode`.
        """
        missing = self.latent_channels - (getattr(z, "shape", None) or (self.latent_channels,))[-1]
        if missing > 0 and self.architecture.cuttable:
            pad = np.pad if isinstance(z, np.ndarray) else jnp.pad
            z = pad(z, [(0, 0)] * (z.ndim - 1) + [(0, missing)])
        if not tile:
            _check_input("z", z, self.latent_channels, (1, 1), check, limit=None)
            return self._decode(self.weights, self._place(z))
        _check_shape("z", z, self.latent_channels, (1, 1))
        run = functools.partial(self.decode, check=check)
        tiles = tiling.plan(tile, overlap, self.reach[1])
        return tiling.run(run, z, tiles, (1, self.compression), 3)

    def cut(self, channels: int) -> "Autoencoder":
        """The autoencoder of only the first latent channels: smaller first and last kernels.

        It gives what this one gives with `channels`. Raises ValueError for a model with a latent
        shortcut, and for quantised weights.
        """
        models.check_channels(self.architecture, [channels], "channels")
        if self.quantize:
            raise UserError(
                f"channels={channels}: these weights are {self.quantize}; cut the float ones first"
            )
        config = dataclasses.replace(self.model_config, latent_channels=channels)
        weights = models.find(config).cut(self.weights, channels)
        return build_autoencoder(config, weights.items(), self.mesh, self.dtype)

    def quantized_as(self, form: str, calibrate: calibration.Images | None = None) -> "Autoencoder":
        """This float autoencoder with int8 or fp8 layers; see `load_autoencoder`.

        form: its `quantize`. Raises UserError.
        """
        if self.quantize:
            raise UserError(f"quantize={form!r}: these weights are {self.quantize} already")
        wanted = quantized.form(form)
        calibration.check(form, wanted, calibrate, self.mesh)
        model = weights_lib.merge(self.graphdef, self.weights)
        peaks = {}
        if calibrate is not None:
            crops = calibration.crops(calibrate, self.compression)
            peaks = calibration.input_peaks(self.graphdef, self.weights, self.dtype, crops)
        weights = quantized.quantize(self.weights, model, wanted, peaks)
        return build_autoencoder(
            self.model_config, drain(weights), self.mesh, self.dtype, form, self.encoder_checksum
        )

    def reconstruct(self, image: Image.Image | AnyArray, *, tile: int | None = None) -> np.ndarray:
        """The decoded latents of an image of any size: [H, W, 3] uint8, [B, H, W, 3] of a batch.

        image: a PIL image, uint8 or float in [-1, 1] (`images.to_float`). It is padded to multiples
        of `compression`, and cropped again. tile: as in `encode`; None tiles what is larger than
        `images.MOST_PIXELS`. Raises ValueError, naming the argument.
        """
        x = images.to_float(image)
        height, width = x.shape[-3:-1]
        batch = images.pad(x.reshape(-1, height, width, 3), self.compression)
        size = tile
        if size is None:
            size = images.tile_for(batch.shape[1], batch.shape[2], self.compression)
        y = self.decode(self.encode(batch, tile=size), tile=size)
        return images.to_pixels(y, height, width).reshape(x.shape)

    @functools.cached_property
    def _encode(self) -> jax.stages.Wrapped:
        def encode(weights: Weights, x: Array, *key: Array) -> Array:
            with precision.of(self.dtype):
                return weights_lib.merge(self.graphdef, weights).encode(x, *key)

        return jax.jit(encode)

    @functools.cached_property
    def _decode(self) -> jax.stages.Wrapped:
        def decode(weights: Weights, z: Array) -> Array:
            with precision.of(self.dtype):
                images = weights_lib.merge(self.graphdef, weights).decode(z)
            if self.mesh.shape["spatial"] == 1:
                return images
            # Even if the latents have too few rows to shard: the images take the memory.
            place = mesh_lib.image_sharding(self.mesh, images.shape, z.shape[1])
            return jax.lax.with_sharding_constraint(images, place)

        return jax.jit(decode)

    def _place(self, x: AnyArray, f: int = 1) -> Array:
        """x, sharded over the devices. f: rows of x per row of latents."""
        place = mesh_lib.image_sharding(self.mesh, x.shape, x.shape[1] // f)
        return jax.device_put(jnp.asarray(x), place)


def _check_shape(name: str, x: AnyArray, channels: int, multiples: tuple[int, int]) -> None:
    """Raises ValueError unless x is floating [B, H, W, channels], H and W being multiples."""
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
                f"{name} has {side} {size}, not a multiple of {multiple}; pad to {high}"
                + (f" or crop to {low}" if low else "")
            )


def _check_input(
    name: str,
    x: AnyArray,
    channels: int,
    multiples: tuple[int, int],
    check: bool,
    *,
    limit: float | None,
) -> None:
    """Raises ValueError for a bad shape or dtype, and (NumPy input or `check`) for bad values."""
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
    """An autoencoder with random weights. variant: a name in models/dcae.py or a published one."""
    model = Model(variant=variant)
    mesh = mesh or mesh_lib.make_mesh(MeshSizes())
    return build_autoencoder(model, drain(state_lib.random_weights(model, mesh, seed)), mesh, dtype)


def load_autoencoder(
    path: str,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    weights: str = "ema",
    variant: str = "",
    *,
    quantize: str = "",
    calibrate: calibration.Images | None = None,
) -> Autoencoder:
    """Loads the autoencoder in `path`: ours, or weights published for PyTorch.

    - `path`: a workdir or one of its `checkpoints/<step>`, an export, a folder of diffusers or of
      DC-AE's authors, a .safetensors or .pt file, or a name on the Hugging Face hub.
    - `dtype`: compute dtype, 'float32' or 'bfloat16' (default: bfloat16 except on CPUs); float32
      uses full-precision matrix products on every device.
    - `weights`: 'ema' or 'raw', for a workdir.
    - `variant`: the model of a bare weights file; a published name also sets the scaling factor.
    - `quantize`: 'int8' or 'fp8' weights and layer inputs, or 'int8-weights' (docs/serve.md). An
      export may hold quantised weights already.
    - `calibrate`: for 'int8' and 'fp8', images like those to come: a folder, or PIL images or
      arrays. The largest inputs of each layer on them become its range.

    Raises UserError (a ValueError) if there is nothing to load or the weights are of another
    variant.
    """
    arrays, saved = checkpoint_weights.load_weights(path, weights, variant, quantized=True)
    mesh = mesh or mesh_lib.make_mesh(MeshSizes())
    ae = build_autoencoder(
        saved.model, drain(arrays), mesh, dtype, saved.quantize, saved.float_encoder
    )
    return ae.quantized_as(quantize, calibrate) if quantize or calibrate is not None else ae


def abstract_autoencoder(
    model: Model, mesh: Mesh, dtype: str | None = None, quantize: str = ""
) -> Autoencoder:
    """The autoencoder of config.model, its weights as shapes. Raises UserError for a bad dtype.

    quantize: '' or a key of quantized.FORMS.
    """
    dtype = mesh_lib.compute_dtype(checked_dtype(dtype), mesh)
    layers = state_lib.abstract_model(model, mesh, dtype=dtype)
    if quantize:
        quantized.replace(layers, quantized.form(quantize))
    graphdef, params, stats = weights_lib.split(layers)
    arch = models.find(model).architecture(model)
    shapes = replicated_shapes({**params, **stats}, mesh)
    return Autoencoder(graphdef, shapes, arch, model, mesh, dtype, quantize)


def build_autoencoder(
    model: Model,
    weights: NamedArrays,
    mesh: Mesh,
    dtype: str | None = None,
    quantize: str = "",
    float_encoder: str = "",
) -> Autoencoder:
    """The autoencoder of config.model with `weights`, replicated over the mesh.

    quantize, float_encoder: see `Autoencoder`. Raises UserError for a bad dtype and for weights of
    another model.
    """
    abstract = abstract_autoencoder(model, mesh, dtype, quantize)
    placed = place_weights(weights, abstract.weights, mesh)
    return dataclasses.replace(abstract, weights=placed, float_encoder=float_encoder)


def checked_dtype(dtype: str | None) -> str:
    """The value of config.dtype for an API call's `dtype`. Raises UserError."""
    choices = ("auto", "float32", "bfloat16")
    if dtype and dtype not in choices:
        raise UserError(f"dtype={dtype!r} is not known; choose one of {', '.join(choices)}")
    return dtype or "auto"


# --- placing weights ------------------------------------------------------------------------------


def drain(weights: dict[str, Array] | dict[str, np.ndarray]) -> NamedArrays:
    """Yields the pairs of a dict and removes each one, so the dict ends up empty.

    Each array is freed once it is placed, and the model is never in memory twice.
    """
    for name in list(weights):
        yield name, weights.pop(name)


def replicated_shapes(abstract: Weights, mesh: Mesh) -> Weights:
    """The shapes `abstract`, with a sharding that replicates them over the mesh."""
    where = mesh_lib.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract
    )


def place_weights(weights: NamedArrays, abstract: Weights, mesh: Mesh) -> Weights:
    """Copies of `weights` in the dtypes of `abstract`, taken one at a time, replicated on the mesh.

    Raises UserError unless names and shapes match `abstract`.
    """
    placed = {}
    for name, value in weights:
        # A copy: a device array may alias host memory, and a mapped file can change.
        dtype = abstract[name].dtype if name in abstract else np.float32
        value = np.array(value, dtype, order="C")
        placed[name] = mesh_lib.host_to_global(value, mesh_lib.replicated(mesh)).block_until_ready()
    state_lib.check_weights(placed, abstract)
    return placed
