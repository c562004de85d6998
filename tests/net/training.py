# SPDX-License-Identifier: Apache-2.0
"""Cases: twenty steps of each recipe from weights in a file."""

import contextlib
import importlib.util
import json
import os
import unittest.mock
from collections.abc import Iterator, Mapping
from typing import Any

import inputs
import jax
import jax.numpy as jnp
import space as net
from flax import nnx
from space import Space

VARIANTS = {
    "evaluate.py": [""],
    **{f"phase{n}.py": ["tiny", "f32c32", "f64c128", "f128c512", "sd-vae-f8"] for n in (1, 2, 3)},
    "phases.py": ["tiny"],
    "finetune.py": ["tiny", "f32c32", "tiny,decoder"],
    "mix.py": ["f32c32,phase1", "f32c32,phase2", "f32c32,phase3"],
    "uvit.py": ["tiny", "s", "h", "2b"],
    "usit.py": ["tiny", "s", "h", "2b"],
    "dit.py": ["tiny", "s", "b", "l", "xl"],
    "encode.py": ["", "tiny"],
    "export.py": [""],
    "sample.py": [""],
    "plan.py": [""],
}
# Keys that may be deleted (no shipped file needs the last four), or hold our names of parameters.
GOING = ("phase", "needs_weights", "gan_norm", "gan_diff_augment", "gan_lecam", "gan_r1")
GOING += ("trainable", "sharding")
AUTOENCODER = {
    "model.widths": "(8,8,16,32,32)",
    "model.latent_channels": 8,
    "resolution": 32,
    "batch_size": 2,
    "steps": 20,
    "log_every": 1,
    "save_every": 100,
    "evaluate_every": 0,
    "optimizer.warmup_steps": 3,
    "ema_warmup": 4,
    "data.source": "folder",
    "data.held_out": 0.2,
    **net.EVALUATE,
}
DIFFUSION = {
    "model.depth": 2,
    "batch_size": 4,
    "steps": 20,
    "log_every": 1,
    "save_every": 100,
    "evaluate_every": 0,
    "optimizer.warmup_steps": 3,
    "ema_warmup": 4,
    "sample.count": 2,
    "sample.steps": 4,
    "sample.batch_size": 2,
}


def result(space: Space, workdir: str, model: str, form: str) -> dict[str, Any]:
    """What a run left: its rows, its weights by PyTorch's names, and their files' digests."""
    start = inputs.weights(model)
    found = {"rows": net.rows(workdir), "tensors": {}, "sha256": {}}
    for which in ("ema", "raw"):
        values, file = space.export(workdir, which, form)
        found["tensors"][which] = net.tensors(values, start)
        found["sha256"][which] = net.digest(file)
    return found


def autoencoder(
    space: Space, name: str, config: str, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Trains the tiny autoencoder with the recipe of `config`."""
    changes = AUTOENCODER | {"data.path": space.pictures(), "init_from": space.model("tiny")}
    workdir = space.job(config, name, changes | dict(settings or {}))
    return result(space, workdir, "tiny", "diffusers")


def phase1(space: Space) -> dict[str, Any]:
    """Catches another update, decay, schedule, crop or flip in phase 1."""
    return autoencoder(space, "phase1", "phase1.py:tiny")


def lpips(space: Space) -> dict[str, Any]:
    """Catches another LPIPS in the loss: taps, scaling, norm, weight or gradient."""
    settings = {"loss.lpips_weight": 0.7, "loss.lpips_weights": space.network("vgg"), "steps": 4}
    return autoencoder(space, "lpips", "phase1.py:tiny", settings)


def phase2(space: Space) -> dict[str, Any]:
    """Catches another draw of resolutions, and frozen parts of phase 2 that move."""
    settings = {"resolutions": "(32,48)", "evaluate_first": False}
    return autoencoder(space, "phase2", "phase2.py:tiny", settings)


GAN = {"loss.gan_channels": 8, "evaluate_first": False}


def phase3(space: Space) -> dict[str, Any]:
    """Catches another recipe of phase 3, frozen parts that move, and a GAN that acts too soon.

    While the discriminator warms up, the autoencoder does not depend on it.
    """
    settings = {**GAN, "loss.gan_warmup_steps": 1000}
    found = autoencoder(space, "phase3", "phase3.py:tiny", settings)
    found["exact"] = {"metrics": sorted(found["rows"][-1])}
    keep = ("step", "l1", "lpips", "psnr", "psnr_32", "ssim_32", "learning_rate", "skipped")
    found["rows"] = [{k: row[k] for k in keep if k in row} for row in found["rows"]]
    return found


@contextlib.contextmanager
def _known_discriminator() -> Iterator[None]:
    """Discriminators start from inputs.tensor: no file holds one, and random values may change."""
    from dcae_jax.models import patchgan

    create = patchgan.create

    def fill(path: tuple, value: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            return value
        name = ".".join(str(key.key) for key in path if hasattr(key, "key"))
        return jnp.asarray(inputs.tensor(name, value.shape, "discriminator"))

    def filled(*args: Any, **kwargs: Any) -> nnx.Module:
        graph, state = nnx.split(create(*args, **kwargs))
        return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))

    with unittest.mock.patch.object(patchgan, "create", filled):
        yield


def gan(space: Space) -> dict[str, Any]:
    """Catches another GAN: its losses, warm-up, adaptive weight, optimizer and gates."""
    with _known_discriminator():
        return autoencoder(space, "gan", "phase3.py:tiny", {**GAN, "loss.gan_warmup_steps": 5})


def accumulated(space: Space) -> dict[str, Any]:
    """Catches microbatches that are summed or weighted wrongly, and remat that changes numbers."""
    settings = {
        "accumulate": 2,
        "batch_size": 4,
        "remat": "blocks",
        "steps": 6,
        "optimizer.clip_norm": 0.1,
        "data.crop": "random_resized",
        "data.rotation": 10.0,
        "data.color_jitter": 0.2,
    }
    return autoencoder(space, "accumulated", "phase1.py:tiny", settings)


def finetune(space: Space) -> dict[str, Any]:
    """Catches a decoder's fine-tuning that moves the encoder, and evaluate_first without a row."""
    settings = {"steps": 6, "evaluate.crops": 2, "evaluate.resolutions": "(32,48)"}
    return autoencoder(space, "finetune", "finetune.py:tiny,decoder", settings)


def decay(space: Space) -> dict[str, Any]:
    """Catches another weight decay, or one that takes norms and biases too."""
    settings = {"steps": 4, "optimizer.weight_decay": 20.0, "optimizer.schedule": "constant"}
    return autoencoder(space, "decay", "phase1.py:tiny", settings)


def recipes(space: Space) -> dict[str, Any]:
    """Catches a value of a shipped configuration that moves with its file or key."""
    found = {}
    for name, variants in VARIANTS.items():
        spec = importlib.util.spec_from_file_location("recipe", os.path.join(net.CONFIGS, name))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for variant in variants:
            config = module.get_config(variant) if variant else module.get_config()
            flat = _flat(json.loads(json.dumps(config.to_dict())))
            kept = {k: v for k, v in sorted(flat.items()) if not k.endswith(GOING)}
            found[f"{name}:{variant}"] = kept
    plain = found[":"] = {**found["evaluate.py:"], "model.variant": "f32c32"}
    for name, values in found.items():
        if name != ":":  # what the file changes
            found[name] = {k: v for k, v in values.items() if k not in plain or plain[k] != v}
    return {"recipes": found}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        )
    return flat


def _diffusion(space: Space, name: str, settings: Mapping[str, Any] | None = None) -> dict:
    changes = DIFFUSION | {"data.path": space.latents(), "init_from": space.model(name)}
    if name == "usit":
        changes["sample.sampler"] = "heun"
    workdir = space.job(f"{name}.py:tiny", name, changes | dict(settings or {}))
    return result(space, workdir, name, "authors")


def uvit(space: Space) -> dict[str, Any]:
    """Catches another noise, time, label dropout, loss or recipe of UViT."""
    return _diffusion(space, "uvit")


def dit(space: Space) -> dict[str, Any]:
    """Catches another variational bound, noise, time, label dropout or recipe of DiT."""
    return _diffusion(space, "dit")


def usit(space: Space) -> dict[str, Any]:
    """Catches another path, time, label dropout, loss or recipe of USiT."""
    return _diffusion(space, "usit")


CASES = {
    "recipes": recipes,
    "train phase1": phase1,
    "train lpips": lpips,
    "train phase2": phase2,
    "train phase3": phase3,
    "train gan": gan,
    "train accumulated": accumulated,
    "train decay": decay,
    "train finetune": finetune,
    "train uvit": uvit,
    "train dit": dit,
    "train usit": usit,
}
