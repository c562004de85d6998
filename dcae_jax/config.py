# SPDX-License-Identifier: Apache-2.0
"""Every configuration key, once, with what it means. Files in configs/ override a few of them."""

import difflib
import importlib.util
import json
import os
from typing import Any

from ml_collections import ConfigDict

from dcae_jax import values


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line: the value and the remedy."""


class MachineError(RuntimeError):
    """The machine failed, or training did; the message is one line: what, and the remedy."""


def nearest_multiples(value: int, step: int, least: int = 0) -> str:
    """The multiples of `step` below and above `value`, for a message: '96 or 104'.

    least: a multiple of `step` that none may be less than; 0: `step` itself.
    """
    down = value // step * step
    near = {max(multiple, least or step) for multiple in (down, down + step)}
    return " or ".join(map(str, sorted(near)))


# Keys that a resumed run must share with the run it continues.
IDENTITY = (
    "model",
    "trainable",
    "loss",
    "optimizer",
    "ema_decay",
    "ema_warmup",
    "accumulate",
    "data",
    "seed",
    "batch_size",
    "resolution",
    "resolutions",
    "dtype",
    "patch_size",
    "objective",
    "label_dropout",
)
# ... except these, which change how fast the same batches arrive.
NOT_IDENTITY = ("data.workers", "data.threads", "data.prefetch")


def default() -> ConfigDict:
    """The configuration of a training job, with a safe value for every key."""
    c = ConfigDict()
    c.job = "train"  # train, phases, encode, sample, evaluate, export or plan
    c.seed = 0  # of the weights, the data's order and every random choice
    c.batch_size = 256  # images a step, over all devices and processes
    c.resolution = 256  # pixels a side; a multiple of the model's compression
    c.resolutions = ()  # drawn uniformly, one a step, instead of `resolution` (repeat to weigh)
    c.dtype = "auto"  # compute: float32, bfloat16; auto = bfloat16 except on a CPU
    c.init_from = ""  # weights: a workdir or checkpoint, export, or published ones: docs/weights.md
    c.weights = "ema"  # which weights of a training run to read: ema or raw

    # Training. Authors' defaults where they published one (docs/training.md).
    c.needs_weights = False  # starting without init_from is an error
    c.steps = 100_000  # optimizer steps in all, also after a resume
    c.trainable = (".*",)  # paths to train, matched whole; {deepest}, {outermost}: docs/training.md
    c.accumulate = 1  # microbatches a step whose gradients are averaged
    c.ema_decay = 0.9999  # decay at step t: ema_decay * (1 - exp(-t / ema_warmup)); 0: no averages
    c.ema_warmup = 2000
    c.log_every = 100  # steps between rows of metrics.jsonl
    c.save_every = 1000  # steps between checkpoints
    c.keep = 2  # checkpoints to keep
    c.evaluate_every = 5000  # steps between evaluations; 0: only at the end
    c.evaluate_first = False  # before step 1 too, and compare at the end
    c.profile_steps = ()  # (first, last): writes a trace of these steps to WORKDIR/profile
    c.remat = "none"  # what the backward pass computes again instead of keeping: none or blocks
    c.unroll = False  # blocks of a transformer, and microbatches, in a row, not as one loop
    c.allow_change = ()  # identity keys that may differ from the run being resumed
    c.max_skipped = 10  # stop after so many non-finite steps in a row

    # Diffusion on latents (docs/diffusion.md).
    c.autoencoder = ""  # of the latents: as init_from; or a VARIANT, which gives shapes alone
    c.patch_size = 1  # latent positions a side that one token stands for
    c.objective = ""  # '': no diffusion; epsilon, learned_sigma or flow
    c.label_dropout = 0.1  # share of labels replaced by "none", for guidance

    m = c.model = ConfigDict()
    m.name = "auto"  # the file of dcae_jax/models that builds it; auto: the autoencoder's
    m.variant = "f32c32"  # a row of VARIANTS there, or a published name
    m.residual = True  # False drops the parameter-free shortcuts (the paper's ablation)
    m.depthwise = "auto"  # grouped or shifted; auto = shifted on a CPU
    m.latent_channels = 0  # 0 and () keep the variant's own
    m.widths = ()
    m.encoder_depths = ()
    m.decoder_depths = ()
    m.scaling_factor = 0.0  # latent * this has an rms of about 1; goes with the weights
    m.depth = 0  # of a transformer: blocks, channels, heads; 0 keeps the variant's own
    m.width = 0
    m.heads = 0
    m.latent_size = 0  # of a transformer: positions a side; 0: those of the latents
    m.num_classes = 0  # of a transformer; 0: those of the latents

    m = c.loss = ConfigDict()
    m.l1_weight = 1.0
    m.lpips_weight = 1.0  # weight of the perceptual loss; > 0 needs lpips_weights
    m.lpips_weights = ""  # converted VGG16 file (docs/evaluation.md)
    m.gan_weight = 0.0  # weight of the PatchGAN loss, before the adaptive weight; 0: no GAN
    m.gan_warmup_steps = 1000  # steps that train the discriminator alone on the GAN loss
    m.gan_adaptive_max = 10.0  # bound of the ratio of gradient norms at the last layer
    m.gan_learning_rate = 5.4e-5  # of the discriminator
    m.gan_channels = 64  # of the discriminator's first layer
    m.gan_layers = 3  # that halve the size

    m = c.optimizer = ConfigDict()
    m.learning_rate = 6.4e-5
    m.schedule = "constant"  # after the warm-up: constant, or cosine to 0 at `steps`
    m.warmup_steps = 50_000
    m.warmup_from = 0.1  # share of the learning rate at step 0
    m.b1 = 0.9
    m.b2 = 0.999
    m.eps = 1e-8
    m.weight_decay = 0.1
    m.decay = (r".*kernel",)  # paths that decay; biases and norms do not
    m.clip_norm = 1.0  # global norm of the trained gradients; 0: no clipping

    m = c.data = ConfigDict()
    m.source = "photos"  # photos (embedded), folder, tfds, mixture, or latents for diffusion
    m.path = ""  # folder: images, searched recursively (evaluate also takes one picture); latents
    m.name = ""  # tfds: builder name, prepared as ArrayRecord
    m.parts = ()  # mixture: ((weight, source, path), ...); path: folder, or tfds NAME/SPLIT
    m.data_dir = ""  # tfds: where it was prepared; '' is tfds's own default
    m.split = "train"  # tfds: split to read
    m.held_out_path = ""  # folder: images for evaluation while training
    m.held_out_split = "validation"  # tfds: likewise
    m.held_out = 0.02  # folder without held_out_path: share of files kept from training
    m.crop = "random"  # random (native scale), random_resized or center (ADM)
    m.crop_area = (0.25, 1.0)  # random_resized: share of the image's area
    m.flip = True  # mirror half of the images
    m.rotation = 0.0  # degrees, uniform in +-
    m.color_jitter = 0.0  # brightness, contrast, saturation: factor in 1 +- this
    m.workers = 0  # reader processes; 0 reads in threads of this one
    m.threads = 4  # reader threads (of each worker)
    m.prefetch = 4  # batches read ahead (of each worker)

    m = c.evaluate = ConfigDict()
    m.resolutions = (256,)  # pixels a side; (), in job evaluate: the protocol's, or `resolution`
    m.batch_size = 32  # images a step, over all devices and processes
    m.count = 1000  # images at most; 0: all
    m.crops = 1  # a picture: 1 is the ADM centre crop, more are fixed random crops
    m.grid = 8  # images in the PNG grids
    m.lpips_weights = ""  # converted AlexNet file: unlocks LPIPS (docs/evaluation.md)
    m.inception_weights = ""  # converted Inception file: unlocks rFID, FID, IS, KID and others
    m.protocol = ""  # imagenet-256 or imagenet-512: published figures compare with no other
    m.samples = ""  # judge these, not a model: a folder of images, or an .npz with arr_0
    m.reference = ""  # to compare samples with: a folder, or an .npz with arr_0, or mu and sigma

    m = c.encode = ConfigDict()
    m.flip = True  # keep the latents of the mirrored image too; the authors: False
    m.crops = 1  # an image: 1 is the ADM centre crop, more are fixed random crops
    m.count = 0  # crops at most; 0: all
    m.dtype = "bfloat16"  # of the stored latents: bfloat16 or float16
    m.shard_size = 4096  # crops a file
    m.batch_size = 64  # images a step, over all devices and processes

    m = c.sample = ConfigDict()
    m.labels = ()  # classes, in turn; (): drawn uniformly from (seed, number)
    m.count = 16  # images
    m.guidance = 1.0  # scale of classifier-free guidance; 1: none
    m.guidance_interval = (0.0, 1.0)  # of the noise level (1: pure noise) where guidance acts
    m.steps = 30  # evaluations of the network (an adaptive solver ignores it)
    m.sampler = ""  # docs/diffusion.md; '': the objective's own
    m.format = "grid"  # grid (one PNG), png (a file an image) or npz (arr_0, uint8)
    m.batch_size = 16  # images at a time, over all devices and processes

    m = c.plan = ConfigDict()
    m.config = ""  # file of the job to plan, with :VARIANT: of training, or configs/sample.py
    m.generator = ""  # of a job sample: file of the job that trains its model, with :VARIANT
    m.overrides = ()  # keys of both, as ('batch_size=64', ...)
    m.topologies = ("v5e:2x2",)  # v4, v5e, v5p or v6e with the chips along each axis; or cpu
    m.find_batch = False  # search the largest batch that fits
    m.effort = -1.0  # of the compiler: 0 as in a run; -1 is 6 times faster (docs/scaling.md)
    m.watts = 0.0  # a chip, for kWh; 0: the table's assumption

    m = c.export = ConfigDict()
    m.format = "orbax"  # orbax, diffusers, authors or stablehlo
    m.out = ""  # folder to write; it must not exist, or be empty

    m = c.mesh = ConfigDict()  # devices along each axis; -1: what is left
    m.data = -1  # the batch
    m.fsdp = 1  # the batch, and the weights and moments
    m.tensor = 1  # heads and MLPs of transformers
    m.spatial = 1  # the height of images
    # (path pattern, rule), first match: fsdp, rows, columns or replicate (docs/scaling_mesh.md)
    c.sharding = (
        (r"\w*blocks?\b.*\.(qkv|proj|fc2|skip_linear)\.kernel", "rows"),
        (r"(\w*blocks?|final_layer)\b.*\.adaLN_modulation\.linear\.kernel", "rows"),
        (r"\w*blocks?\b.*\.fc1\.(kernel|bias)", "columns"),
        (r".*", "fsdp"),
    )
    return c


def load_file(path: str, variant: str | None = None) -> ConfigDict:
    """The configuration that the file `path` makes, for a job that runs other jobs."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or not os.path.exists(path):
        raise UserError(f"no config file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'loss.l1_weight': 1.0, ...}, of JSON values."""
    return _flatten(to_json(config))


def identity_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of the identity keys that differ between two `to_json` results."""
    flat_before, flat_now = _flatten(before), _flatten(now)
    changes = {}
    for key in sorted(flat_before.keys() | flat_now.keys()):
        if not any(key == top or key.startswith(f"{top}.") for top in IDENTITY):
            continue
        if key not in NOT_IDENTITY and flat_before.get(key) != flat_now.get(key):
            changes[key] = (flat_before.get(key), flat_now.get(key))
    return changes


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def unknown_key(error: BaseException, argv: list[str]) -> str:
    """What to write instead of a key that does not exist; '' if that is not the error."""
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else None
    if not isinstance(inner, KeyError):
        return ""
    last = str(inner.args[0]).split("'")[1]  # all that the library tells
    keys = [a.partition("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
    key = next((key for key in keys if last in key.split(".")), last)
    if key in default():
        within = ", ".join(f"phase{n}.{key}" for n in (1, 2, 3))
        return f"there is no key {key} in a chain of phases; each has its own: {within}"
    return f"there is no key {key}; {suggest(key, default())}"


def explain(error: BaseException, argv: list[str]) -> str:
    """The reason of an error of the flags library, on one line.

    A config file's own mistake is wrapped in the library's; the innermost says what is wrong. Of a
    key of `argv` that does not exist, the nearest ones are told.
    """
    if unknown := unknown_key(error, argv):
        return unknown
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())


def suggest(key: str, config: ConfigDict) -> str:
    """A sentence with the keys of `config` nearest to an unknown `key`."""
    near = difflib.get_close_matches(key, _flatten(config.to_dict()), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "see dcae_jax/config.py for the keys"


def check(config: ConfigDict) -> None:
    """Checks values that need neither data nor devices. Raises UserError."""
    choices = {
        "dtype": ("auto", "float32", "bfloat16"),
        "weights": ("ema", "raw"),
        "model.depthwise": ("auto", "grouped", "shifted"),
        "optimizer.schedule": ("constant", "cosine"),
        "evaluate.protocol": ("", "imagenet-256", "imagenet-512"),
        "export.format": ("orbax", "diffusers", "authors", "stablehlo"),
        "data.source": ("photos", "folder", "tfds", "mixture", "latents"),
        "objective": ("", "epsilon", "learned_sigma", "flow"),
        "remat": ("none", "blocks"),
        "encode.dtype": ("bfloat16", "float16"),
        "sample.format": ("grid", "png", "npz"),
        "data.crop": ("random", "random_resized", "center"),
    }
    flat = _flatten(config.to_dict())
    wrong = _mistyped(flat, _flatten(default().to_dict())) or values.problem(flat)
    if wrong:
        raise UserError(wrong)
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise UserError(f"{key}={flat[key]!r} is not known; choose one of {', '.join(allowed)}")
    at_least = {
        "seed": 0,
        "batch_size": 1,
        "resolution": 1,
        "steps": 0,
        "accumulate": 1,
        "log_every": 1,
        "save_every": 1,
        "keep": 1,
        "evaluate_every": 0,
        "max_skipped": 1,
        "ema_warmup": 1,
        "data.workers": 0,
        "data.threads": 1,
        "data.prefetch": 1,
        "patch_size": 1,
        "encode.crops": 1,
        "encode.count": 0,
        "encode.shard_size": 1,
        "encode.batch_size": 1,
        "sample.count": 1,
        "sample.guidance": 0,
        "sample.steps": 1,
        "sample.batch_size": 1,
        "evaluate.batch_size": 1,
        "evaluate.count": 0,
        "evaluate.crops": 1,
        "evaluate.grid": 1,
        "optimizer.warmup_steps": 0,
        "optimizer.clip_norm": 0,
        "optimizer.weight_decay": 0,
        "loss.l1_weight": 0,
        "loss.lpips_weight": 0,
        "loss.gan_weight": 0,
        "loss.gan_warmup_steps": 0,
        "loss.gan_adaptive_max": 0,
        "loss.gan_channels": 1,
        "loss.gan_layers": 1,
    }
    for key, low in at_least.items():
        if not flat[key] >= low:
            raise UserError(f"{key}={flat[key]} is too small; it must be at least {low}")
    low, high = config.sample.guidance_interval
    if not 0 <= low <= high <= 1:
        interval = config.sample.guidance_interval
        raise UserError(f"sample.guidance_interval={interval} must be 0 <= low <= high <= 1")
    for key in ("protocol", "samples", "reference"):
        if config.job != "evaluate" and config.evaluate[key]:
            raise UserError(
                f"evaluate.{key}={config.evaluate[key]!r} is of the job evaluate; leave it empty "
                f"in the job {config.job}, and use configs/evaluate.py"
            )
    if config.job == "train" and config.data.source == "latents" and not config.objective:
        raise UserError(
            "data.source='latents' is for diffusion models; set objective, as configs/uvit.py and "
            "dit.py do, or give images"
        )
    low, high = config.data.crop_area
    if not 0 < low <= high <= 1:
        raise UserError(f"data.crop_area={config.data.crop_area} must be 0 < low <= high <= 1")
    if config.batch_size % config.accumulate:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by accumulate={config.accumulate}; "
            f"try {nearest_multiples(config.batch_size, config.accumulate)}"
        )
    if not -1 <= config.plan.effort <= 1:
        raise UserError(f"plan.effort={config.plan.effort} must be in [-1, 1]")
    if not config.plan.watts >= 0:
        raise UserError(f"plan.watts={config.plan.watts} is negative; 0 takes the table's")
    if config.profile_steps and config.profile_steps[0] > config.profile_steps[1]:
        raise UserError(f"profile_steps={config.profile_steps} must be (first, last)")


def _mistyped(flat: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Names a key of `flat` whose type is not the default's; '' if there is none."""
    for key, value in wanted.items():
        given = flat.get(key)
        kinds = {float: (int, float), tuple: (tuple, list)}.get(type(value), (type(value),))
        flag = isinstance(given, bool) and not isinstance(value, bool)
        if flag or not isinstance(given, kinds):
            return f"{key}={given!r} must be of the kind of {value!r} ({type(value).__name__})"
    return ""


def saved_model(saved: Any) -> dict[str, Any]:
    """All of config.model, from what a stranger's JSON file has as `model`.

    Raises UserError for keys that there are none, types and sizes that cannot be.
    """
    if not isinstance(saved, dict):
        raise UserError(f"model is {str(saved)[:40]!r}, not an object of keys")
    model = default().model
    known = model.to_dict()
    for key, value in saved.items():
        if key not in known:
            raise UserError(f"model.{str(key)[:40]} is no key of this version")
        model[key] = _as_kind(f"model.{key}", value, known[key])
    flat = {f"model.{key}": value for key, value in model.to_dict().items()}
    wrong = values.problem(flat)
    if wrong:
        raise UserError(wrong)
    return model.to_dict()


def _as_kind(key: str, value: Any, like: Any) -> Any:
    """A JSON value as a value of the kind of `like`. Raises UserError."""
    if isinstance(like, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(like, float) and type(value) in (int, float):
        return float(value)
    if type(value) is not type(like):
        raise UserError(f"{key}={str(value)[:40]!r} must be of the kind of {like!r}")
    return value


def training_resolutions(config: ConfigDict) -> tuple[int, ...]:
    """The sizes that training draws from; a repeated size is drawn more often."""
    return tuple(config.resolutions) or (config.resolution,)
