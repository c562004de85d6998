# SPDX-License-Identifier: Apache-2.0
"""Writers of other formats: diffusers, the authors', StableHLO.

Each writes host arrays into an existing folder; the job `export` reads them back and compares.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcae_jax import files, models
from dcae_jax.errors import UserError
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.protocol import AutoencoderArchitecture, BackboneArchitecture, BackboneModule
from dcae_jax.models.weights import AnyWeights, Weights
from dcae_jax.pretrained import hub, published, torch_io
from dcae_jax.runtime import precision

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


def max_difference(a: AnyWeights, b: AnyWeights) -> float:
    """The largest absolute difference of two dicts of arrays. RuntimeError if names differ."""
    if a.keys() != b.keys():
        raise RuntimeError(f"read back with different names: {sorted(a.keys() ^ b.keys())[:3]}")
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


def write_torch(form: str, weights: AnyWeights, arch: AutoencoderArchitecture, folder: str) -> None:
    """Writes config.json and safetensors with the names of diffusers or of the authors.

    form: 'diffusers' or 'authors'. Raises UserError for what the format cannot express.
    """
    names = models.autoencoder_names(models.owner(arch))
    settings = names.config_of(arch, form)  # first: it refuses what the format cannot express
    tensors = names.to_torch(weights, arch, form)
    _write_folder(folder, settings, tensors, form == "authors")
    if form == "diffusers" and arch.scaling_factor is None:
        logging.warning(
            "the scaling factor of these weights is unknown and is written as 1.0; measure it with "
            "configs/encode.py"
        )
    if form == "authors":
        implied = names.variant_of(settings, form).scaling_factor
        _warn_of_factor(implied, settings["model_name"], arch.scaling_factor)


def write_authors_generator(
    module: BackboneModule,
    weights: AnyWeights,
    arch: BackboneArchitecture,
    folder: str,
    *,
    objective: str,
    resolution: int,
    scaling_factor: float,
    autoencoder: tuple[AnyWeights, AutoencoderArchitecture],
) -> None:
    """Writes a diffusion model, with its autoencoder if that is a published one, as safetensors.

    autoencoder: its weights and architecture. scaling_factor: multiplies its latents. Raises
    UserError for what the format cannot express.
    """
    inner, inner_arch = autoencoder
    names, backbone = models.backbone_names(module), models.name_of(module)
    if objective not in names.KINDS:
        raise UserError(
            f"the authors' format cannot express objective={objective!r} of {backbone}: a reader "
            "would assume another; use export.format=orbax"
        )
    size = next((name for name, row in module.VARIANTS.items() if row.width == arch.width), None)
    if size is None or module.VARIANTS[size].heads != arch.heads:
        raise UserError(
            "the authors' format does not store the number of heads: a reader infers it from the "
            f"width, and no variant has {arch.heads} heads with {arch.width} channels; use "
            "export.format=orbax"
        )
    tensors = dict(names.to_torch(weights, arch, "diffusion_model."))
    name = f"{names.KINDS[objective]}-{size}-in-{resolution}px"
    theirs = models.autoencoder_names(models.owner(inner_arch))
    if known := theirs.published_name(inner_arch):
        name = f"{known}-{name}"
        tensors.update(
            {
                published.AUTOENCODER_PREFIX + key: value
                for key, value in theirs.to_torch(inner, inner_arch, "authors").items()
            }
        )
        implied = theirs.variant_of({"model_name": known}, "authors").scaling_factor
        _warn_of_factor(implied, known, scaling_factor)
    else:
        logging.warning(
            "only the diffusion model is written: its autoencoder is not a published one and has "
            "no name in the authors' format; readers must be given it and its scaling factor %s",
            scaling_factor,
        )
    _write_folder(folder, {"model_name": name}, tensors, authors=True)


def _warn_of_factor(implied: float | None, name: str, factor: float | None) -> None:
    if implied != factor:
        logging.warning(
            "the authors' format does not store the scaling factor: readers will use %s, that of "
            "%s, instead of %s",
            implied,
            name,
            factor,
        )


def _write_folder(
    folder: str, settings: dict[str, Any], tensors: AnyWeights, authors: bool
) -> None:
    file = hub.AUTHORS_FILE if authors else hub.DIFFUSERS_FILE
    files.write_json(os.path.join(folder, "config.json"), settings)
    path = os.path.join(folder, file)
    torch_io.write_safetensors(path, _contiguous(tensors), {"format": "pt"})


def _contiguous(tensors: AnyWeights) -> dict[str, np.ndarray]:
    # Not np.ascontiguousarray, which makes scalars one-dimensional.
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def write_stablehlo(
    graphdef: nnx.GraphDef,
    weights: AnyWeights,
    arch: AutoencoderArchitecture,
    meta: dict[str, Any],
    folder: str,
    dtype: str,
) -> float:
    """Writes encode.stablehlo and decode.stablehlo, for every platform and size, and the weights.

    Both programs take (weights, x): weights as constants would exceed a flatbuffer's 2 GB.
    graphdef: of a model without platform-specific layers that computes in `dtype`. Returns the
    largest difference between our results and those of the example, run in its own process.
    """
    f, c = arch.compression, arch.latent_channels
    b, h, w = jax.export.symbolic_shape("b, h, w")
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in weights.items()}
    inputs = {"encode": (b, f * h, f * w, 3), "decode": (b, h, w, c)}

    def encode(weights: Weights, x: jax.Array) -> jax.Array:
        with precision.of(dtype):
            return weights_lib.merge(graphdef, weights).encode(x)

    def decode(weights: Weights, z: jax.Array) -> jax.Array:
        with precision.of(dtype):
            return weights_lib.merge(graphdef, weights).decode(z)

    functions = {"encode": jax.jit(encode), "decode": jax.jit(decode)}
    for name, function in functions.items():
        exported = jax.export.export(function, platforms=PLATFORMS)(
            shapes, jax.ShapeDtypeStruct(inputs[name], jnp.float32)
        )
        files.write_file(os.path.join(folder, f"{name}.stablehlo"), bytes(exported.serialize()))
    torch_io.write_safetensors(os.path.join(folder, WEIGHTS), _contiguous(weights), {})
    files.write_json(os.path.join(folder, "model.json"), {**meta, "kind": "stablehlo"})
    files.write_file(os.path.join(folder, "example.py"), EXAMPLE.encode())
    return _compare_stablehlo(functions, weights, f, folder)


def _compare_stablehlo(
    functions: Mapping[str, Callable[..., jax.Array]], weights: AnyWeights, f: int, folder: str
) -> float:
    """Runs the example in a fresh process; the largest difference from the same computed here."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2 * f, f, 3)).astype(np.float32)
    np.save(os.path.join(folder, "x.npy"), x)
    command = [sys.executable, "-I", "example.py", "x.npy"]
    # On the CPU, since this process holds the accelerator.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the exported program does not run: {done.stderr[-2000:]}")
    z = functions["encode"](weights, x)
    y = functions["decode"](weights, z)
    with np.load(os.path.join(folder, "reconstruction.npz")) as theirs:
        worst = max_difference(
            {"latents": z, "images": y}, {k: theirs[k] for k in ("latents", "images")}
        )
    for name in ("x.npy", "reconstruction.npz"):
        os.remove(os.path.join(folder, name))
    return worst
