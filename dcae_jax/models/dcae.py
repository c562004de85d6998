# SPDX-License-Identifier: Apache-2.0
"""DC-AE, the deep compression autoencoder (arXiv:2410.10733), and DC-AE 1.5 (arXiv:2508.00413).

An encoder of stages, each half the size of the one before, and a decoder that mirrors it. Where
the size changes, a shortcut without parameters carries the signal past the convolution.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dcae_jax.config import UserError
from dcae_jax.models import layers
from dcae_jax.models.layers import Array


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
    encoder_blocks: tuple[str, ...]  # 'res', 'evit' or 'evit5' (with the 5x5 heads)
    decoder_blocks: tuple[str, ...]
    decoder_norms: tuple[str, ...]  # 'bn2d' (then the activation is ReLU) or 'trms2d' (SiLU)
    downsample: str = "s2c"  # or 'stride'
    upsample: str = "c2s"  # or 'nearest'
    output_act: str = "relu"
    latent_shortcuts: bool = True  # the averaging and duplicating ones at the latent
    residual: bool = True  # False: no shortcut at all, the paper's ablation
    scaling_factor: float | None = None  # latent * scaling_factor has an rms of about 1

    @property
    def compression(self) -> int:
        """Pixels a side that one latent position stands for (f)."""
        return 2 ** (len(self.widths) - 1)


def _f(latent, extra=(), blocks=("evit", "evit"), depths=(2, 2), scaling=None):
    """The in-1.0 and mix-1.0 family: f32 with further stages of 2048 channels."""
    n = 6 + len(extra)
    return Variant(
        latent_channels=latent,
        widths=(128, 256, 512, 512, 1024, 1024, *extra),
        encoder_depths=(0, 4, 8, *(2,) * (n - 3)),
        decoder_depths=(0, 5, 10, *(2,) * (n - 3)),
        encoder_blocks=("res",) * 3 + ("evit",) * (n - 3),
        decoder_blocks=("res",) * 3 + ("evit",) * (n - 3),
        decoder_norms=("bn2d",) * 3 + ("trms2d",) * (n - 3),
        scaling_factor=scaling,
    )


def _dcae15(extra=(), scaling=None):
    """DC-AE 1.5: residual blocks only, RMSNorm only, no shortcut at the latent."""
    n = 6 + len(extra)
    depths = (0, 5, 10, *(4,) * (n - 3))
    return Variant(
        latent_channels=128,
        widths=(128, 256, 512, 512, 1024, 1024, *extra),
        encoder_depths=depths,
        decoder_depths=depths,
        encoder_blocks=("res",) * n,
        decoder_blocks=("res",) * n,
        decoder_norms=("trms2d",) * n,
        output_act="silu",
        latent_shortcuts=False,
        scaling_factor=scaling,
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

VARIANTS = {
    "tiny": Variant(
        latent_channels=32,
        widths=(32, 32, 64, 64, 128),
        encoder_depths=(0, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1),
        encoder_blocks=("res", "res", "res", "evit", "evit"),
        decoder_blocks=("res", "res", "res", "evit", "evit"),
        decoder_norms=("bn2d", "bn2d", "bn2d", "trms2d", "trms2d"),
    ),
    "f32c32": _f(32),
    "f64c128": _f(128, (2048,)),
    "f128c512": _f(512, (2048, 2048)),
    "f32c32-sana": _SANA,
    "f32c32-lite": dataclasses.replace(
        _SANA,
        decoder_depths=(0, 3, 5, 4, 4, 4),
        decoder_blocks=("res",) * 6,
        upsample="c2s",
        output_act="silu",
    ),
    "1.5-f32c128": _dcae15(),
    "1.5-f64c128": _dcae15((1024,), scaling=0.5935),
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


def architecture(model_config: Any) -> Variant:
    """The architecture of a run: config.model's variant with the keys set beside it.

    Empty or zero keys keep the variant's own value. Raises UserError where a key does not fit.
    """
    arch = variant(model_config.variant)
    changes = {"residual": model_config.residual}
    for key in ("latent_channels", "widths", "encoder_depths", "decoder_depths"):
        if model_config[key]:
            value = model_config[key]
            changes[key] = value if key == "latent_channels" else tuple(value)
    if model_config.scaling_factor:
        changes["scaling_factor"] = model_config.scaling_factor
    arch = dataclasses.replace(arch, **changes)
    stages = len(arch.encoder_blocks)
    for key in ("widths", "encoder_depths", "decoder_depths"):
        if len(getattr(arch, key)) != stages:
            raise UserError(
                f"model.{key}={getattr(arch, key)} has {len(getattr(arch, key))} entries; "
                f"variant {model_config.variant} has {stages} stages"
            )
        if 0 in getattr(arch, key)[1:]:
            raise UserError(f"model.{key}={getattr(arch, key)}: only the first entry may be 0")
    for i, width in enumerate(arch.widths):
        attention = "evit" in (arch.encoder_blocks[i] + arch.decoder_blocks[i])
        if width % (layers.HEAD_DIM if attention else 4):
            raise UserError(
                f"model.widths={arch.widths}: {width} in stage {i} is no multiple of "
                f"{layers.HEAD_DIM if attention else 4}"
            )
    if arch.residual:
        _check_shortcuts(arch)
    return arch


def _check_shortcuts(arch: Variant) -> None:
    """Averaging and duplicating need whole groups of channels."""
    pairs = [(4 * a, b) for a, b in zip(arch.widths, arch.widths[1:], strict=False)]
    if arch.latent_shortcuts:
        pairs.append((arch.widths[-1], arch.latent_channels))
    for wide, narrow in pairs:
        if wide % narrow:
            raise UserError(
                f"model.widths={arch.widths}, latent_channels={arch.latent_channels}: a shortcut "
                f"cannot average {wide} channels into {narrow}; use widths that divide"
            )


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> latents [B, H/f, W/f, latent_channels]."""

    def __init__(self, arch: Variant, *, depthwise, dtype, init):
        form = dict(form=arch.downsample, dtype=dtype, init=init)
        if arch.encoder_depths[0] == 0:
            self.project_in = layers.Downsample(3, arch.widths[1], shortcut=False, **form)
        else:
            self.project_in = layers.Conv(3, arch.widths[0], dtype=dtype, init=init)
        self.stages = nnx.List()
        last = len(arch.widths) - 1
        for i, (width, depth) in enumerate(zip(arch.widths, arch.encoder_depths, strict=True)):
            kind = arch.encoder_blocks[i]
            blocks = [
                _block(kind, width, "trms2d", depthwise=depthwise, dtype=dtype, init=init)
                for _ in range(depth)
            ]
            if depth and i < last:
                blocks.append(
                    layers.Downsample(width, arch.widths[i + 1], shortcut=arch.residual, **form)
                )
            self.stages.append(nnx.List(blocks))
        self.project_out = layers.Conv(
            arch.widths[-1], arch.latent_channels, dtype=dtype, init=init
        )
        self.shortcut = arch.residual and arch.latent_shortcuts
        self.remat = False

    def __call__(self, x: Array) -> Array:
        x = self.project_in(x)
        for stage in self.stages:
            x = layers.run(stage, x, remat=self.remat)
        z = self.project_out(x)
        return z + layers.average_channels(x, z.shape[-1]) if self.shortcut else z


class Decoder(nnx.Module):
    """Latents [B, H/f, W/f, latent_channels] -> images [B, H, W, 3]."""

    def __init__(self, arch: Variant, *, depthwise, dtype, init):
        form = dict(form=arch.upsample, dtype=dtype, init=init)
        self.project_in = layers.Conv(arch.latent_channels, arch.widths[-1], dtype=dtype, init=init)
        stages: list[nnx.List] = [None] * len(arch.widths)
        last = len(arch.widths) - 1
        for i in reversed(range(len(arch.widths))):  # the order in which they run
            width, depth = arch.widths[i], arch.decoder_depths[i]
            blocks = []
            if depth and i < last:
                blocks.append(
                    layers.Upsample(arch.widths[i + 1], width, shortcut=arch.residual, **form)
                )
            kind, norm_kind = arch.decoder_blocks[i], arch.decoder_norms[i]
            for _ in range(depth):
                blocks.append(
                    _block(kind, width, norm_kind, depthwise=depthwise, dtype=dtype, init=init)
                )
            stages[i] = nnx.List(blocks)
        self.stages = nnx.List(stages)
        outer = arch.widths[0] if arch.decoder_depths[0] else arch.widths[1]
        self.project_out = OutputHead(
            outer, arch, upsamples=not arch.decoder_depths[0], dtype=dtype, init=init
        )
        self.shortcut = arch.residual and arch.latent_shortcuts
        self.remat = False
        self.width = arch.widths[-1]

    def __call__(self, z: Array) -> Array:
        x = self.project_in(z)
        if self.shortcut:
            x = x + layers.duplicate_channels(z, self.width).astype(x.dtype)
        for stage in reversed(self.stages):
            x = layers.run(stage, x, remat=self.remat)
        return self.project_out(x)


class OutputHead(nnx.Module):
    """norm, activation, convolution to RGB; with `upsamples`, to twice the size."""

    def __init__(self, width, arch: Variant, *, upsamples, dtype, init):
        self.norm = layers.norm("trms2d", width, dtype=dtype, init=init)
        if upsamples:
            self.conv = layers.Upsample(
                width, 3, form=arch.upsample, shortcut=False, dtype=dtype, init=init
            )
        else:
            self.conv = layers.Conv(width, 3, dtype=dtype, init=init)
        self.act = arch.output_act

    def __call__(self, x: Array) -> Array:
        return self.conv(layers.ACTIVATIONS[self.act](self.norm(x)))


class DCAE(nnx.Module):
    """The autoencoder. It is deterministic: there is no posterior and no KL term."""

    def __init__(self, arch: Variant, *, depthwise: str, dtype: Any, init: layers.Init):
        self.encoder = Encoder(arch, depthwise=depthwise, dtype=dtype, init=init)
        self.decoder = Decoder(arch, depthwise=depthwise, dtype=dtype, init=init)

    def encode(self, x: Array) -> Array:
        """[B, H, W, 3] float in [-1, 1] -> [B, H/f, W/f, c] float32, unscaled."""
        return self.encoder(x).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """[B, H/f, W/f, c], unscaled -> [B, H, W, 3] float32, about [-1, 1], not clipped."""
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


def _block(kind, width, norm_kind, *, depthwise, dtype, init):
    if kind == "res":
        act = "relu" if norm_kind == "bn2d" else "silu"
        return layers.ResBlock(width, norm_kind=norm_kind, act=act, dtype=dtype, init=init)
    return layers.EfficientViTBlock(
        width,
        scale5=kind == "evit5",
        norm_kind=norm_kind,
        depthwise=depthwise,
        dtype=dtype,
        init=init,
    )


def create(model_config: Any, *, platform: str, dtype: Any, init: layers.Init) -> DCAE:
    """The model of config.model for devices of `platform` ('cpu', 'tpu', 'gpu').

    Nothing here looks at the machine: the platform comes from the mesh, so that a CPU host can
    build the program of a TPU.
    """
    form = depthwise_form(model_config, platform)
    return DCAE(architecture(model_config), depthwise=form, dtype=jnp.dtype(dtype), init=init)


def depthwise_form(model_config: Any, platform: str) -> str:
    """config.model.depthwise with 'auto' decided for devices of `platform`."""
    if model_config.depthwise != "auto":
        return model_config.depthwise
    return "shifted" if platform == "cpu" else "grouped"


def count_parameters(arch: Variant) -> tuple[int, int]:
    """Numbers of parameters of (the whole model, its encoder), without allocating them."""

    model = DCAE(arch, depthwise="grouped", dtype=jnp.float32, init=layers.shapes)
    _, params, _ = layers.split(model)
    sizes = {name: leaf.size for name, leaf in params.items()}
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    return sum(sizes.values()), encoder


def reach(arch: Variant) -> tuple[int | None, int | None]:
    """Latents on each side that a result of (encode, decode) depends on; None: on all, attention.

    How far the zeros around a tile spread, in positions of the current size: a 3x3 convolution
    carries them one further, a residual block two.
    """
    last = len(arch.widths) - 1

    def convolutions(blocks, depths):
        return not any("evit" in kind for kind, n in zip(blocks, depths, strict=True) if n)

    encode, n = None, 0
    if convolutions(arch.encoder_blocks, arch.encoder_depths):
        for i, depth in enumerate(arch.encoder_depths):
            n += (1 if i == 0 and depth else 0) + 2 * depth
            if i < last:
                n = -(-(n + 1) // 2)
        encode = n + 1
    decode, n = None, 1
    if convolutions(arch.decoder_blocks, arch.decoder_depths):
        for i in reversed(range(last + 1)):
            n += 2 * arch.decoder_depths[i]
            if i > 0:
                n = 2 * (n + 1) if arch.upsample == "c2s" else 2 * n + 1
        n += 1 if arch.decoder_depths[0] else 0
        decode = -(-n // arch.compression)
    return encode, decode


def last_layer(arch: Variant) -> str:
    """Path of the kernel that makes the picture, whose gradient weighs the GAN loss."""
    upsamples = not arch.decoder_depths[0]
    return (
        "decoder.project_out.conv.conv.kernel" if upsamples else "decoder.project_out.conv.kernel"
    )
