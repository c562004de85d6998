# SPDX-License-Identifier: Apache-2.0
"""A model's weights in the format that another program reads, or as a program of their own.

Every export is written beside its folder, read back and compared, and only then renamed.
"""

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
from dcae_jax import checkpoint, published, report, sharding, state, torch_io
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
    weights, saved = checkpoint.load_weights(config.init_from, config.weights, config.model.variant)
    model = config_lib.default().model
    model.update(saved["model"])
    config = config.copy_and_resolve_references()
    config.model = model
    beside = f"{out}.{os.getpid()}.tmp"
    os.makedirs(beside)
    try:
        worst = write(config, weights, beside)
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
    _, params, stats = layers.split(state.create_model(config, mesh, layers.shapes))
    state.check_weights(weights, {**params, **stats})
    meta = {
        "kind": "autoencoder",
        "variant": config.model.variant,
        "model": config_lib.to_json(config.model),
        "compression": arch.compression,
        "latent_channels": arch.latent_channels,
        "scaling_factor": arch.scaling_factor,
        "scaling": "latents times scaling_factor have an rms of about 1; encode does not scale",
        "dtype": "float32",
        "layout": "images [B, H, W, 3] in [-1, 1], latents [B, H/f, W/f, c]",
        "provenance": {
            "source": config.init_from,
            "weights": config.weights,
            "versions": {"dcae_jax": dcae_jax.__version__, "jax": jax.__version__},
        },
    }
    if config.export.format == "stablehlo":
        return _write_stablehlo(config, weights, meta, folder)
    if config.export.format == "orbax":
        checkpoint.save_export(folder, weights, meta)
    else:
        _write_torch(config.export.format, weights, arch, folder)
    back, _ = checkpoint.load_weights(folder)
    worst = difference(weights, back)
    if worst:
        raise RuntimeError(f"what was read back differs by {worst:.3g}; nothing was kept")
    return worst


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
    tensors = names.to_torch(weights, arch, form)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
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
    graph, _, _ = layers.split(state.create_model(config, mesh, layers.shapes))
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
    tensors = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    torch_io.write_safetensors(os.path.join(folder, WEIGHTS), tensors, {})
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
