# SPDX-License-Identifier: Apache-2.0
"""Python API for diffusion models: load a generator and sample images."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dcae_jax.api import autoencoder as autoencoder_lib
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Diffusion, Model
from dcae_jax.data import transforms
from dcae_jax.diffusion import latent_spec, objectives, samplers
from dcae_jax.errors import UserError
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import BackboneArchitecture
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import precision, sharding
from dcae_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Sampling settings, except labels. Raises UserError, naming the argument."""

    guidance: float = 1.0  # scale of classifier-free guidance; 1: no guidance
    steps: int = 30  # model evaluations
    seed: int = 0
    sampler: str = ""  # one of samplers.SAMPLERS; '': the objective's default
    interval: tuple[float, float] = (0.0, 1.0)  # noise levels (1: pure noise) at which to guide
    first: int = 0  # image i is sample first + i of the seed, for any batch size

    def __post_init__(self):
        if not (np.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"guidance={self.guidance} must be finite and >= 0; 1 turns it off")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(f"interval={self.interval} must be 0 <= low <= high <= 1")
        if not (0 <= self.seed and 0 <= self.first):
            raise UserError(f"seed={self.seed} and first={self.first} must be at least 0")
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Generator:
    """A diffusion model and the autoencoder of its latents, on the devices of a mesh."""

    graphdef: nnx.GraphDef
    weights: Weights  # parameters by path, float32
    architecture: BackboneArchitecture
    model_config: Model  # its scaling_factor multiplies latents
    objective: str  # epsilon, learned_sigma, flow or meanflow
    autoencoder: Autoencoder

    @property
    def mesh(self) -> Mesh:
        return self.autoencoder.mesh

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; num_classes itself means unconditional."""
        return self.architecture.num_classes

    @property
    def resolution(self) -> int:
        """Pixels per side of a sample."""
        return self.architecture.latent_size * self.autoencoder.compression

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it before the model sees them."""
        return self.model_config.scaling_factor

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

        guidance: scale of classifier-free guidance (1: none), applied at noise levels within
        `interval` (1: pure noise); a meanflow model has its guidance folded in and takes 1 alone.
        steps: model evaluations. sampler: one of `samplers.SAMPLERS`;
        '' is the objective's default. Image i is sample first + i of the seed, for any batch size.
        A non-finite sample becomes a black image, with a warning. Raises ValueError, naming the
        argument.
        """
        settings = SampleSettings(guidance, steps, seed, sampler, interval, first)
        images, finite = self._run(labels, settings, decode=True)
        bad = np.flatnonzero(~finite)
        if bad.size:
            numbers = (first + bad[:8]).tolist()
            logging.warning("samples %s are not finite and were replaced by black images", numbers)
        return images

    def sample_latents(
        self,
        labels: Sequence[int] | np.ndarray,
        settings: SampleSettings = SampleSettings(),
    ) -> np.ndarray:
        """The latents [B, h, w, c] that `sample` decodes: float32, unscaled."""
        return self._run(labels, settings, decode=False)[0]

    def program(self, count: int, settings: SampleSettings) -> tuple[jax.stages.Wrapped, tuple]:
        """For planning: (the jitted program of `sample` for `count` labels, abstract arguments).

        The weights are those of the generator, arrays or shapes.
        """

        def shape(*sizes: int, dtype: jnp.dtype | type) -> jax.ShapeDtypeStruct:
            whole = mesh_lib.replicated(self.mesh)
            place = mesh_lib.batch_sharding(self.mesh, len(sizes)) if sizes else whole
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        return self._compiled(settings, decode=True), (
            self.weights,
            self.autoencoder.weights,
            shape(count, dtype=jnp.int32),
            shape(count, 2, dtype=jnp.uint32),
            shape(dtype=jnp.float32),
        )

    def _run(
        self, labels: Sequence[int] | np.ndarray, settings: SampleSettings, *, decode: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(images or latents [B, ...], whether each is finite [B])."""
        labels = self.check_labels(labels)
        run = self._compiled(settings, decode=decode)
        # Padded to a multiple of the shards. A sample depends on its index, not on its row.
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = np.arange(-(-len(labels) // shards) * shards) % len(labels)
        keys = samplers.sample_keys(settings.seed, jnp.asarray(settings.first + rows))
        out, finite = run(
            self.weights,
            self.autoencoder.weights,
            mesh_lib.host_to_global(
                labels[rows].astype(np.int32), mesh_lib.batch_sharding(self.mesh, 1)
            ),
            mesh_lib.host_to_global(
                jax.random.key_data(keys), mesh_lib.batch_sharding(self.mesh, 2)
            ),
            mesh_lib.host_to_global(np.float32(settings.guidance), mesh_lib.replicated(self.mesh)),
        )
        return np.asarray(out)[: len(labels)], np.asarray(finite)[: len(labels)]

    def check_labels(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """Labels [B] as an integer array. Raises UserError for a label that the model lacks."""
        labels = np.asarray(labels)
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"labels must be integers [B], not {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > self.num_classes:
            wrong = labels[(labels < 0) | (labels > self.num_classes)][0]
            raise UserError(
                f"labels={wrong} is not a class; give 0 to {self.num_classes - 1}, or "
                f"{self.num_classes} for unconditional"
            )
        return labels

    def _compiled(self, settings: SampleSettings, *, decode: bool) -> jax.stages.Wrapped:
        sampler = samplers.check(
            self.objective, settings.sampler, settings.steps, settings.guidance
        )
        arch = self.architecture
        static = _Static(
            objective=self.objective,
            sampler=sampler,
            steps=int(settings.steps),
            guided=settings.guidance != 1,
            interval=(settings.interval[0], settings.interval[1]),
            shape=(arch.latent_size, arch.latent_size, arch.latent_channels),
            decoded_channels=self.autoencoder.latent_channels,
            none=arch.num_classes,
            scaling_factor=self.scaling_factor,
            dtype=self.autoencoder.dtype,
            decode=decode,
        )
        return _sample_fn(self.graphdef, self.autoencoder.graphdef, self.mesh, static)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static arguments of a sampling program, compiled once per value."""

    objective: str
    sampler: str
    steps: int
    guided: bool
    interval: tuple[float, float]
    shape: tuple[int, int, int]  # of the latents
    decoded_channels: int  # channels of the decoder's input
    none: int  # the unconditional label
    scaling_factor: float
    dtype: str  # compute dtype
    decode: bool  # to images; else return latents


@functools.lru_cache(maxsize=8)  # a training run samples many times but compiles once
def _sample_fn(
    graphdef: nnx.GraphDef, decoder: nnx.GraphDef, mesh: Mesh, static: _Static
) -> jax.stages.Wrapped:
    """(weights, the autoencoder's, labels [B], keys [B, 2] uint32, guidance) -> (out, finite).

    out: images [B, H, W, 3] uint8 or latents [B, h, w, c] float32; finite [B] bool. Both are
    replicated, so that every process can read them.
    """

    def generate(
        weights: Weights, decoder_weights: Weights, labels: Array, keys: Array, guidance: Array
    ) -> tuple[Array, Array]:
        keys = jax.random.wrap_key_data(keys)
        noise = samplers.initial_noise(keys, static.shape)  # [B, h, w, c]
        model = samplers.guided(
            weights_lib.merge(graphdef, weights),
            static.none,
            guidance if static.guided else 1,
            objective=static.objective,
            interval=static.interval,
        )
        with sharding.on_mesh(mesh), precision.of(static.dtype):
            z = samplers.sample(
                model,
                noise,
                labels,
                objective=static.objective,
                sampler=static.sampler,
                steps=static.steps,
                keys=keys,
            )
            z = objectives.unscaled(z, static.scaling_factor)  # [B, h, w, c]
            if not static.decode:
                return z, jnp.isfinite(z).all((1, 2, 3))
            more = static.decoded_channels - z.shape[-1]  # of latents cut to their first channels
            z = jnp.pad(z, [(0, 0), (0, 0), (0, 0), (0, more)])
            images = weights_lib.merge(decoder, decoder_weights).decode(z)  # [B, H, W, 3]
        levels = transforms.to_levels(images)
        finite = jnp.isfinite(levels).all((1, 2, 3))  # [B]
        levels = jnp.where(finite[:, None, None, None], levels, 0)
        return levels.astype(jnp.uint8), finite

    # keep_unused: the encoder's weights are on the devices too, and a plan counts their memory.
    return jax.jit(generate, out_shardings=mesh_lib.replicated(mesh), keep_unused=True)


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
    """Loads the diffusion model in `path` with its autoencoder: ours, or published UViT, USiT, DiT.

    - `path`: a workdir, one of its `checkpoints/<step>`, an export, or published weights.
    - `autoencoder`: a path for `load_autoencoder`; '' takes the one that the model was trained on,
      or that its published name implies.
    - `resolution`: pixels per side, for published weights that do not store it (a DiT without its
      position table).
    - `dtype`, `mesh`, `weights`, `variant`: see `load_autoencoder`.

    Raises UserError (a ValueError), also if the model was trained on latents of another
    autoencoder.
    """
    arrays, saved = checkpoint_weights.load_weights(path, weights, variant, kind="generator")
    where = autoencoder or saved.diffusion.autoencoder
    if not where:
        raise UserError(f"{path!r} does not say which autoencoder it is for; give autoencoder=")
    # `weights` is for the diffusion model; the autoencoder's are those that made the latents.
    made_by = (saved.latents or {}).get("weights", "ema")
    inner = autoencoder_lib.load_autoencoder(where, dtype=dtype, mesh=mesh, weights=made_by)
    if saved.latents:
        latent_spec.check_autoencoder(saved.latents, where, inner.encoder_checksum)
    model = saved.model
    ours, theirs = model.scaling_factor, inner.scaling_factor
    if autoencoder and not saved.latents and ours and theirs and ours != theirs:
        raise UserError(
            f"{path!r} was trained on latents scaled by {ours}, but autoencoder={where!r} has the "
            f"scaling factor {theirs}; give the autoencoder that it was trained on"
        )
    if not model.latent_size and not resolution:
        raise UserError(f"{path!r} does not store its resolution; give resolution=")
    model = dataclasses.replace(
        model,
        latent_size=model.latent_size or resolution // inner.compression,
        scaling_factor=model.scaling_factor or inner.scaling_factor or 0.0,
    )
    if not model.scaling_factor:
        raise UserError(
            f"{path!r} and its autoencoder {where!r} have no scaling factor; give the published "
            "name of the autoencoder, which sets one"
        )
    abstract = abstract_generator(model, saved.diffusion, inner, dtype)
    placed = autoencoder_lib.place_weights(
        autoencoder_lib.drain(arrays), abstract.weights, inner.mesh
    )
    return dataclasses.replace(abstract, weights=placed)


def abstract_generator(
    model: Model, diffusion: Diffusion, autoencoder: Autoencoder, dtype: str | None = None
) -> Generator:
    """The diffusion model of config.model, on the autoencoder's mesh, its weights as shapes.

    Raises UserError if its latents do not fit the autoencoder.
    """
    arch, mesh = state_lib.architecture(model, diffusion), autoencoder.mesh
    inner = autoencoder.architecture
    fits = arch.latent_channels == inner.latent_channels
    if not fits and not (inner.cuttable and arch.latent_channels < inner.latent_channels):
        raise UserError(
            f"the model's latents have {arch.latent_channels} channels, the autoencoder's "
            f"{autoencoder.latent_channels}; give the autoencoder that the model was trained on"
        )
    compute = autoencoder_lib.checked_dtype(dtype)
    abstract = state_lib.abstract_model(model, mesh, diffusion, dtype=compute)
    graphdef, params, _ = weights_lib.split(abstract)
    shapes = autoencoder_lib.replicated_shapes(params, mesh)
    return Generator(graphdef, shapes, arch, model, diffusion.objective, autoencoder)
