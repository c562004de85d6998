# SPDX-License-Identifier: Apache-2.0
"""Every configuration key, once: type, default, bounds or choices, meaning.

The files of configs/ start from `default()` and override a few keys. After parsing,
`validation.validate` turns the ConfigDict into a frozen `Config`. A function takes the section
that it reads: a nested one, such as `config.loss`, or one of the flat ones that `Config` inherits
from (`Job`, `Training`, `Diffusion`), for which a whole `Config` can stand.

Bounds: ge (>=), gt (>), le (<=), lt (<).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")

INT_MAX = 2**31 - 1  # counters and sizes are int32 on the devices


def key(
    default: T,
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    length: tuple[int, ...] = (),
) -> T:
    """A key. Of a tuple, the bounds are of each entry, `length` holds the lengths it may have."""
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "length": length}
    return dataclasses.field(default=default, metadata={"meaning": meaning, **rules})


# fmt: off
# --- sections -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """config.model: an autoencoder or the network of a diffusion model."""

    name: str = key("auto", "the file of dcae_jax/models that builds it; auto: the autoencoder's")
    variant: str = key("f32c32", "a row of VARIANTS there, or a published name")
    residual: bool = key(True, "False drops the parameter-free shortcuts (the paper's ablation)")
    depthwise: Literal["auto", "grouped", "shifted"] = key("auto", "auto = shifted on a CPU")
    latent_channels: int = key(0, "0 and () keep the variant's own", ge=0, le=2**16)
    widths: tuple[int, ...] = key((), "channels per stage", ge=1, le=2**16)
    encoder_depths: tuple[int, ...] = key((), "blocks per stage", ge=0, le=1000)
    decoder_depths: tuple[int, ...] = key((), "blocks per stage", ge=0, le=1000)
    scaling_factor: float = key(0.0,
        "latent * this has an rms of about 1; goes with the weights", ge=0, le=1000000.0)
    depth: int = key(0, "of a transformer: blocks; 0 keeps the variant's own", ge=0, le=1000)
    width: int = key(0, "of a transformer: channels; 0 likewise", ge=0, le=2**16)
    heads: int = key(0, "of a transformer; 0 likewise", ge=0, le=2**12)
    latent_size: int = key(0,
        "of a transformer: positions per side; 0: those of the latents", ge=0, le=2**12)
    num_classes: int = key(0, "of a transformer; 0: those of the latents", ge=0, le=INT_MAX)


@dataclasses.dataclass(frozen=True)
class Loss:
    """config.loss: of an autoencoder and its discriminator."""

    l1_weight: float = key(1.0, "weight of the mean absolute error", ge=0)
    lpips_weight: float = key(1.0, "weight of the perceptual loss; > 0 needs lpips_weights", ge=0)
    lpips_weights: str = key("", "converted VGG16 file (docs/evaluation.md)")
    gan_weight: float = key(0.0,
        "weight of the PatchGAN loss, before the adaptive weight; 0: no GAN", ge=0)
    gan_warmup_steps: int = key(1000,
        "steps that train the discriminator alone on the GAN loss", ge=0)
    gan_adaptive_max: float = key(10.0,
        "bound of the ratio of gradient norms at the last layer", ge=0)
    gan_learning_rate: float = key(5.4e-5, "of the discriminator", gt=0)
    gan_channels: int = key(64, "of the discriminator's first layer", ge=1)
    gan_layers: int = key(3, "that halve the size", ge=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """config.optimizer: AdamW, its schedule, decay and clipping."""

    learning_rate: float = key(6.4e-5, "after the warm-up", gt=0)
    schedule: Literal["constant", "cosine"] = key("constant",
        "after the warm-up: constant, or cosine to 0 at `steps`")
    warmup_steps: int = key(50_000, "of a linear warm-up", ge=0)
    warmup_from: float = key(0.1, "fraction of the learning rate at step 0", ge=0, le=1)
    b1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    b2: float = key(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the root of the second moment", gt=0, lt=1)
    weight_decay: float = key(0.1, "decoupled", ge=0)
    decay: tuple[str, ...] = key((r".*kernel",), "paths that decay; biases and norms do not")
    clip_norm: float = key(1.0, "global norm of the trained gradients; 0: no clipping", ge=0)


@dataclasses.dataclass(frozen=True)
class Data:
    """config.data: where images or latents come from, and how images are cut."""

    source: Literal["photos", "folder", "tfds", "mixture", "latents"] = key("photos",
        "photos (embedded), folder, tfds, mixture, or latents for diffusion")
    path: str = key("",
        "folder: images, searched recursively (evaluate also takes one image); latents")
    name: str = key("", "tfds: builder name, prepared as ArrayRecord")
    parts: tuple[tuple[float, str, str], ...] = key((),
        "mixture: ((weight, source, path), ...); path: folder, or tfds NAME/SPLIT")
    data_dir: str = key("", "tfds: where it was prepared; '' is tfds's own default")
    split: str = key("train", "tfds: split to read")
    held_out_path: str = key("", "folder: images for evaluation while training")
    held_out_split: str = key("validation", "tfds: likewise")
    held_out: float = key(0.02,
        "folder without held_out_path: fraction of files kept from training", ge=0, lt=1)
    crop: Literal["random", "random_resized", "center"] = key("random",
        "random (native scale), random_resized or center (ADM)")
    crop_area: tuple[float, float] = key((0.25, 1.0),
        "random_resized: fraction of the image's area", ge=0, le=1, length=(2,))
    flip: bool = key(True, "mirror half of the images")
    rotation: float = key(0.0, "degrees, uniform in +-", ge=0, le=180)
    color_jitter: float = key(0.0,
        "brightness, contrast, saturation: factor in 1 +- this", ge=0, le=1)
    workers: int = key(0, "reader processes; 0 reads in threads of this one", ge=0)
    threads: int = key(4, "reader threads (of each worker)", ge=1)
    prefetch: int = key(4, "batches read ahead (of each worker)", ge=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """config.evaluate: the job `evaluate`, and evaluation during training."""

    resolutions: tuple[int, ...] = key((256,),
        "pixels per side; (), in job evaluate: the protocol's, or `resolution`", ge=1, le=2**16)
    batch_size: int = key(32, "images per step, over all devices and processes", ge=1)
    count: int = key(1000, "images at most, spread over the source; 0: all", ge=0)
    crops: int = key(1, "per image: 1 is the ADM centre crop, more are fixed random crops", ge=1)
    grid: int = key(8, "images in the PNG grids", ge=1)
    lpips_weights: str = key("", "converted AlexNet file: unlocks LPIPS (docs/evaluation.md)")
    inception_weights: str = key("",
        "converted Inception file: unlocks rFID, FID, IS, KID and others")
    protocol: Literal["", "imagenet-256", "imagenet-512"] = key("",
        "imagenet-256 or imagenet-512: published figures compare with no other")
    samples: str = key("", "evaluate these, not a model: a folder of images, or an .npz with arr_0")
    reference: str = key("",
        "to compare samples with: a folder, or an .npz with arr_0, or mu and sigma")


@dataclasses.dataclass(frozen=True)
class Encode:
    """config.encode: the job `encode`, images to latents."""

    flip: bool = key(True, "keep the latents of the mirrored image too; the authors: False")
    crops: int = key(1, "per image: 1 is the ADM centre crop, more are fixed random crops", ge=1)
    count: int = key(0, "crops at most, spread over the source; 0: all", ge=0)
    dtype: Literal["bfloat16", "float16"] = key("bfloat16", "of the stored latents")
    shard_size: int = key(4096, "crops per file", ge=1)
    batch_size: int = key(64, "images per step, over all devices and processes", ge=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """config.sample: the job `sample`, and samples during training."""

    labels: tuple[int, ...] = key((),
        "classes, in turn; (): drawn uniformly from (seed, number)", ge=0, le=INT_MAX)
    count: int = key(16, "images", ge=1)
    guidance: float = key(1.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: tuple[float, float] = key((0.0, 1.0),
        "of the noise level (1: pure noise) where guidance acts", ge=0, le=1, length=(2,))
    steps: int = key(30, "evaluations of the network (an adaptive solver ignores it)", ge=1)
    sampler: str = key("", "docs/diffusion.md; '': the objective's own")
    format: Literal["grid", "png", "npz"] = key("grid",
        "grid (one PNG), png (one file per image) or npz (arr_0, uint8)")
    batch_size: int = key(16, "images at a time, over all devices and processes", ge=1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """config.plan: the job `plan`, what another job costs."""

    config: str = key("",
        "file of the job to plan, with :VARIANT: of training, or configs/sample.py")
    generator: str = key("",
        "of a job sample: file of the job that trains its model, with :VARIANT")
    overrides: tuple[str, ...] = key((), "keys of both, as ('batch_size=64', ...)")
    topologies: tuple[str, ...] = key(("v5e:2x2",),
        "v4, v5e, v5p or v6e with the chips along each axis; or cpu")
    find_batch: bool = key(False, "search the largest batch that fits")
    effort: float = key(-1.0,
        "of the compiler: 0 as in a run; -1 is 6 times faster (docs/scaling.md)")
    watts: float = key(0.0, "per chip, for kWh; 0: the table's assumption", ge=0, le=1000000.0)


@dataclasses.dataclass(frozen=True)
class Export:
    """config.export: the job `export`."""

    format: Literal["orbax", "diffusers", "authors", "stablehlo"] = key("orbax",
        "orbax, diffusers, authors or stablehlo")
    out: str = key("", "folder to write; it must not exist, or be empty")


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """config.mesh: devices along each axis; -1: what is left."""

    data: int = key(-1, "the batch", ge=-1, le=INT_MAX)
    fsdp: int = key(1, "the batch, and the weights and moments", ge=-1, le=INT_MAX)
    tensor: int = key(1, "heads and MLPs of transformers", ge=-1, le=INT_MAX)
    spatial: int = key(1, "the height of images", ge=-1, le=INT_MAX)


# --- flat keys ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What every job reads."""

    job: str = key("train", "train, phases, encode, sample, evaluate, export or plan")
    seed: int = key(0,
        "of the weights, the data's order and every random choice", ge=0, le=2**32 - 1)
    batch_size: int = key(256, "images per step, over all devices and processes", ge=1)
    resolution: int = key(256, "pixels per side; a multiple of the model's compression", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto",
        "compute: float32 (docs/evaluation.md), bfloat16; auto = bfloat16 except on a CPU")
    init_from: str = key("",
        "weights: a workdir or checkpoint, export, or published ones: docs/weights.md")
    weights: Literal["ema", "raw"] = key("ema",
        "which weights of a training run to read: ema or raw")


@dataclasses.dataclass(frozen=True)
class Training:
    """Of training. Authors' defaults where they published one (docs/training.md)."""

    resolutions: tuple[int, ...] = key((),
        "drawn uniformly, one per step, instead of `resolution` (repeat to weigh)", ge=1, le=2**16)
    needs_weights: bool = key(False, "starting without init_from is an error")
    init_parts: tuple[str, ...] = key((),
        "paths that init_from must fill, if it is of another model: docs/training.md; (): all")
    steps: int = key(100_000, "optimizer steps in all, also after a resume", ge=0)
    trainable: tuple[str, ...] = key((".*",),
        "paths to train, matched whole; {deepest}, {outermost}: docs/training.md")
    accumulate: int = key(1, "microbatches per step whose gradients are averaged", ge=1)
    ema_decay: float = key(0.9999,
        "decay at step t: ema_decay * (1 - exp(-t / ema_warmup)); 0: no averages", ge=0, lt=1)
    ema_warmup: int = key(2000, "steps", ge=1)
    log_every: int = key(100, "steps between rows of metrics.jsonl", ge=1)
    save_every: int = key(1000, "steps between checkpoints", ge=1)
    keep: int = key(2, "checkpoints to keep", ge=1)
    evaluate_every: int = key(5000, "steps between evaluations; 0: only at the end", ge=0)
    evaluate_first: bool = key(False, "before step 1 too, and compare at the end")
    profile_steps: tuple[int, ...] = key((),
        "(first, last): writes a trace of these steps to WORKDIR/profile",
        ge=1, le=INT_MAX, length=(0, 2))
    remat: Literal["none", "blocks"] = key("none",
        "what the backward pass recomputes instead of keeping: none or blocks")
    unroll: bool = key(False,
        "blocks of a transformer, and microbatches, unrolled instead of one loop")
    allow_change: tuple[str, ...] = key((),
        "identity keys that may differ from the run being resumed")
    max_skipped: int = key(10, "stop after so many consecutive non-finite steps", ge=1)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Of diffusion on latents (docs/diffusion.md)."""

    autoencoder: str = key("",
        "of the latents: as init_from; or a VARIANT, which gives shapes alone")
    patch_size: int = key(1, "latent positions per side that one token stands for", ge=1)
    objective: Literal["", "epsilon", "learned_sigma", "flow"] = key("",
        "'': no diffusion; epsilon, learned_sigma or flow")
    label_dropout: float = key(0.1,
        "fraction of labels replaced by \"none\", for guidance", ge=0, le=1)


SHARDING = (
    (r"\w*blocks?\b.*\.(qkv|proj|fc2|skip_linear)\.kernel", "rows"),
    (r"(\w*blocks?|final_layer)\b.*\.adaLN_modulation\.linear\.kernel", "rows"),
    (r"\w*blocks?\b.*\.fc1\.(kernel|bias)", "columns"),
    (r".*", "fsdp"),
)


@dataclasses.dataclass(frozen=True)
class Config(Job, Training, Diffusion):
    """The validated configuration of one job."""

    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    encode: Encode = Encode()
    sample: Sample = Sample()
    plan: Plan = Plan()
    export: Export = Export()
    mesh: MeshSizes = MeshSizes()
    sharding: tuple[tuple[str, str], ...] = key(SHARDING,
        "(path pattern, rule), first match: fsdp, rows, columns, replicate: docs/scaling_mesh.md")


# fmt: on


def default() -> ConfigDict:
    """The configuration of a training job, with a safe value for every key."""
    return ConfigDict(dataclasses.asdict(Config()))


def replace(config: Config, **changes: Any) -> Config:
    """`config` with other values; a mapping changes keys of a section: model={'depth': 2}."""
    fields = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, Mapping)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **fields)


def training_resolutions(config: Config) -> tuple[int, ...]:
    """The sizes that training draws from; a repeated size is drawn more often."""
    return config.resolutions or (config.resolution,)


def known_keys(section: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(section))
