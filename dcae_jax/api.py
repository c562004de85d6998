# SPDX-License-Identifier: Apache-2.0
"""The Python interface: an autoencoder to encode and decode with, a generator to sample from."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dcae_jax import checkpoint, diffusion, host_memory, matching, sampling, sharding, state, tiling
from dcae_jax import config as config_lib
from dcae_jax.config import UserError
from dcae_jax.models import layers, sdvae
from dcae_jax.models.layers import Array, Weights

RANGE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A trained (or fresh) autoencoder on the devices of a mesh."""

    graph: nnx.GraphDef
    weights: Weights  # parameters and running statistics by path, float32
    architecture: Any  # a Variant of the model's file
    model: dict[str, Any]  # config.model
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
        _, params, _ = layers.split(layers.merge(self.graph, self.weights))
        return sum(leaf.size for leaf in params.values())

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Latents on each side that (encode, decode) look at; None where they look at them all.

        Tiles that overlap by twice as much give what the whole gives.
        """
        return state.model_module(config_lib.ConfigDict(self.model)).reach(self.architecture)

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
            if tile or not isinstance(self.architecture, sdvae.Variant):
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
        return jax.jit(lambda weights, x: layers.merge(self.graph, weights).encode(x))

    @functools.cached_property
    def _sample(self):
        return jax.jit(lambda weights, x, key: layers.merge(self.graph, weights).encode(x, key))

    @functools.cached_property
    def _decode(self):
        def decode(weights, z):
            images = layers.merge(self.graph, weights).decode(z)
            if self.mesh.shape["spatial"] == 1:
                return images
            # Also where the latents are too few to be split: the images are what takes memory.
            place = sharding.image_sharding(self.mesh, images.shape, z.shape[1])
            return jax.lax.with_sharding_constraint(images, place)

        return jax.jit(decode)

    def _place(self, x: Any, f: int = 1) -> Array:
        """x, of which f rows belong to one row of latents, on the devices."""
        place = sharding.image_sharding(self.mesh, x.shape, x.shape[1] // f)
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
    host_memory.keep()
    config = _config(dtype)
    config.model.variant = variant
    mesh = mesh or sharding.make_mesh(config.mesh)
    return build_autoencoder(config, state.random_weights(config, mesh, seed), mesh)


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
    host_memory.keep()
    values, saved = checkpoint.load_weights(path, weights, variant)
    config = _config(dtype)
    config.model.update(saved["model"])
    return build_autoencoder(config, values, mesh or sharding.make_mesh(config.mesh))


def _config(dtype: str | None):
    config = config_lib.default()
    config.dtype = dtype or "auto"
    config_lib.check(config)
    return config


def build_autoencoder(config: Any, weights: Weights | None, mesh: Mesh) -> Autoencoder:
    """The model of config.model with `weights`, checked and placed on every device of the mesh.

    Empties `weights` on the way, so that they are never in memory twice. None: their shapes
    instead, for planning.
    """
    graph, params, stats = layers.split(state.abstract_model(config, mesh))
    placed = _placed(weights, {**params, **stats}, mesh)
    arch = state.model_module(config.model).architecture(config.model)
    return Autoencoder(graph, placed, arch, config.model.to_dict(), mesh)


def _placed(weights: Weights | None, wanted: Weights, mesh: Mesh) -> Weights:
    """`weights` on every device of the mesh; empties the dict, so that they never lie twice.

    None: shapes, of what is `wanted`. Raises UserError for weights of another model.
    """
    if weights is None:
        place = sharding.replicated(mesh)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for name, leaf in wanted.items()
        }
    state.check_weights(weights, wanted)
    placed = {}
    for name in list(weights):
        # A copy, since a device array may alias a host array, and a file's pages can change.
        value = host_memory.owned(weights.pop(name))
        placed[name] = sharding.host_to_global(value, sharding.replicated(mesh)).block_until_ready()
    return placed


# --- diffusion models -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generator:
    """A diffusion model with the autoencoder whose latents it makes, on the devices of a mesh."""

    graph: nnx.GraphDef
    weights: Weights  # parameters by path, float32
    architecture: Any  # an Architecture of the model's file
    model: dict[str, Any]  # config.model; its scaling_factor multiplies latents
    objective: str  # epsilon, learned_sigma or flow
    autoencoder: Autoencoder
    mesh: Mesh

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; num_classes itself asks for no class."""
        return self.architecture.num_classes

    @property
    def resolution(self) -> int:
        """Pixels a side of a sample."""
        return self.architecture.latent_size * self.autoencoder.compression

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before the model sees them."""
        return self.model["scaling_factor"]

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in self.weights.values())

    def sample(
        self,
        labels: Sequence[int] | np.ndarray,
        guidance: float = 1.0,
        steps: int = 30,
        seed: int = 0,
        *,
        sampler: str = "",
        interval: tuple[float, float] = (0.0, 1.0),
        first: int = 0,
    ) -> np.ndarray:
        """Images [B, H, W, 3] uint8 of the classes `labels` [B].

        guidance: scale of classifier-free guidance, 1 being none, within `interval` of the noise
        level (1: pure noise). steps: evaluations of the model. sampler: one of
        `sampling.SAMPLERS`, '' being the objective's own. Image i is that of (seed, first + i),
        whatever the batch. An image that is not finite is black, and a warning names it.
        Raises ValueError, naming the argument.
        """
        settings = (labels, guidance, steps, seed, sampler, interval, first)
        images, finite = self._run(*settings, decode=True)
        bad = np.flatnonzero(~finite)
        if bad.size:
            logging.warning("not finite, and so black: samples %s", (first + bad[:8]).tolist())
        return images

    def sample_latents(
        self,
        labels: Sequence[int] | np.ndarray,
        guidance: float = 1.0,
        steps: int = 30,
        seed: int = 0,
        *,
        sampler: str = "",
        interval: tuple[float, float] = (0.0, 1.0),
        first: int = 0,
    ) -> np.ndarray:
        """What `sample` decodes: latents [B, h, w, c] float32, unscaled. Arguments as there."""
        settings = (labels, guidance, steps, seed, sampler, interval, first)
        return self._run(*settings, decode=False)[0]

    def _run(
        self, labels, guidance, steps, seed, sampler, interval, first, *, decode: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(images or latents [B, ...], whether all of each is finite [B])."""
        labels = np.asarray(labels)
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"labels must be whole numbers [B], not {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > self.num_classes:
            wrong = labels[(labels < 0) | (labels > self.num_classes)][0]
            raise UserError(
                f"labels={wrong} is no class; there are 0 to {self.num_classes - 1}, and "
                f"{self.num_classes} for none"
            )
        if not (np.isfinite(guidance) and guidance >= 0):
            raise UserError(f"guidance={guidance} must be a number of at least 0; 1 is none")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(f"interval={interval} must be 0 <= low <= high <= 1")
        if not (0 <= seed and 0 <= first):
            raise UserError(f"seed={seed} and first={first} must be at least 0")
        run = self._program(guidance, steps, sampler, interval, decode=decode)
        # Filled up to what the mesh divides by: the number of a sample fixes it, not its row.
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = np.arange(-(-len(labels) // shards) * shards) % len(labels)
        keys = jax.random.key_data(sampling.sample_keys(seed, jnp.asarray(first + rows)))
        place = sharding.batch_sharding(self.mesh, 2)
        out, finite = run(
            self.weights,
            self.autoencoder.weights,
            sharding.host_to_global(
                labels[rows].astype(np.int32), sharding.batch_sharding(self.mesh, 1)
            ),
            sharding.host_to_global(keys, place),
            sharding.host_to_global(np.float32(guidance), sharding.replicated(self.mesh)),
        )
        return np.asarray(out)[: len(labels)], np.asarray(finite)[: len(labels)]

    def program(
        self,
        count: int,
        guidance: float,
        steps: int,
        sampler: str = "",
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> tuple[Callable, tuple]:
        """(what `sample` runs for `count` labels, jitted; its arguments, as shapes), for planning.

        The weights are in the arguments as they are in the generator. The rest as in `sample`.
        """

        def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
            whole = sharding.replicated(self.mesh)
            place = sharding.batch_sharding(self.mesh, len(sizes)) if sizes else whole
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        return self._program(guidance, steps, sampler, interval, decode=True), (
            self.weights,
            self.autoencoder.weights,
            shape(count, dtype=jnp.int32),
            shape(count, 2, dtype=jnp.uint32),
            shape(dtype=jnp.float32),
        )

    def _program(self, guidance, steps, sampler, interval, *, decode: bool) -> Callable:
        arch = self.architecture
        return _sample_fn(
            self.graph,
            self.autoencoder.graph,
            self.mesh,
            _Settings(
                objective=self.objective,
                sampler=sampler,
                steps=int(steps),
                guided=guidance != 1,
                interval=tuple(interval),
                shape=(arch.latent_size, arch.latent_size, arch.latent_channels),
                none=arch.num_classes,
                scaling_factor=self.scaling_factor,
                decode=decode,
            ),
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a compiled sampler is made for."""

    objective: str
    sampler: str
    steps: int
    guided: bool
    interval: tuple[float, float]
    shape: tuple[int, int, int]  # of the latents
    none: int  # the label that stands for no class
    scaling_factor: float
    decode: bool  # else the latents are what is wanted


@functools.lru_cache(maxsize=8)  # a training run samples many times, and compiles once
def _sample_fn(
    graph: nnx.GraphDef, decoder: nnx.GraphDef, mesh: Mesh, settings: _Settings
) -> Callable:
    """(weights, the autoencoder's, labels [B], keys [B, 2] uint32, guidance) -> (out, finite).

    out: images [B, H, W, 3] uint8 or latents [B, h, w, c] float32; finite [B] bool. On every
    process whole.
    """
    s = settings

    def run(*arguments):
        with sharding.on_mesh(mesh):
            return generate(*arguments)

    def generate(weights, decoder_weights, labels, keys, guidance):
        keys = jax.random.wrap_key_data(keys)
        noise = sampling.initial_noise(keys, s.shape)
        model = sampling.guided(
            layers.merge(graph, weights),
            labels,
            s.none,
            guidance if s.guided else 1,
            objective=s.objective,
            interval=s.interval,
        )
        z = sampling.sample(
            model, noise, objective=s.objective, sampler=s.sampler, steps=s.steps, keys=keys
        )
        z = diffusion.unscaled(z, s.scaling_factor)
        if not s.decode:
            return z, jnp.isfinite(z).all((1, 2, 3))
        images = layers.merge(decoder, decoder_weights).decode(z)
        # As the authors cut to 8 bits: 127.5 x + 128, truncated.
        levels = jnp.clip(127.5 * images.astype(jnp.float32) + 128, 0, 255)
        finite = jnp.isfinite(levels).all((1, 2, 3))
        levels = jnp.where(finite[:, None, None, None], levels, 0)
        return levels.astype(jnp.uint8), finite

    # The encoder's weights too, which lie there all the same: a plan counts their memory.
    return jax.jit(run, out_shardings=sharding.replicated(mesh), keep_unused=True)


def load_generator(
    path: str,
    *,
    autoencoder: str = "",
    dtype: str | None = None,
    mesh: Mesh | None = None,
    weights: str = "ema",
    variant: str = "",
    resolution: int = 0,
) -> Generator:
    """The diffusion model in `path` with its autoencoder: ours, or published UViT, USiT or DiT.

    path: a workdir or one of its checkpoints/<step>, an export, or published weights. autoencoder:
    its autoencoder, for `load_autoencoder`; '' takes the one that the model was trained on, or
    that its published name says. resolution: pixels a side, where published weights do not tell
    (a DiT without its table of positions). The rest as in `load_autoencoder`. Raises UserError, a
    ValueError; so too if the autoencoder is not the one whose latents the model learned.
    """
    values, saved = checkpoint.load_weights(path, weights, variant, kind="generator")
    where = autoencoder or saved["autoencoder"]
    if not where:
        raise UserError(f"{path!r} does not say which autoencoder it is for; give autoencoder=")
    config = _config(dtype)
    mesh = mesh or sharding.make_mesh(config.mesh)
    inner = load_autoencoder(where, dtype=dtype, mesh=mesh)
    if manifest := saved.get("latents"):
        matching.check_autoencoder(manifest, where, checkpoint.encoder_checksum(inner.weights))
    config.model.update(saved["model"])
    config.objective, config.patch_size = saved["objective"], saved["patch_size"]
    if not config.model.latent_size:
        if not resolution:
            raise UserError(f"{path!r} does not say for which size it is; give resolution=")
        config.model.latent_size = resolution // inner.compression
    config.model.scaling_factor = config.model.scaling_factor or inner.scaling_factor or 0.0
    if not config.model.scaling_factor:
        raise UserError(
            f"{path!r} and its autoencoder {where!r} name no scaling factor; give the published "
            "name of the autoencoder, which has one"
        )
    return build_generator(config, values, inner, mesh)


def abstract_generator(config: Any, mesh: Mesh) -> Generator:
    """What `load_generator` makes, with shapes for weights.

    config: of the run that trains it, completed (`matching.complete`); its autoencoder is a
    VARIANT, its dtype that of the sampling.
    """
    inner, outer = _config(config.dtype), _config(config.dtype)
    inner.model.variant, inner.model.depthwise = config.autoencoder, config.model.depthwise
    outer.model = config.model
    outer.objective, outer.patch_size = config.objective, config.patch_size
    return build_generator(outer, None, build_autoencoder(inner, None, mesh), mesh)


def build_generator(
    config: Any, weights: Weights | None, autoencoder: Autoencoder, mesh: Mesh
) -> Generator:
    """The diffusion model of config.model with `weights`, checked and placed on the mesh.

    Empties `weights` if they are host arrays, and takes None, as `build_autoencoder` does. Raises
    UserError where the model's latents are not those of the autoencoder.
    """
    arch = state.architecture(config)
    if arch.latent_channels != autoencoder.latent_channels:
        raise UserError(
            f"the model makes latents of {arch.latent_channels} channels, the autoencoder has "
            f"{autoencoder.latent_channels}; name the autoencoder that it was trained on"
        )
    graph, params, _ = layers.split(state.abstract_model(config, mesh))
    placed = _placed(weights, params, mesh)
    return Generator(
        graph, placed, arch, config.model.to_dict(), config.objective, autoencoder, mesh
    )
