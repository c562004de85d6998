# SPDX-License-Identifier: Apache-2.0
"""Every configuration key, once: type, default, bounds or choices, meaning.

The files of configs/ start from `default()` and override a few keys. After parsing,
`validation.validate` turns the ConfigDict into a frozen `Config`. Functions take the section that
they read: a nested one, such as `config.loss`, or a flat one (`Job`, `Training`, `Diffusion`).
`Config` inherits from the flat ones and can be passed in their place.

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
    """A key. For a tuple, the bounds apply to each entry and `length` lists the allowed lengths."""
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "length": length}
    return dataclasses.field(default=default, metadata={"meaning": meaning, **rules})


# fmt: off
# --- sections -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """config.model: an autoencoder or the network of a diffusion model."""

    name: str = key("auto", "file in dcae_jax/models that builds it; auto: the autoencoder's")
    variant: str = key("f32c32", "a row of VARIANTS there, or a published name")
    residual: bool = key(True, "False drops the parameter-free shortcuts (the paper's ablation)")
    depthwise: Literal["auto", "grouped", "shifted"] = key("auto",
        "convolution form; auto: shifted on CPU, else grouped")
    latent_channels: int = key(0, "0, and () below: the variant's", ge=0, le=2**16)
    widths: tuple[int, ...] = key((), "channels per stage", ge=1, le=2**16)
    decoder_widths: tuple[int, ...] = key((), "channels per stage of the decoder", ge=1, le=2**16)
    encoder_depths: tuple[int, ...] = key((), "blocks per stage", ge=0, le=1000)
    decoder_depths: tuple[int, ...] = key((), "blocks per stage", ge=0, le=1000)
    scaling_factor: float = key(0.0,
        "latent * this has an rms of about 1; belongs to the weights", ge=0, le=1000000.0)
    depth: int = key(0, "transformer: number of blocks; 0: the variant's", ge=0, le=1000)
    width: int = key(0, "transformer: channels; 0: the variant's", ge=0, le=2**16)
    heads: int = key(0, "transformer: attention heads; 0: the variant's", ge=0, le=2**12)
    latent_size: int = key(0,
        "transformer: latent positions per side; 0: that of the latents", ge=0, le=2**12)
    num_classes: int = key(0, "transformer: classes; 0: those of the latents", ge=0, le=INT_MAX)


@dataclasses.dataclass(frozen=True)
class Loss:
    """config.loss: losses of an autoencoder and its discriminator."""

    l1_weight: float = key(1.0, "weight of the mean absolute error", ge=0)
    lpips_weight: float = key(1.0, "weight of the perceptual loss; > 0 needs lpips_weights", ge=0)
    lpips_weights: str = key("", "converted VGG16 file (docs/evaluation.md)")
    gan_weight: float = key(0.0,
        "weight of the PatchGAN loss, before the adaptive weight; 0: no GAN", ge=0)
    gan_warmup_steps: int = key(1000,
        "first steps, in which only the discriminator trains on the GAN loss", ge=0)
    gan_adaptive_max: float = key(10.0,
        "upper bound of the adaptive weight: ratio of last-layer gradient norms", ge=0)
    gan_learning_rate: float = key(5.4e-5, "discriminator: learning rate", gt=0)
    gan_channels: int = key(64, "discriminator: channels of the first layer", ge=1)
    gan_layers: int = key(3, "discriminator: layers of stride 2", ge=1)
    equivariance: float = key(0.0,
        "probability of a step on transformed latents (EQ-VAE, docs/structured.md)", ge=0, le=1)
    equivariance_scales: tuple[float, ...] = key((0.25, 0.5, 0.75),
        "its scales, those that leave a multiple of f; (): only quarter turns", ge=0, le=1)


@dataclasses.dataclass(frozen=True)
class Distill:
    """config.distill: a decoder learns from that of another autoencoder (docs/distill.md)."""

    teacher: str = key("", "autoencoder with the same encoder, as init_from; '': none")
    l1_weight: float = key(0.0, "weight of the mean absolute difference to its images", ge=0)
    lpips_weight: float = key(0.0, "weight of the perceptual loss between them", ge=0)


@dataclasses.dataclass(frozen=True)
class Structured:
    """config.structured: an autoencoder's structured latents (DC-AE 1.5, docs/structured.md)."""

    channels: tuple[int, ...] = key((),
        "channels to keep, one of these drawn per step; (): always all", ge=1, le=2**16)
    count: int = key(1, "draws per step; the loss is their mean", ge=1)
    always_full: bool = key(False, "with count > 1: the last draw is all channels")


@dataclasses.dataclass(frozen=True)
class Augment:
    """config.augment: augmented diffusion training (DC-AE 1.5, docs/structured.md)."""

    channels: tuple[int, ...] = key((),
        "channels to denoise, one of these drawn per step; (): always all", ge=1, le=2**16)
    count: int = key(1, "draws per step, each with its own noise; the loss is their mean", ge=1)
    always_full: bool = key(False, "with count > 1: the last draw is all channels")


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """config.meanflow: the objective meanflow, average velocities (docs/fewstep.md)."""

    derivative: Literal["jvp", "difference"] = key("jvp",
        "du/dt: forward mode, or a central difference, which any attention supports")
    difference_step: float = key(0.005, "difference: the step in time", gt=0, le=0.1)
    target: Literal["u", "v"] = key("u",
        "u: MeanFlow's; v: iMF's, whose path follows the model's own velocity")
    equal: float = key(0.75, "fraction of a batch with r = t: flow matching", ge=0, le=1)
    to_data: float = key(0.0, "fraction of a batch with r = 0: jumps to data", ge=0, le=1)
    times: Literal["logit_normal", "uniform"] = key("logit_normal", "of t and r; 1 is noise")
    time_mean: float = key(-0.4, "logit_normal: mean of log(t / (1 - t))", ge=-5, le=5)
    time_std: float = key(1.0, "logit_normal: standard deviation", gt=0, le=5)
    shift: float = key(1.0, "moves times towards noise: s t / (1 + (s - 1) t)", ge=1, le=100)
    weighting: Literal["none", "anyflow"] = key("none",
        "weight of the losses by time: none, or t sqrt(1 - t) with mean 1")
    adaptive: float = key(1.0, "p: a loss is divided by (itself + 0.01)^p", ge=0, le=2)
    balance: bool = key(False, "scales losses of rows with r < t to the mean of those with r = t")
    guidance: float = key(1.0, "scale of the guidance to fold in; 1: none", ge=0, le=100)
    mix: float = key(0.0,
        "k: fraction of the guidance that comes from the model's own prediction", ge=0, lt=1)
    guidance_interval: tuple[float, float] = key((0.0, 1.0),
        "times (1: noise) to fold guidance in at", ge=0, le=1, length=(2,))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """config.optimizer: AdamW, its schedule, decay and clipping; Muon for chosen kernels."""

    learning_rate: float = key(6.4e-5, "learning rate after the warm-up", gt=0)
    schedule: Literal["constant", "cosine"] = key("constant",
        "after the warm-up: constant, or cosine to 0 at `steps`")
    warmup_steps: int = key(50_000, "steps of linear warm-up", ge=0)
    warmup_from: float = key(0.1, "fraction of the learning rate at step 0", ge=0, le=1)
    b1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    b2: float = key(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the square root of the second moment", gt=0, lt=1)
    weight_decay: float = key(0.1, "decoupled weight decay", ge=0)
    decay: tuple[str, ...] = key((r".*kernel",), "path patterns that decay; not biases or norms")
    muon: tuple[str, ...] = key((), "path patterns of kernels that Muon trains, not AdamW")
    clip_norm: float = key(1.0, "maximum global norm of trained gradients; 0: no clipping", ge=0)


@dataclasses.dataclass(frozen=True)
class Data:
    """config.data: where images or latents come from, and how images are cut."""

    source: Literal["photos", "folder", "huggingface", "webdataset", "tfds", "mixture",
        "latents"] = key("photos", "where images come from; latents: for diffusion (docs/data.md)")
    path: str = key("",
        "folder or bucket of images, huggingface or webdataset files, or latents (docs/data.md)")
    name: str = key("", "tfds: builder name, prepared as ArrayRecord")
    parts: tuple[tuple[float, str, str], ...] = key((),
        "mixture: ((weight, source, path), ...); path: as data.path, or tfds NAME/SPLIT")
    data_dir: str = key("", "tfds: folder of prepared data sets; '': tfds's default")
    split: str = key("train", "tfds, huggingface: split to read")
    held_out_path: str = key("", "as path: images for evaluation while training")
    held_out_split: str = key("validation", "tfds, huggingface: split for evaluation in training")
    held_out: float = key(0.02,
        "fraction of files held out where there is no held_out_path or split", ge=0, lt=1)
    crop: Literal["random", "random_resized", "center"] = key("random",
        "random (native scale), random_resized or center (ADM)")
    crop_area: tuple[float, float] = key((0.25, 1.0),
        "random_resized: range of the fraction of the image's area", ge=0, le=1, length=(2,))
    flip: bool = key(True, "mirror with probability 1/2")
    rotation: float = key(0.0, "rotate by up to this many degrees, uniformly", ge=0, le=180)
    color_jitter: float = key(0.0,
        "brightness, contrast, saturation: factors uniform in 1 +- this", ge=0, le=1)
    workers: int = key(0, "reader processes; 0: threads of the main process", ge=0)
    threads: int = key(4, "reader threads (per worker)", ge=1)
    prefetch: int = key(4, "batches read ahead (per worker)", ge=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """config.evaluate: the job `evaluate`, and evaluation during training."""

    resolutions: tuple[int, ...] = key((256,),
        "pixels per side; () in the job evaluate: the protocol's, or `resolution`", ge=1, le=2**16)
    batch_size: int = key(32, "images per step, over all devices and processes", ge=1)
    count: int = key(1000, "maximum number of crops, spread over the source; 0: all", ge=0)
    crops: int = key(1, "crops per image; 1: ADM's centre crop, else fixed random crops", ge=1)
    channels: tuple[int, ...] = key((),
        "score only so many first channels of the latent, for each; (): all", ge=1, le=2**16)
    grid: int = key(8, "images in the PNG grids", ge=1)
    lpips_weights: str = key("", "converted AlexNet file; enables LPIPS (docs/evaluation.md)")
    inception_weights: str = key("", "converted Inception file: rFID, FID, IS, KID and others")
    protocol: Literal["", "imagenet-256", "imagenet-512"] = key("",
        "imagenet-256 or imagenet-512: the protocols of published scores")
    samples: str = key("", "evaluate these, not a model: image folder, or .npz with arr_0")
    reference: str = key("",
        "reference for samples: image folder, or .npz with arr_0, or with mu and sigma")


@dataclasses.dataclass(frozen=True)
class Encode:
    """config.encode: the job `encode`, images to latents."""

    flip: bool = key(True, "also store the mirrored image's latents; the authors: False")
    crops: int = key(1, "crops per image; 1: ADM's centre crop, else fixed random crops", ge=1)
    count: int = key(0, "maximum number of crops, spread over the source; 0: all", ge=0)
    channels: int = key(0, "store only the first channels of the latents; 0: all", ge=0, le=2**16)
    dtype: Literal["bfloat16", "float16"] = key("bfloat16", "dtype of the stored latents")
    shard_size: int = key(4096, "crops per file", ge=1)
    batch_size: int = key(64, "images per step, over all devices and processes", ge=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """config.sample: the job `sample`, and samples during training."""

    labels: tuple[int, ...] = key((),
        "classes, repeated in order; (): uniform, from (seed, number)", ge=0, le=INT_MAX)
    count: int = key(16, "number of images", ge=1)
    guidance: float = key(1.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: tuple[float, float] = key((0.0, 1.0),
        "range of noise levels (1: pure noise) to guide at", ge=0, le=1, length=(2,))
    steps: int = key(30, "network evaluations (an adaptive solver ignores it)", ge=1)
    sampler: str = key("", "sampler (docs/diffusion.md); '': the objective's default")
    format: Literal["grid", "png", "npz"] = key("grid",
        "grid (one PNG), png (one file per image) or npz (arr_0, uint8)")
    batch_size: int = key(16, "images per batch, over all devices and processes", ge=1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """config.plan: the job `plan`, the cost of another job."""

    config: str = key("",
        "config file to plan, with :VARIANT: a training job's, or configs/sample.py")
    generator: str = key("", "for configs/sample.py: file that trains its model, with :VARIANT")
    overrides: tuple[str, ...] = key((), "overrides for both files: ('batch_size=64', ...)")
    topologies: tuple[str, ...] = key(("v5e:2x2",), "v4, v5e, v5p, v6e: chips per axis; or cpu")
    find_batch: bool = key(False, "search for the largest batch size that fits")
    effort: float = key(-1.0,
        "compiler effort: 0 as in a run; -1: 4 to 6 times faster (docs/scaling.md)")
    watts: float = key(0.0, "watts per chip, for kWh; 0: the chip table's", ge=0, le=1000000.0)


@dataclasses.dataclass(frozen=True)
class Export:
    """config.export: the job `export`."""

    format: Literal["orbax", "diffusers", "authors", "stablehlo"] = key("orbax",
        "orbax, diffusers, authors or stablehlo")
    out: str = key("", "output folder; must be new or empty")
    dtype: Literal["float32", "float16"] = key("float32",
        "dtype of the stored parameters; float16: half the size, autoencoders only")
    channels: int = key(0, "export only the first latent channels; 0: all", ge=0, le=2**16)
    quantize: Literal["", "int8", "int8-weights"] = key("",
        "int8 layers, or only their weights, for orbax and stablehlo (docs/serve.md)")
    calibrate: str = key("", "quantize=int8: folder of images like those to come")


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """config.mesh: devices along each axis; -1: the remaining devices."""

    data: int = key(-1, "shards the batch", ge=-1, le=INT_MAX)
    fsdp: int = key(1, "shards the batch, the weights and the moments", ge=-1, le=INT_MAX)
    tensor: int = key(1, "shards heads and MLPs of transformers", ge=-1, le=INT_MAX)
    spatial: int = key(1, "shards the height of images", ge=-1, le=INT_MAX)


# --- flat keys ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """Keys that every job reads."""

    job: str = key("train", "train, phases, encode, sample, evaluate, export or plan")
    seed: int = key(0,
        "seed of the weights, the data order and every random choice", ge=0, le=2**32 - 1)
    batch_size: int = key(256, "images per step, over all devices and processes", ge=1)
    resolution: int = key(256, "pixels per side; a multiple of the model's compression", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto",
        "compute dtype: float32 (docs/evaluation.md), bfloat16; auto: bfloat16 except on CPU")
    init_from: str = key("",
        "weights: a workdir, checkpoint or export, or published weights (docs/weights.md)")
    weights: Literal["ema", "raw"] = key("ema", "which weights of a run to read: ema or raw")


@dataclasses.dataclass(frozen=True)
class Training:
    """Keys of training. Defaults are the authors' where published (docs/training.md)."""

    resolutions: tuple[int, ...] = key((),
        "drawn uniformly per step, instead of `resolution` (repeat a size to weight it)",
        ge=1, le=2**16)
    needs_weights: bool = key(False, "fail without init_from")
    init_parts: tuple[str, ...] = key((),
        "path patterns that init_from, of another model, must fill (docs/training.md); (): all")
    steps: int = key(100_000, "total optimizer steps, including those before a resume", ge=0)
    trainable: tuple[str, ...] = key((".*",),
        "path patterns to train, full match; {deepest}, {outermost}: docs/training.md")
    accumulate: int = key(1, "microbatches per step; their gradients are averaged", ge=1)
    ema_decay: float = key(0.9999,
        "decay at step t: ema_decay * (1 - exp(-t / ema_warmup)); 0: no averages", ge=0, lt=1)
    ema_warmup: int = key(2000, "time constant of the EMA warm-up, in steps", ge=1)
    tracker: str = key("", "FILE.py:FUNCTION that takes metric rows (docs/training.md); '': none")
    log_every: int = key(100, "steps between rows of metrics.jsonl", ge=1)
    save_every: int = key(1000, "steps between checkpoints", ge=1)
    keep: int = key(2, "checkpoints to keep", ge=1)
    evaluate_every: int = key(5000, "steps between evaluations; 0: only at the end", ge=0)
    evaluate_first: bool = key(False, "also evaluate before step 1, and compare at the end")
    profile_steps: tuple[int, ...] = key((),
        "(first, last): trace these steps to WORKDIR/profile",
        ge=1, le=INT_MAX, length=(0, 2))
    remat: Literal["none", "blocks"] = key("none",
        "rematerialise in the backward pass: none or blocks")
    unroll: bool = key(False, "unroll the loops over transformer blocks and microbatches")
    allow_change: tuple[str, ...] = key((), "identity keys that may differ on resuming")
    max_skipped: int = key(10, "stop after this many consecutive non-finite steps", ge=1)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Keys of diffusion on latents (docs/diffusion.md)."""

    autoencoder: str = key("", "autoencoder of the latents, as init_from; a VARIANT: for shapes")
    patch_size: int = key(1, "latent positions per side of one token", ge=1)
    objective: Literal["", "epsilon", "learned_sigma", "flow", "meanflow"] = key("",
        "'': no diffusion; epsilon, learned_sigma, flow or meanflow")
    label_dropout: float = key(0.1, "fraction of labels replaced by \"none\"", ge=0, le=1)


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
    distill: Distill = Distill()
    structured: Structured = Structured()
    augment: Augment = Augment()
    meanflow: MeanFlow = MeanFlow()
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
    """The configuration of a training job, every key at its default."""
    return ConfigDict(dataclasses.asdict(Config()))


def replace(config: Config, **changes: Any) -> Config:
    """`config` with `changes`; a mapping changes keys of a section: model={'depth': 2}."""
    fields = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, Mapping)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **fields)


def training_resolutions(config: Config) -> tuple[int, ...]:
    """The sizes that training draws from, in pixels per side; repeats are drawn more often."""
    return config.resolutions or (config.resolution,)


def known_keys(section: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(section))
