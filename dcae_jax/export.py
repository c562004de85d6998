# SPDX-License-Identifier: Apache-2.0
"""A model's weights in the format that another program reads, or as a program of their own.

Every export is written beside its folder, read back and compared, and only then renamed.
"""

import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dcae_jax
from dcae_jax import api, checkpoint, published, report, sharding, state, torch_io
from dcae_jax import config as config_lib
from dcae_jax.config import UserError
from dcae_jax.models import dcae_names, layers, sdvae
from dcae_jax.models.layers import Weights

PLATFORMS = ("cpu", "tpu", "cuda")
WEIGHTS = "weights.safetensors"
EXAMPLE = '''\
"""Runs the exported autoencoder: python example.py [images.npy of [B, H, W, 3] in [-1, 1]]"""
# Needs: pip install jax flatbuffers safetensors (jax.export reads its own files with flatbuffers)
import json, os, sys
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file

here = os.path.dirname(os.path.abspath(__file__))
meta = json.load(open(os.path.join(here, "model.json")))
weights = jax.device_put(load_file(os.path.join(here, "weights.safetensors")))
load = lambda name: export.deserialize(open(os.path.join(here, name), "rb").read())
encode, decode = (jax.jit(load(f"{name}.stablehlo").call) for name in ("encode", "decode"))
f = meta["compression"]
x = np.load(sys.argv[1]) if sys.argv[1:] else np.random.uniform(-1, 1, (1, 4 * f, 4 * f, 3))
z = encode(weights, x.astype(np.float32))  # [B, H/f, W/f, c]; z * meta["scaling_factor"] to train
y = decode(weights, z)
print("images", x.shape, "latents", z.shape, "mean difference", abs(y - x).mean())
np.savez("reconstruction.npz", latents=z, images=y)
'''


def run(config: Any, workdir: str) -> int:
    """The job `export`. Raises UserError for what the format cannot express."""
    config_lib.check(config)
    if not config.init_from:
        raise UserError("init_from is empty; set --config.init_from to the weights to export")
    out = os.path.abspath(os.path.expanduser(config.export.out or os.path.join(workdir, "export")))
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"export.out={out!r} is there and not empty; name another folder")
    config = config.copy_and_resolve_references()
    if checkpoint.kind_of(config.init_from) == "generator":
        writer = functools.partial(write_generator, config, _load_generator(config))
    else:
        weights, saved = checkpoint.load_weights(
            config.init_from, config.weights, config.model.variant
        )
        config.model = _settings(saved["model"])
        writer = functools.partial(write, config, weights)
    beside = f"{out}.{os.getpid()}.tmp"
    os.makedirs(beside)
    try:
        worst = writer(beside)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(entry.stat().st_size for entry in _files(out))
    logging.info(
        "wrote %s: %s, %.1f MB; read back, the largest difference is %.3g",
        out,
        config.export.format,
        size / 1e6,
        worst,
    )
    return 0


def write(config: Any, weights: Weights, folder: str) -> float:
    """Writes `weights` of config.model into `folder` as config.export says, and reads it back.

    Returns the largest difference: of weights, or of what the exported program computes.
    """
    arch = state.model_module(config.model).architecture(config.model)
    mesh = sharding.make_mesh(_one(config.mesh), jax.devices()[:1])
    _, params, stats = layers.split(state.abstract_model(config, mesh))
    state.check_weights(weights, {**params, **stats})
    meta = _autoencoder_meta(config, config.model, arch)
    if config.export.format == "stablehlo":
        return _write_stablehlo(config, weights, meta, folder)
    if config.export.format == "orbax":
        checkpoint.save_export(folder, weights, meta)
    else:
        _write_torch(config.export.format, weights, arch, folder)
    back, _ = checkpoint.load_weights(folder)
    return _equal(difference(weights, back))


def _equal(worst: float) -> float:
    if worst:
        raise RuntimeError(f"what was read back differs by {worst:.3g}; nothing was kept")
    return worst


def _settings(saved: Mapping[str, Any]) -> Any:
    """config.model as it was saved, with the defaults of keys that came later."""
    model = config_lib.default().model
    model.update(saved)
    return model


def _autoencoder_meta(config: Any, model: Any, arch: Any) -> dict[str, Any]:
    """model.json of the autoencoder with the settings `model`."""
    return {
        "kind": "autoencoder",
        "variant": model.variant,
        "model": config_lib.to_json(model),
        "compression": arch.compression,
        "latent_channels": arch.latent_channels,
        "scaling_factor": arch.scaling_factor,
        "scaling": "latents times scaling_factor have an rms of about 1; encode does not scale",
        "dtype": "float32",
        "layout": "images [B, H, W, 3] in [-1, 1], latents [B, H/f, W/f, c]",
        "provenance": _provenance(config),
    }


def _provenance(config: Any) -> dict[str, Any]:
    return {
        "source": config.init_from,
        "weights": config.weights,
        "versions": {"dcae_jax": dcae_jax.__version__, "jax": jax.__version__},
    }


def _one(mesh: Any) -> Any:
    """The mesh of a single device: the numbers do not depend on how many there are."""
    sizes = config_lib.default().mesh
    sizes.update({name: 1 for name in mesh})
    return sizes


def difference(a: Mapping, b: Mapping) -> float:
    """The largest absolute difference of two dicts of arrays. Raises RuntimeError if names do."""
    if a.keys() != b.keys():
        raise RuntimeError(f"read back with other names: {sorted(a.keys() ^ b.keys())[:3]}")
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


def _files(folder: str) -> list[os.DirEntry]:
    found = []
    for entry in os.scandir(folder):
        found += _files(entry.path) if entry.is_dir() else [entry]
    return found


def _write_torch(form: str, weights: Weights, arch: Any, folder: str) -> None:
    """config.json and safetensors as diffusers or the authors name them."""
    names = sdvae if isinstance(arch, sdvae.Variant) else dcae_names
    settings = names.config_of(arch, form)  # first: it refuses what the format cannot express
    tensors = _contiguous(names.to_torch(weights, arch, form))
    file = published.AUTHORS_FILE if form == "authors" else published.DIFFUSERS_FILE
    report.write_json(os.path.join(folder, "config.json"), settings)
    torch_io.write_safetensors(os.path.join(folder, file), tensors, {"format": "pt"})
    if form == "authors":
        implied = names.variant_of(settings, form).scaling_factor
        if implied != arch.scaling_factor:
            logging.warning(
                "the authors' format holds no scaling factor: readers take %s, that of %s, "
                "instead of %s",
                implied,
                settings["model_name"],
                arch.scaling_factor,
            )


def _contiguous(tensors: Mapping) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


# --- diffusion models -----------------------------------------------------------------------------

# (config.model.name, objective) -> what the authors call it in a model_name.
AUTHORS_KINDS = {
    ("uvit", "epsilon"): "uvit",
    ("uvit", "flow"): "usit",
    ("dit", "learned_sigma"): "dit",
    ("dit", "flow"): "sit",
}
# Why a format has no diffusion model.
NO_GENERATOR = {
    "diffusers": "diffusers has no UViT of this kind, and its DiT pipeline takes no DC-AE",
    "stablehlo": "the program would fix labels, guidance, sampler and steps",
}


def _load_generator(config: Any) -> api.Generator:
    """The diffusion model of config.init_from with its autoencoder, if the format can hold it."""
    form = config.export.format
    if form in NO_GENERATOR:
        raise UserError(
            f"export.format={form!r} is for autoencoders, and init_from={config.init_from!r} is a "
            f"diffusion model: {NO_GENERATOR[form]}; use orbax or authors"
        )
    return api.load_generator(
        config.init_from,
        autoencoder=config.autoencoder,
        dtype="float32",
        mesh=sharding.make_mesh(_one(config.mesh), jax.devices()[:1]),
        weights=config.weights,
        variant=config.model.variant,
        resolution=config.resolution,
    )


def write_generator(config: Any, model: api.Generator, folder: str) -> float:
    """Writes a diffusion model with its autoencoder into `folder`, and reads both back.

    Returns the largest difference of weights.
    """
    weights, inner = (
        {name: np.asarray(value) for name, value in part.items()}
        for part in (model.weights, model.autoencoder.weights)
    )
    if config.export.format == "orbax":
        _write_generator_orbax(config, model, weights, inner, folder)
    else:
        _write_generator_authors(model, weights, inner, folder)
    back, saved = checkpoint.load_weights(folder, kind="generator")
    again = config_lib.default()
    again.model, again.objective = _settings(saved["model"]), saved["objective"]
    again.patch_size = saved["patch_size"]
    if (again.objective, state.architecture(again)) != (model.objective, model.architecture):
        raise RuntimeError(f"read back as another model, {saved}; nothing was kept")
    worst = difference(weights, back)
    if saved["autoencoder"]:
        worst = max(worst, difference(inner, checkpoint.load_weights(saved["autoencoder"])[0]))
    return _equal(worst)


def _write_generator_orbax(
    config: Any, model: api.Generator, weights: Weights, inner: Weights, folder: str
) -> None:
    """model.json, params/ and autoencoder/, which is an export of its own."""
    ae, arch = model.autoencoder, model.architecture
    meta = {
        "kind": "generator",
        "variant": model.model["variant"],
        "model": config_lib.to_json(_settings(model.model)),
        "objective": model.objective,
        "patch_size": arch.patch_size,
        "resolution": model.resolution,
        "num_classes": model.num_classes,
        "scaling_factor_multiplies_latent": model.scaling_factor,
        "scaling": "the model sees latents times this; decode takes its samples over this",
        "latents": {
            "autoencoder": os.path.join(os.curdir, checkpoint.AUTOENCODER),
            "encoder_checksum": checkpoint.encoder_checksum(inner),
        },
        "dtype": "float32",
        "provenance": _provenance(config),
    }
    within = os.path.join(folder, checkpoint.AUTOENCODER)
    os.makedirs(within)
    of_ae = _autoencoder_meta(config, _settings(ae.model), ae.architecture)
    checkpoint.save_export(within, inner, of_ae)
    checkpoint.save_export(folder, weights, meta)


def _write_generator_authors(
    model: api.Generator, weights: Weights, inner: Weights, folder: str
) -> None:
    """config.json and one safetensors, with the autoencoder where the authors published it."""
    module, arch = state.model_module(_settings(model.model)), model.architecture
    kind = AUTHORS_KINDS.get((model.model["name"], model.objective))
    if kind is None:
        raise UserError(
            f"the authors' format cannot express objective={model.objective!r} of "
            f"{model.model['name']}: a reader would take another; use export.format=orbax"
        )
    size = next((name for name, row in module.VARIANTS.items() if row.width == arch.width), None)
    if size is None or module.VARIANTS[size].heads != arch.heads:
        raise UserError(
            f"the authors' format holds no number of heads: a reader knows them by the width, and "
            f"{arch.heads} heads of {arch.width} channels are no variant's; use "
            "export.format=orbax"
        )
    tensors = dict(module.to_torch(weights, arch, "diffusion_model."))
    name = f"{kind}-{size}-in-{model.resolution}px"
    if published_name := _published_name(model.autoencoder.architecture):
        name = f"{published_name}-{name}"
        theirs = dcae_names.to_torch(inner, model.autoencoder.architecture, "authors")
        prefix = published.AUTOENCODER_PREFIX
        tensors.update({prefix + key: value for key, value in theirs.items()})
        implied = dcae_names.variant_of({"model_name": published_name}, "authors").scaling_factor
        if implied != model.scaling_factor:
            logging.warning(
                "the authors' format holds no scaling factor: readers take %s, that of %s, "
                "instead of %s",
                implied,
                published_name,
                model.scaling_factor,
            )
    else:
        logging.warning(
            "only the diffusion model is written: its autoencoder is no published one, and so "
            "has no name in the authors' format; readers have to be told it, and that its latents "
            "are multiplied by %s",
            model.scaling_factor,
        )
    report.write_json(os.path.join(folder, "config.json"), {"model_name": name})
    file = os.path.join(folder, published.AUTHORS_FILE)
    torch_io.write_safetensors(file, _contiguous(tensors), {"format": "pt"})


def _published_name(arch: Any) -> str:
    """What the authors call an autoencoder; '' if it is none of theirs."""
    if isinstance(arch, sdvae.Variant):
        return ""
    try:
        return dcae_names.config_of(arch, "authors")["model_name"]
    except UserError:
        return ""


# --- StableHLO ------------------------------------------------------------------------------------


def _write_stablehlo(config: Any, weights: Weights, meta: dict[str, Any], folder: str) -> float:
    """encode.stablehlo and decode.stablehlo for every platform and size, with the weights beside.

    Both take (weights, x). Weights as constants inside would not fit a file of 2 GB. The program
    that has no platform of its own uses the grouped depthwise form and, unless config.dtype says
    otherwise, float32.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("export.format='stablehlo' needs flatbuffers; pip install flatbuffers")
    if config.dtype == "auto":
        config.dtype = "float32"
    if config.model.depthwise == "auto":
        config.model.depthwise = "grouped"
    mesh = sharding.make_mesh(_one(config.mesh), jax.devices()[:1])
    graph, _, _ = layers.split(state.abstract_model(config, mesh))
    arch = state.model_module(config.model).architecture(config.model)
    f, c = arch.compression, arch.latent_channels
    b, h, w = jax.export.symbolic_shape("b, h, w")
    shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in weights.items()}
    inputs = {"encode": (b, f * h, f * w, 3), "decode": (b, h, w, c)}
    functions = {
        "encode": jax.jit(lambda weights, x: layers.merge(graph, weights).encode(x)),
        "decode": jax.jit(lambda weights, z: layers.merge(graph, weights).decode(z)),
    }
    for name, function in functions.items():
        exported = jax.export.export(function, platforms=PLATFORMS)(
            shapes, jax.ShapeDtypeStruct(inputs[name], jnp.float32)
        )
        report.write_file(os.path.join(folder, f"{name}.stablehlo"), exported.serialize())
    torch_io.write_safetensors(os.path.join(folder, WEIGHTS), _contiguous(weights), {})
    report.write_json(os.path.join(folder, "model.json"), {**meta, "kind": "stablehlo"})
    report.write_file(os.path.join(folder, "example.py"), EXAMPLE.encode())
    return _compare_stablehlo(functions, weights, f, folder)


def _compare_stablehlo(functions: dict, weights: Weights, f: int, folder: str) -> float:
    """Runs the example in a fresh process, and here the same; the largest difference."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2 * f, f, 3)).astype(np.float32)
    np.save(os.path.join(folder, "x.npy"), x)
    command = [sys.executable, "-I", "example.py", "x.npy"]
    # On the CPU: this process holds the accelerator.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the exported program does not run: {done.stderr[-2000:]}")
    z = functions["encode"](weights, x)
    y = functions["decode"](weights, z)
    with np.load(os.path.join(folder, "reconstruction.npz")) as theirs:
        worst = difference(
            {"latents": z, "images": y}, {k: theirs[k] for k in ("latents", "images")}
        )
    for name in ("x.npy", "reconstruction.npz"):
        os.remove(os.path.join(folder, name))
    return worst
