# SPDX-License-Identifier: Apache-2.0
"""DC-AE, the deep compression autoencoder (arXiv:2410.10733), and DC-AE 1.5 (arXiv:2508.00413).

An encoder of stages, each half the size of the one before, and a decoder that mirrors it. Where
the size changes, a shortcut without parameters carries the signal past the convolution.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import Rngs
from jax.typing import DTypeLike

from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models import blocks, layers
from dcae_jax.models.blocks import Activation, BlockKind, DownsampleForm, UpsampleForm
from dcae_jax.models.layers import DepthwiseForm, NormKind
from dcae_jax.models.weights import Array


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture. The tuples have one entry a stage, from full size to the deepest.

    A stage of depth 0 is allowed only at index 0: it is then left out, and the first (last)
    convolution halves (doubles) the size on its way.
    """

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    encoder_blocks: tuple[BlockKind, ...]
    decoder_blocks: tuple[BlockKind, ...]
    decoder_norms: tuple[NormKind, ...]  # bn2d: then the activation is ReLU; trms2d: SiLU
    downsample: DownsampleForm = "s2c"
    upsample: UpsampleForm = "c2s"
    output_act: Activation = "relu"
    latent_shortcuts: bool = True  # the averaging and duplicating ones at the latent
    residual: bool = True  # False: no shortcut at all, the paper's ablation
    scaling_factor: float | None = None  # latent * scaling_factor has an rms of about 1

    @property
    def compression(self) -> int:
        """Downsampling factor f: pixels per latent position, along each side."""
        return 2 ** (len(self.widths) - 1)


_RES3 = ("res", "res", "res")
_BN3 = ("bn2d", "bn2d", "bn2d")
_F32 = Variant(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(0, 4, 8, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2),
    encoder_blocks=_RES3 + ("evit",) * 3,
    decoder_blocks=_RES3 + ("evit",) * 3,
    decoder_norms=_BN3 + ("trms2d",) * 3,
)
_SANA = Variant(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    encoder_blocks=_RES3 + ("evit5",) * 3,
    decoder_blocks=_RES3 + ("evit5",) * 3,
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


def _deeper(arch: Variant, *widths: int, **changes: Any) -> Variant:
    """`arch` with further stages of these widths, each made as its last one."""
    longer = {
        field.name: getattr(arch, field.name) + getattr(arch, field.name)[-1:] * len(widths)
        for field in dataclasses.fields(arch)
        if isinstance(getattr(arch, field.name), tuple)
    }
    return dataclasses.replace(arch, **longer | {"widths": arch.widths + widths} | changes)


VARIANTS = {
    "tiny": Variant(
        latent_channels=32,
        widths=(32, 32, 64, 64, 128),
        encoder_depths=(0, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1),
        encoder_blocks=_RES3 + ("evit",) * 2,
        decoder_blocks=_RES3 + ("evit",) * 2,
        decoder_norms=_BN3 + ("trms2d",) * 2,
    ),
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

# Published name -> (variant, scaling factor of those weights).
PUBLISHED = {
    "dc-ae-f32c32-in-1.0": ("f32c32", 0.3189),
    "dc-ae-f32c32-mix-1.0": ("f32c32", 0.4552),
    "dc-ae-f64c128-in-1.0": ("f64c128", 0.2889),
    "dc-ae-f64c128-mix-1.0": ("f64c128", 0.4538),
    "dc-ae-f128c512-in-1.0": ("f128c512", 0.4883),
    "dc-ae-f128c512-mix-1.0": ("f128c512", 0.3620),
    "dc-ae-f32c32-sana-1.0": ("f32c32-sana", 0.41407),
    "dc-ae-f32c32-sana-1.1": ("f32c32-sana", 0.41407),
    "dc-ae-lite-f32c32": ("f32c32-lite", 0.41407),
    "dc-ae-lite-f32c32-sana-1.1": ("f32c32-lite", 0.41407),
    "dc-ae-f32c128-1.5": ("1.5-f32c128", None),
    "dc-ae-f64c128-1.5": ("1.5-f64c128", 0.5935),
}


def variant(name: str) -> Variant:
    """The architecture called `name`, a key of VARIANTS or a published name."""
    if name in PUBLISHED:
        base, scaling = PUBLISHED[name]
        return dataclasses.replace(VARIANTS[base], scaling_factor=scaling)
    if name not in VARIANTS:
        known = ", ".join([*VARIANTS, *PUBLISHED])
        raise UserError(f"model.variant={name!r} is not known; choose one of {known}")
    return VARIANTS[name]


def architecture(model_config: Model) -> Variant:
    """The architecture of a run: config.model's variant with the keys set beside it.

    Empty or zero keys keep the variant's own value. Raises UserError where a key does not fit.
    """
    arch = variant(model_config.variant)
    changes: dict[str, Any] = {"residual": model_config.residual}
    for key in ("latent_channels", "scaling_factor"):
        if getattr(model_config, key):
            changes[key] = getattr(model_config, key)
    for key in ("widths", "encoder_depths", "decoder_depths"):
        if getattr(model_config, key):
            changes[key] = tuple(getattr(model_config, key))
    arch = dataclasses.replace(arch, **changes)
    stages = len(arch.encoder_blocks)
    for key in ("widths", "encoder_depths", "decoder_depths"):
        values = getattr(arch, key)
        if len(values) != stages:
            raise UserError(
                f"model.{key}={values} has {len(values)} entries; "
                f"variant {model_config.variant} has {stages} stages"
            )
        if 0 in values[1:]:
            raise UserError(f"model.{key}={values}: only the first entry may be 0")
    for i, width in enumerate(arch.widths):
        attention = "evit" in (arch.encoder_blocks[i] + arch.decoder_blocks[i])
        multiple = blocks.HEAD_DIM if attention else 4
        if width % multiple:
            raise UserError(
                f"model.widths={arch.widths}: {width} in stage {i} is no multiple of {multiple}"
            )
    # Averaging and duplicating need whole groups of channels.
    pairs = [(4 * a, b) for a, b in itertools.pairwise(arch.widths)] if arch.residual else []
    if arch.residual and arch.latent_shortcuts:
        pairs.append((arch.widths[-1], arch.latent_channels))
    for wide, narrow in pairs:
        if wide % narrow:
            raise UserError(
                f"model.widths={arch.widths}, latent_channels={arch.latent_channels}: a shortcut "
                f"cannot average {wide} channels into {narrow}; use widths that divide"
            )
    return arch


class Encoder(nnx.Module):
    """Images -> latents; each stage is half the size of the one before."""

    def __init__(
        self, arch: Variant, *, depthwise: DepthwiseForm, remat: bool, dtype: DTypeLike, rngs: Rngs
    ) -> None:
        if arch.encoder_depths[0] == 0:
            self.project_in = blocks.Downsample(
                3, arch.widths[1], form=arch.downsample, shortcut=False, dtype=dtype, rngs=rngs
            )
        else:
            self.project_in = layers.conv(3, arch.widths[0], dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            encoder_stage(arch, i, depthwise=depthwise, dtype=dtype, rngs=rngs)
            for i in range(len(arch.widths))
        )
        self.project_out = layers.conv(
            arch.widths[-1], arch.latent_channels, dtype=dtype, rngs=rngs
        )
        self.shortcut = arch.residual and arch.latent_shortcuts
        self.remat = remat

    def __call__(self, x: Array) -> Array:  # [B, H, W, 3]
        x = self.project_in(x)  # [B, H, W, C0], or [B, H/2, W/2, C1] past an empty stage 0
        for stage in self.stages:
            x = layers.run(stage, x, remat=self.remat)  # [B, H/2, W/2, C1] .. [B, H/f, W/f, Cn]
        z = self.project_out(x)  # [B, H/f, W/f, c]
        if self.shortcut:
            z = z + blocks.average_channels(x, z.shape[-1])  # [B, H/f, W/f, c]
        return z


class Decoder(nnx.Module):
    """Latents -> images. `stages` goes from full size to the deepest, which runs first."""

    def __init__(
        self, arch: Variant, *, depthwise: DepthwiseForm, remat: bool, dtype: DTypeLike, rngs: Rngs
    ) -> None:
        self.project_in = layers.conv(arch.latent_channels, arch.widths[-1], dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            decoder_stage(arch, i, depthwise=depthwise, dtype=dtype, rngs=rngs)
            for i in range(len(arch.widths))
        )
        self.project_out = OutputHead(arch, dtype=dtype, rngs=rngs)
        self.shortcut = arch.residual and arch.latent_shortcuts
        self.remat = remat

    def __call__(self, z: Array) -> Array:  # [B, H/f, W/f, c]
        x = self.project_in(z)  # [B, H/f, W/f, Cn]
        if self.shortcut:
            x = x + blocks.duplicate_channels(z, x.shape[-1]).astype(x.dtype)  # [B, H/f, W/f, Cn]
        for stage in reversed(self.stages):
            x = layers.run(stage, x, remat=self.remat)  # [B, H/f, W/f, Cn] .. [B, H, W, C0]
        return self.project_out(x)  # [B, H, W, 3]


def encoder_stage(
    arch: Variant, i: int, *, depthwise: DepthwiseForm, dtype: DTypeLike, rngs: Rngs
) -> nnx.List:
    """The blocks of stage i and, but for the deepest, the way down to the next.

    [B, H/2^i, W/2^i, Ci] -> [B, H/2^(i+1), W/2^(i+1), C(i+1)]
    """
    kind, width, depth = arch.encoder_blocks[i], arch.widths[i], arch.encoder_depths[i]
    stage: list[nnx.Module] = [
        blocks.block(kind, width, "trms2d", depthwise=depthwise, dtype=dtype, rngs=rngs)
        for _ in range(depth)
    ]
    if depth and i + 1 < len(arch.widths):
        stage.append(
            blocks.Downsample(
                width,
                arch.widths[i + 1],
                form=arch.downsample,
                shortcut=arch.residual,
                dtype=dtype,
                rngs=rngs,
            )
        )
    return nnx.List(stage)


def decoder_stage(
    arch: Variant, i: int, *, depthwise: DepthwiseForm, dtype: DTypeLike, rngs: Rngs
) -> nnx.List:
    """But for the deepest, the way up from the stage below, then the blocks of stage i.

    [B, H/2^(i+1), W/2^(i+1), C(i+1)] -> [B, H/2^i, W/2^i, Ci]
    """
    kind, norm = arch.decoder_blocks[i], arch.decoder_norms[i]
    width, depth = arch.widths[i], arch.decoder_depths[i]
    stage: list[nnx.Module] = []
    if depth and i + 1 < len(arch.widths):
        stage.append(
            blocks.Upsample(
                arch.widths[i + 1],
                width,
                form=arch.upsample,
                shortcut=arch.residual,
                dtype=dtype,
                rngs=rngs,
            )
        )
    for _ in range(depth):
        stage.append(blocks.block(kind, width, norm, depthwise=depthwise, dtype=dtype, rngs=rngs))
    return nnx.List(stage)


class OutputHead(nnx.Module):
    """norm, activation, convolution to RGB; to twice the size where stage 0 is empty."""

    def __init__(self, arch: Variant, *, dtype: DTypeLike, rngs: Rngs) -> None:
        width = arch.widths[0] if arch.decoder_depths[0] else arch.widths[1]
        self.norm = layers.norm("trms2d", width, dtype=dtype)
        if arch.decoder_depths[0]:
            self.conv = layers.conv(width, 3, dtype=dtype, rngs=rngs)
        else:
            self.conv = blocks.Upsample(
                width, 3, form=arch.upsample, shortcut=False, dtype=dtype, rngs=rngs
            )
        self.act: Activation = arch.output_act

    def __call__(self, x: Array) -> Array:  # [B, H, W, C0], or [B, H/2, W/2, C1]
        x = blocks.ACTIVATIONS[self.act](self.norm(x))
        return self.conv(x)  # [B, H, W, 3]


class DCAE(nnx.Module):
    """The autoencoder. It is deterministic: there is no posterior and no KL term.

    depthwise: see `layers.depthwise_conv`. remat: see `layers.run`.
    """

    def __init__(
        self,
        arch: Variant,
        *,
        depthwise: DepthwiseForm,
        remat: bool = False,
        dtype: DTypeLike,
        rngs: Rngs,
    ) -> None:
        self.encoder = Encoder(arch, depthwise=depthwise, remat=remat, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(arch, depthwise=depthwise, remat=remat, dtype=dtype, rngs=rngs)

    def encode(self, x: Array) -> Array:
        """[B, H, W, 3] float in [-1, 1] -> [B, H/f, W/f, c] float32, unscaled."""
        return self.encoder(x).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """[B, H/f, W/f, c], unscaled -> [B, H, W, 3] float32, about [-1, 1], not clipped."""
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:  # [B, H, W, 3]
        return self.decode(self.encode(x))  # [B, H, W, 3]


def create(
    model_config: Model, *, platform: str, remat: bool, dtype: DTypeLike, rngs: Rngs
) -> DCAE:
    """The model of config.model for devices of `platform` ('cpu', 'tpu', 'gpu').

    The platform is the mesh's, not this machine's: a CPU host can build the program of a TPU.
    """
    form = depthwise_form(model_config, platform)
    return DCAE(architecture(model_config), depthwise=form, remat=remat, dtype=dtype, rngs=rngs)


def depthwise_form(model_config: Model, platform: str) -> DepthwiseForm:
    """config.model.depthwise with 'auto' decided for devices of `platform`."""
    if model_config.depthwise != "auto":
        return model_config.depthwise
    return "shifted" if platform == "cpu" else "grouped"


def reach(arch: Variant) -> tuple[int | None, int | None]:
    """Latents on each side that a result of (encode, decode) depends on; None: on all, attention.

    In positions of the current size: a 3x3 convolution reaches one further, a residual block two.
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


def last_layer(arch: Variant) -> str:
    """Path of the kernel that makes the image, whose gradient weighs the GAN loss."""
    return f"decoder.project_out.conv.{'' if arch.decoder_depths[0] else 'conv.'}kernel"
