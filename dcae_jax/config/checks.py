# SPDX-License-Identifier: Apache-2.0
"""Checks across keys that need only their values: no model, data or devices."""

from dcae_jax import files
from dcae_jax.config.schema import Augment, Config, Export, Structured
from dcae_jax.errors import UserError, nearest_multiples


def check(config: Config) -> None:
    """Raises UserError where keys contradict each other."""
    for key, path in (
        ("init_from", config.init_from),
        ("autoencoder", config.autoencoder),
        ("distill.teacher", config.distill.teacher),
        ("evaluate.samples", config.evaluate.samples),
        ("evaluate.reference", config.evaluate.reference),
        ("evaluate.lpips_weights", config.evaluate.lpips_weights),
        ("evaluate.inception_weights", config.evaluate.inception_weights),
        ("loss.lpips_weights", config.loss.lpips_weights),
        ("export.calibrate", config.export.calibrate),
        ("export.out", config.export.out),
        ("data.path", config.data.path),
        ("data.held_out_path", config.data.held_out_path),
        *((f"data.parts, {kind}", str(path)) for _, kind, path in config.data.parts),
    ):
        files.check(path, key)
    low, high = config.sample.guidance_interval
    if not low <= high:
        interval = config.sample.guidance_interval
        raise UserError(f"sample.guidance_interval={interval} must be 0 <= low <= high <= 1")
    for key in ("protocol", "samples", "reference"):
        value = getattr(config.evaluate, key)
        if config.job != "evaluate" and value:
            raise UserError(
                f"evaluate.{key}={value!r} is for the job evaluate (configs/evaluate.py); "
                f"leave it empty in the job {config.job}"
            )
    if config.job == "train" and config.data.source == "latents" and not config.objective:
        raise UserError(
            "data.source='latents' is for diffusion models; set objective, as configs/uvit.py and "
            "dit.py do, or give images"
        )
    for name, wrong, models in (
        ("structured", bool(config.objective), "autoencoders"),
        ("augment", config.job == "train" and not config.objective, "diffusion models"),
    ):
        section: Structured | Augment = getattr(config, name)
        if section.channels and wrong:
            raise UserError(
                f"{name}.channels={section.channels} is for {models}; leave it at () in this job"
            )
        if section.count > 1 and not section.channels:
            raise UserError(
                f"{name}.count={section.count} needs {name}.channels, which is (); set both"
            )
        if section.always_full and section.count == 1:
            raise UserError(
                f"{name}.always_full=True leaves no draw with {name}.count=1; set it to 2 or more"
            )
    if config.distill.teacher:
        _check_distill(config)
    # With needs_weights, a run says so itself; a plan needs no weights.
    start = config.init_from or config.distill.teacher
    if config.init_parts and not start and not config.needs_weights:
        raise UserError(
            f"init_parts={config.init_parts} needs init_from, which is empty; set both or neither"
        )
    _check_export(config.export)
    low, high = config.data.crop_area
    if not 0 < low <= high <= 1:
        raise UserError(f"data.crop_area={config.data.crop_area} must be 0 < low <= high <= 1")
    if config.objective == "meanflow":
        _check_meanflow(config)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by accumulate={config.accumulate}; "
            f"try {nearest_multiples(config.batch_size, config.accumulate)}"
        )
    if not -1 <= config.plan.effort <= 1:
        raise UserError(f"plan.effort={config.plan.effort} must be in [-1, 1]")
    if config.profile_steps and config.profile_steps[0] > config.profile_steps[1]:
        raise UserError(f"profile_steps={config.profile_steps} must be (first, last)")


def _check_export(export: Export) -> None:
    if export.calibrate and not export.quantize:
        raise UserError(
            f"export.calibrate={export.calibrate!r} is for export.quantize='int8'; set both"
        )
    if export.quantize and export.format in ("diffusers", "authors"):
        raise UserError(
            f"export.quantize={export.quantize!r}: the format {export.format} holds float weights; "
            "use export.format=orbax or stablehlo"
        )
    if export.quantize and export.dtype != "float32":
        raise UserError(
            f"export.quantize={export.quantize!r} sets the dtypes itself; leave export.dtype at "
            "'float32'"
        )


def _check_distill(config: Config) -> None:
    name = f"distill.teacher={config.distill.teacher!r}"
    if config.job != "train" or config.objective:
        raise UserError(f"{name} is for training an autoencoder; leave it empty in this job")
    if not (config.distill.l1_weight or config.distill.lpips_weight):
        raise UserError(f"{name} needs distill.l1_weight or distill.lpips_weight; both are 0")
    if config.loss.equivariance:
        raise UserError(
            f"loss.equivariance={config.loss.equivariance} trains an encoder, but {name} needs its "
            "encoder frozen; leave one out"
        )


def _check_meanflow(config: Config) -> None:
    m, guidance = config.meanflow, config.sample.guidance
    low, high = m.guidance_interval
    if not low <= high:
        interval = m.guidance_interval
        raise UserError(f"meanflow.guidance_interval={interval} must be 0 <= low <= high <= 1")
    if m.equal + m.to_data > 1:
        raise UserError(
            f"meanflow.equal={m.equal} and meanflow.to_data={m.to_data} exceed 1 together; they "
            "are fractions of a batch"
        )
    count = config.batch_size // config.accumulate
    chosen = round(m.equal * count)
    if (m.equal > 0) != (chosen > 0) or (m.equal < 1) != (chosen < count):
        raise UserError(
            f"meanflow.equal={m.equal} splits {count} examples (batch_size / accumulate) into "
            f"{chosen} and {count - chosen}; use a larger batch"
        )
    if m.balance and not m.equal:
        raise UserError(
            "meanflow.balance=True needs rows with r = t, but meanflow.equal=0; set one of them"
        )
    if guidance != 1:
        raise UserError(
            f"sample.guidance={guidance}: objective='meanflow' folds guidance in while it trains; "
            "set meanflow.guidance, and leave sample.guidance at 1"
        )


def check_resolution(size: int, compression: int, key: str) -> None:
    """Raises UserError, with the nearest sizes, unless `size` is a multiple of `compression`."""
    if size < compression or size % compression:
        raise UserError(
            f"{key}={size} is not a multiple of the model's f={compression}; "
            f"try {nearest_multiples(size, compression)}"
        )
