# SPDX-License-Identifier: Apache-2.0
"""DC-AE, the deep compression autoencoder (arXiv:2410.10733), and DC-AE 1.5 (arXiv:2508.00413).

Each encoder stage has half the size of the previous one; the decoder mirrors the encoder. Where
the size changes, a parameter-free shortcut bypasses the convolution (section 3.2).

Shapes: Ci = widths[i], n is the deepest stage, f = 2^n the compression, c = latent_channels.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import Rngs
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models import blocks
from dcae_jax.models.blocks import Activation, BlockKind, DownsampleForm, UpsampleForm
from dcae_jax.models.dcae_published import CUT, PUBLISHED
from dcae_jax.models.layers import DepthwiseForm, Layers, NormKind, depthwise_form, run
from dcae_jax.models.weights import Array


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture. The tuples have one entry per stage, from full size to the deepest.

    Only stage 0 may have depth 0. It is then skipped: the encoder's first convolution halves
    the size, and the decoder's last one doubles it.
    """

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    encoder_blocks: tuple[BlockKind, ...]
    decoder_blocks: tuple[BlockKind, ...]
    decoder_norms: tuple[NormKind, ...]  # also ResBlock's activation: bn2d ReLU, trms2d SiLU
    downsample: DownsampleForm = "s2c"
    upsample: UpsampleForm = "c2s"
    output_act: Activation = "relu"  # in OutputHead
    latent_shortcuts: bool = True  # average into the latent, duplicate out of it
    residual: bool = True  # False: no parameter-free shortcuts, the ablation
    decoder_widths: tuple[int, ...] = ()  # (): `widths`
    # Of a fresh model, see `Layers`; two variants that differ in it alone are one network.
    block_scale: float = dataclasses.field(default=1.0, compare=False)
    scaling_factor: float | None = None  # latent * scaling_factor has an rms of about 1

    @property
    def compression(self) -> int:
        """Downsampling factor f: pixels per latent position, along each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def cuttable(self) -> bool:
        """Whether the first channels alone are a latent, that of a model with fewer channels.

        Not with a latent shortcut: which channels it averages depends on their number.
        """
        return not (self.residual and self.latent_shortcuts)


# --- the network ----------------------------------------------------------------------------------


# fmt: off
class DCAE(nnx.Module):
    """The autoencoder. It is deterministic: there is no posterior and no KL term.

    depthwise: see `Layers`. remat: the backward pass recomputes each block.
    """

    def __init__(
        self, arch: Variant, *,
        depthwise: DepthwiseForm, remat: bool = False, dtype: DTypeLike, rngs: Rngs,
    ) -> None:
        layers = Layers(dtype, rngs, depthwise, arch.block_scale)
        self.encoder = Encoder(arch, layers, remat=remat)
        self.decoder = Decoder(arch, layers, remat=remat)

    def encode(self, x: Float[Array, "B H W 3"]) -> Float32[Array, "B h w c"]:
        """[B, H, W, 3] float in [-1, 1] -> [B, H/f, W/f, c] float32, unscaled."""
        return self.encoder(x).astype(jnp.float32)

    def decode(self, z: Float[Array, "B h w c"]) -> Float32[Array, "B H W 3"]:
        """[B, H/f, W/f, c], unscaled -> [B, H, W, 3] float32, about [-1, 1], not clipped."""
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float32[Array, "B H W 3"]:
        return self.decode(self.encode(x))                      # [B, H, W, 3]


class Encoder(nnx.Module):
    """Images -> latents; each stage has half the size of the previous one."""

    def __init__(self, arch: Variant, layers: Layers, *, remat: bool) -> None:
        if arch.encoder_depths[0]:
            self.project_in = layers.conv(3, arch.widths[0])
        else:
            self.project_in = blocks.Downsample(3, arch.widths[1], layers, form=arch.downsample)
        self.stages = nnx.List(encoder_stage(arch, i, layers) for i in range(len(arch.widths)))
        self.project_out = layers.conv(arch.widths[-1], arch.latent_channels)
        self.has_shortcut = not arch.cuttable
        self.remat = remat

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        x = self.project_in(x)                                  # [B, H, W, C0] or [B, H/2, W/2, C1]
        for stage in self.stages:
            x = run(stage, x, remat=self.remat)                 # [B, H/2^j, W/2^j, Cj], j = i + 1
        z = self.project_out(x)                                 # [B, H/f, W/f, c]
        if self.has_shortcut:
            z = z + blocks.average_channels(x, z.shape[-1])     # [B, H/f, W/f, c]
        return z                                                # [B, H/f, W/f, c]


class Decoder(nnx.Module):
    """Latents -> images. `stages[i]` mirrors the encoder's, as published; the last runs first."""

    def __init__(self, arch: Variant, layers: Layers, *, remat: bool) -> None:
        arch = dataclasses.replace(arch, widths=arch.decoder_widths or arch.widths)
        self.project_in = layers.conv(arch.latent_channels, arch.widths[-1])
        self.stages = nnx.List(decoder_stage(arch, i, layers) for i in range(len(arch.widths)))
        self.project_out = OutputHead(arch, layers)
        self.has_shortcut = not arch.cuttable
        self.remat = remat

    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        x = self.project_in(z)                                  # [B, H/f, W/f, Cn]
        if self.has_shortcut:
            wide = blocks.duplicate_channels(z, x.shape[-1])    # [B, H/f, W/f, Cn]
            x = x + wide.astype(x.dtype)                        # [B, H/f, W/f, Cn]
        for stage in reversed(self.stages):
            x = run(stage, x, remat=self.remat)                 # [B, H/2^i, W/2^i, Ci]
        return self.project_out(x)                              # [B, H, W, 3]


def encoder_stage(arch: Variant, i: int, layers: Layers) -> nnx.List:
    """The blocks of stage i, then downsampling to stage i + 1 (none at the deepest).

    [B, H/2^i, W/2^i, Ci] -> [B, H/2^(i+1), W/2^(i+1), C(i+1)]
    """
    kind, width, depth = arch.encoder_blocks[i], arch.widths[i], arch.encoder_depths[i]
    stage: list[nnx.Module] = [blocks.block(kind, width, "trms2d", layers) for _ in range(depth)]
    if depth and i + 1 < len(arch.widths):
        deeper, form = arch.widths[i + 1], arch.downsample
        stage.append(blocks.Downsample(width, deeper, layers, form=form, shortcut=arch.residual))
    return nnx.List(stage)


def decoder_stage(arch: Variant, i: int, layers: Layers) -> nnx.List:
    """Upsampling from stage i + 1 (none at the deepest), then the blocks of stage i.

    [B, H/2^(i+1), W/2^(i+1), C(i+1)] -> [B, H/2^i, W/2^i, Ci]
    """
    kind, width, depth = arch.decoder_blocks[i], arch.widths[i], arch.decoder_depths[i]
    stage: list[nnx.Module] = []
    if depth and i + 1 < len(arch.widths):
        deeper, form = arch.widths[i + 1], arch.upsample
        stage.append(blocks.Upsample(deeper, width, layers, form=form, shortcut=arch.residual))
    norm = arch.decoder_norms[i]
    return nnx.List(stage + [blocks.block(kind, width, norm, layers) for _ in range(depth)])


class OutputHead(nnx.Module):
    """Norm, activation, convolution to RGB; doubles the size if stage 0 is empty."""

    def __init__(self, arch: Variant, layers: Layers) -> None:
        width = arch.widths[0] if arch.decoder_depths[0] else arch.widths[1]
        self.norm = layers.norm("trms2d", width)
        if arch.decoder_depths[0]:
            self.conv = layers.conv(width, 3)
        else:
            self.conv = blocks.Upsample(width, 3, layers, form=arch.upsample)
        self.act: Activation = arch.output_act

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = blocks.ACTIVATIONS[self.act](self.norm(x))          # [B, H, W, C0] or [B, H/2, W/2, C1]
        return self.conv(x)                                     # [B, H, W, 3]
# fmt: on


# --- sizes ----------------------------------------------------------------------------------------

_F32 = Variant(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(0, 4, 8, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2),
    encoder_blocks=("res",) * 3 + ("evit",) * 3,
    decoder_blocks=("res",) * 3 + ("evit",) * 3,
    decoder_norms=("bn2d",) * 3 + ("trms2d",) * 3,
)
_SANA = Variant(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    encoder_blocks=("res",) * 3 + ("evit5",) * 3,
    decoder_blocks=("res",) * 3 + ("evit5",) * 3,
    decoder_norms=("trms2d",) * 6,
    downsample="stride",
    upsample="nearest",
    scaling_factor=0.41407,
)
_DCAE15 = Variant(  # residual blocks only, RMSNorm only, no shortcut at the latent
    latent_channels=128,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(0, 5, 10, 4, 4, 4),
    decoder_depths=(0, 5, 10, 4, 4, 4),
    encoder_blocks=("res",) * 6,
    decoder_blocks=("res",) * 6,
    decoder_norms=("trms2d",) * 6,
    output_act="silu",
    latent_shortcuts=False,
)
_TINY = Variant(  # ours, for a CPU; no published weights
    latent_channels=32,
    widths=(32, 32, 64, 64, 128),
    encoder_depths=(0, 1, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1, 1),
    encoder_blocks=("res",) * 3 + ("evit",) * 2,
    decoder_blocks=("res",) * 3 + ("evit",) * 2,
    decoder_norms=("bn2d",) * 3 + ("trms2d",) * 2,
)
_SMALL = Variant(  # ours, for hours on two CPU cores: most of its blocks are at low resolution
    latent_channels=32,
    widths=(32, 64, 64, 128, 128, 256),
    encoder_depths=(0, 1, 2, 2, 2, 1),
    decoder_depths=(0, 1, 2, 2, 2, 1),
    encoder_blocks=("res",) * 4 + ("evit",) * 2,
    decoder_blocks=("res",) * 4 + ("evit",) * 2,
    decoder_norms=("trms2d",) * 6,
    output_act="silu",
    block_scale=0.0,
)


def _deeper(arch: Variant, *widths: int, **changes: Any) -> Variant:
    """`arch` with further stages, each a copy of the last one except for its width."""
    longer = {
        field.name: getattr(arch, field.name) + getattr(arch, field.name)[-1:] * len(widths)
        for field in dataclasses.fields(arch)
        if isinstance(getattr(arch, field.name), tuple)
    }
    fields = longer | {"widths": arch.widths + widths} | changes
    return dataclasses.replace(arch, **fields)


VARIANTS = {
    "tiny": _TINY,
    "tiny-1.5": dataclasses.replace(
        _TINY,
        encoder_blocks=("res",) * 5,
        decoder_blocks=("res",) * 5,
        decoder_norms=("trms2d",) * 5,
        output_act="silu",
        latent_shortcuts=False,
        block_scale=0.0,
    ),
    # Cheaper decoders for configs/distill.py, as f32c32-lite is of f32c32-sana.
    "tiny-lite": dataclasses.replace(_TINY, decoder_widths=(24, 24, 32, 64, 128)),
    "small": _SMALL,
    "small-lite": dataclasses.replace(_SMALL, decoder_widths=(32, 32, 64, 64, 128, 256)),
    "f32c32": _F32,
    "f64c128": _deeper(_F32, 2048, latent_channels=128),
    "f128c512": _deeper(_F32, 2048, 2048, latent_channels=512),
    "f32c32-sana": _SANA,
    "f32c32-lite": dataclasses.replace(
        _SANA,
        decoder_depths=(0, 3, 5, 4, 4, 4),
        decoder_blocks=("res",) * 6,
        upsample="c2s",
        output_act="silu",
    ),
    "1.5-f32c128": _DCAE15,
    "1.5-f64c128": _deeper(_DCAE15, 1024, scaling_factor=0.5935),
}


def variant(name: str) -> Variant:
    """The architecture of a key of VARIANTS or a published name. Raises UserError."""
    if cut := CUT.fullmatch(name):
        name = cut[1]
    if name in PUBLISHED:
        base, scaling = PUBLISHED[name]
        return dataclasses.replace(VARIANTS[base], scaling_factor=scaling)
    if name not in VARIANTS:
        known = ", ".join([*VARIANTS, *PUBLISHED])
        raise UserError(f"model.variant={name!r} is not known; choose one of {known}")
    return VARIANTS[name]


def architecture(model_config: Model) -> Variant:
    """The architecture of a run: config.model's variant, overridden by the keys set beside it.

    Empty or zero keys keep the variant's value. Raises UserError if a key does not fit.
    """
    arch = variant(model_config.variant)
    lists = ("widths", "decoder_widths", "encoder_depths", "decoder_depths")
    keys = ("latent_channels", "scaling_factor", *lists)
    given = {key: getattr(model_config, key) for key in keys if getattr(model_config, key)}
    arch = dataclasses.replace(arch, residual=model_config.residual, **given)
    stages = len(arch.encoder_blocks)
    for key in lists:
        values = getattr(arch, key) or arch.widths
        if len(values) != stages:
            raise UserError(
                f"model.{key}={values} has {len(values)} entries; "
                f"variant {model_config.variant} has {stages} stages"
            )
        if 0 in values[1:]:
            raise UserError(f"model.{key}={values}: only the first entry may be 0")
    _check_widths(arch, "widths", arch.encoder_blocks)
    _check_widths(arch, "decoder_widths" if arch.decoder_widths else "widths", arch.decoder_blocks)
    return arch


def _check_widths(arch: Variant, key: str, kinds: tuple[BlockKind, ...]) -> None:
    """Raises UserError unless the widths in `key` fit a half with blocks of these kinds."""
    widths = getattr(arch, key)
    for i, width in enumerate(widths):
        # 4: space-to-channel turns 1 channel into 4
        multiple = blocks.HEAD_DIM if "evit" in kinds[i] else 4
        if width % multiple:
            raise UserError(
                f"model.{key}={widths}: {width} in stage {i} is not a multiple of {multiple}"
            )
    # Averaging and duplicating need whole groups of channels.
    pairs = [(4 * a, b) for a, b in itertools.pairwise(widths)] if arch.residual else []
    if not arch.cuttable:
        pairs.append((widths[-1], arch.latent_channels))
    for wide, narrow in pairs:
        if wide % narrow:
            raise UserError(
                f"model.{key}={widths}, latent_channels={arch.latent_channels}: a shortcut "
                f"cannot average {wide} channels into {narrow}; use widths that divide"
            )


def create(
    model_config: Model, *, platform: str, remat: bool, dtype: DTypeLike, rngs: Rngs
) -> DCAE:
    """The model of config.model for devices of `platform` ('cpu', 'tpu', 'gpu').

    The platform is the mesh's, not this machine's: a CPU host can compile for a TPU.
    """
    form = depthwise_form(model_config.depthwise, platform)
    return DCAE(architecture(model_config), depthwise=form, remat=remat, dtype=dtype, rngs=rngs)


def reach(arch: Variant) -> tuple[int | None, int | None]:
    """Receptive-field radius of (encode, decode) in latents; None: unbounded (attention).

    Counted at the current size: a 3x3 convolution adds one position, a residual block two.
    """
    encode, n = None, 0
    if not _attends(arch.encoder_blocks, arch.encoder_depths):
        for i, depth in enumerate(arch.encoder_depths):
            n += (1 if i == 0 and depth else 0) + 2 * depth
            if i + 1 < len(arch.widths):
                n = -(-(n + 1) // 2)
        encode = n + 1
    decode, n = None, 1
    if not _attends(arch.decoder_blocks, arch.decoder_depths):
        for i in reversed(range(len(arch.widths))):
            n += 2 * arch.decoder_depths[i]
            if i > 0:
                n = 2 * (n + 1) if arch.upsample == "c2s" else 2 * n + 1
        decode = -(-(n + bool(arch.decoder_depths[0])) // arch.compression)
    return encode, decode


def _attends(kinds: tuple[BlockKind, ...], depths: tuple[int, ...]) -> bool:
    return any("evit" in kind for kind, depth in zip(kinds, depths, strict=True) if depth)


def cut(weights: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The weights of the model of only the first latent channels, from those of a cuttable one."""
    out, into = "encoder.project_out.", "decoder.project_in.kernel"
    kept = {name: weights[name][..., :channels] for name in (f"{out}kernel", f"{out}bias")}
    return {**weights, **kept, into: weights[into][:, :, :channels]}


def last_layer(arch: Variant) -> str:
    """Path of the last convolution's kernel; its gradient norms set the weight of the GAN loss."""
    conv = "conv" if arch.decoder_depths[0] else "conv.conv"
    return f"decoder.project_out.{conv}.kernel"
