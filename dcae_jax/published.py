# SPDX-License-Identifier: Apache-2.0
"""Weights that PyTorch models were published with: where they lie, and which model they are of.

A folder of diffusers (`AutoencoderDC` or `AutoencoderKL`) or of DC-AE's authors, a bare file, or a
name on the Hugging Face hub. safetensors files are memory-mapped and read without PyTorch.
`read` is for autoencoders, `read_generator` for the diffusion models UViT, USiT and DiT.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dcae_jax import config as config_lib
from dcae_jax import report, torch_io
from dcae_jax.config import UserError
from dcae_jax.models import dcae, dcae_names, dit, sdvae, uvit
from dcae_jax.models.layers import Weights

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
AUTHORS_FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

# Bytes. The format allows ten times as many, for which Python would take gigabytes; a header of
# ten thousand tensors is one million.
MAX_HEADER = 10_000_000
MAX_JSON = 10_000_000
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str, variant: str = "") -> tuple[Weights, dict[str, Any]]:
    """(weights by path, config.model) of a published folder, file or hub name.

    variant: what the weights are of; needed by files whose tensors do not tell, and checked
    against the others. Arrays are NumPy, float32, and views of the mapped file where possible.
    Raises UserError, one line, before anything is converted.
    """
    config, tensors = _read_tensors(path)
    if any(name.startswith(AUTOENCODER_PREFIX) for name in tensors):
        config, tensors = _inside(config, tensors)
    try:
        module, arch, form = _identify(tensors, config, variant)
        weights = module.from_torch(tensors, arch, form)
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error
    settings = model_settings(arch)
    logging.info("read %s weights, named as %s name them, from %s", settings["variant"], form, path)
    return weights, settings


def _identify(
    tensors: Mapping, config: dict[str, Any] | None, variant: str
) -> tuple[Any, Any, str]:
    """(the module of names, architecture, format) of tensors and the config.json beside them."""
    form = "authors" if dcae_names.format_of(tensors) == "authors" else "diffusers"
    if variant:
        module, arch = _row(variant)
        factor = (config or {}).get("scaling_factor")
        if arch.scaling_factor is None and isinstance(factor, float) and factor > 0:
            arch = dataclasses.replace(arch, scaling_factor=factor)
    elif config is None:
        module, arch = _guess(tensors, form)
    else:
        form = "authors" if "model_name" in config else "diffusers"
        module = sdvae if config.get("_class_name") == "AutoencoderKL" else dcae_names
        arch = module.variant_of(config, form)
    if module is dcae_names and form == "diffusers" and arch.scaling_factor == 1:
        arch = dataclasses.replace(arch, scaling_factor=None)  # diffusers' word for unknown
    return module, arch, form


def _row(variant: str) -> tuple[Any, Any]:
    """(the module of names, architecture) of a variant."""
    if variant in sdvae.VARIANTS:
        return sdvae, sdvae.variant(variant)
    return dcae_names, dcae.variant(variant)


def _guess(tensors: Mapping, form: str) -> tuple[Any, Any]:
    """The variant that has exactly these tensors, its scaling factor left unknown."""
    if any(".resnets." in name for name in tensors):
        return sdvae, sdvae.variant("sd-vae-f8")
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    for arch in dcae.VARIANTS.values():
        if dcae_names.shapes_in(arch, form) == found:
            return dcae_names, arch
    known = ", ".join([*dcae.VARIANTS, *sdvae.VARIANTS])
    raise UserError(
        f"a bare file with {len(found)} tensors ({', '.join(list(found)[:2])}, ...) that are those "
        f"of no variant; name it with variant=, one of {known} or a published name"
    )


def model_settings(arch: Any) -> dict[str, Any]:
    """All of config.model for the architecture `arch`, its scaling factor included."""
    kl = isinstance(arch, sdvae.Variant)
    names, model = (sdvae, sdvae) if kl else (dcae_names, dcae)
    settings = config_lib.default().model
    settings.update(names.settings_of(arch))
    if model.architecture(settings).scaling_factor != arch.scaling_factor:
        settings.scaling_factor = arch.scaling_factor or 1.0
    return settings.to_dict()


# --- diffusion models -----------------------------------------------------------------------------

# What stands before the names: in folders of the hub, in files of the authors' trainers; nothing
# in those of U-ViT and DiT.
PREFIXES = ("diffusion_model.", "uvit.", "dit.", "0.", "")
AUTOENCODER_PREFIX = "autoencoder."
HUB_OWNER = "mit-han-lab"  # where the authors publish the autoencoders that their names refer to


def read_generator(path: str, variant: str = "") -> tuple[Weights, dict[str, Any]]:
    """(weights by path, settings) of a published UViT, USiT or DiT: folder, file or hub name.

    settings: {'model': all of config.model, 'patch_size': int, 'objective': 'epsilon',
    'learned_sigma' or 'flow', 'autoencoder': where its weights are, or ''}. The last two come from
    the config.json beside the weights; without it a UViT is taken for one that predicts epsilon,
    since a USiT has the same tensors. model.latent_size is 0 where the weights do not tell it (a
    DiT without its fixed positions).
    variant: whose heads the model has, needed where its width is that of no variant, and checked
    where it is. Of a trainer's file the averaged weights are taken. Raises UserError.
    """
    config, tensors = _read_tensors(path)
    try:
        module, arch, prefix = _recognise(tensors, variant)
        weights = module.from_torch(tensors, arch, prefix)
        settings = _generator_settings(module, arch, variant)
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error
    doubled = arch.out_channels == 2 * arch.latent_channels
    name = str((config or {}).get("model_name", ""))
    if re.search(r"(^|-)u?sit-", name) or (module is dit and not doubled):
        settings["objective"] = "flow"
    else:
        settings["objective"] = "learned_sigma" if doubled else "epsilon"
    settings["autoencoder"] = ""
    if autoencoder := _autoencoder_of(name):
        inside = any(key.startswith(AUTOENCODER_PREFIX) for key in tensors)
        settings["autoencoder"] = path if inside else f"{HUB_OWNER}/{autoencoder}"
    model = settings["model"]
    logging.info("read %s %s weights from %s", model["name"], model["variant"], path)
    return weights, settings


def kind_of(path: str) -> str:
    """'generator' where the tensors of a folder, file or hub name hold a UViT or DiT.

    Else 'autoencoder', whether or not they are one's. Raises UserError where there are none.
    """
    _, tensors = _read_tensors(path)
    first = ("patch_embed.proj.weight", "x_embedder.proj.weight")  # of a UViT, of a DiT
    found = any(prefix + name in tensors for prefix in PREFIXES for name in first)
    return "generator" if found else "autoencoder"


def _recognise(tensors: Mapping, variant: str) -> tuple[Any, Any, str]:
    """(the backbone's file, architecture, prefix of the names) of tensors."""
    for prefix in PREFIXES:
        for module in (uvit, dit):
            row = module.VARIANTS.get(variant)
            arch = module.recognise(tensors, row.heads if row else 0, prefix)
            if arch is None:
                continue
            if variant and row is None:
                raise UserError(
                    f"variant={variant!r} is no size of {module.__name__.rpartition('.')[2]}; "
                    f"choose one of {', '.join(module.VARIANTS)}"
                )
            known = [v for v in module.VARIANTS.values() if v.width == arch.width]
            if row and known and row.width != arch.width:
                raise UserError(
                    f"variant={variant!r} has {row.width} channels, these weights {arch.width}; "
                    "leave it out"
                )
            if arch.width % arch.heads:
                raise UserError(
                    f"variant={variant!r} has {arch.heads} heads, which do not divide the width "
                    f"of {arch.width}; name another"
                )
            return module, arch, prefix
    raise UserError(
        f"{len(tensors)} tensors ({', '.join(list(tensors)[:2])}, ...) that are those of neither "
        "a UViT nor a DiT"
    )


def _generator_settings(module: Any, arch: Any, variant: str) -> dict[str, Any]:
    rows = module.VARIANTS
    variant = variant or next(name for name, row in rows.items() if row.width == arch.width)
    model = config_lib.default().model
    model.name, model.variant = module.__name__.rpartition(".")[2], variant
    for key in ("depth", "width", "heads"):
        size = getattr(arch, key)
        model[key] = 0 if size == getattr(rows[variant], key) else size
    model.latent_size, model.latent_channels = arch.latent_size, arch.latent_channels
    model.num_classes = arch.num_classes
    return {"model": model.to_dict(), "patch_size": arch.patch_size}


def _autoencoder_of(model_name: str) -> str:
    """The published autoencoder in the name of a published diffusion model; '' if there is none."""
    found = re.match(r"(.+?)-(uvit|usit|dit|sit)-", model_name)
    return found.group(1) if found else ""


def _inside(config: dict[str, Any] | None, tensors: Mapping) -> tuple[dict | None, dict[str, Any]]:
    """(config.json, tensors) of the autoencoder that lies beside a diffusion model in its file."""
    name = _autoencoder_of(str((config or {}).get("model_name", "")))
    own = {
        key.removeprefix(AUTOENCODER_PREFIX): tensor
        for key, tensor in tensors.items()
        if key.startswith(AUTOENCODER_PREFIX)
    }
    return {"model_name": name} if name else None, own


# --- where the files are --------------------------------------------------------------------------


def _read_tensors(path: str) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """(config.json or None, tensors) of a folder, file or hub name. Raises UserError."""
    if os.path.isdir(path):
        config, files = _folder(path)
    elif os.path.isfile(path):
        config, files = None, [path]
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not os.path.exists(path.split("/")[0]):
        config, files = _folder(fetch(path))
    else:
        raise UserError(
            f"init_from={path!r}: there is no such file or folder; give a workdir (with its "
            "config.json), an export, or published weights: a folder, a file or a hub name"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors.update(read_file(file))
    return config, tensors


def _folder(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json or None, files of weights) of a folder. A pipeline's is in its `vae`."""
    inner = os.path.join(path, "vae")
    if os.path.exists(os.path.join(path, "model_index.json")) and os.path.isdir(inner):
        path = inside(path, "vae")
    config = read_object(inside(path, "config.json"))
    present = sorted(os.listdir(path))
    index = [name for name in present if name.endswith(".safetensors.index.json")]
    whole = [name for name in (DIFFUSERS_FILE, AUTHORS_FILE) if name in present]
    others = [name for name in present if name.endswith((".safetensors", *PICKLES))]
    if whole:
        names = whole[:1]
    elif index:
        names = _shards(inside(path, index[0]))
    elif len(others) == 1:
        names = others
    else:
        wanted = f"neither a run's config.json with checkpoints, nor {DIFFUSERS_FILE}"
        what = f"no weights: {wanted} or {AUTHORS_FILE}"
        if others:
            what = f"several files of weights ({', '.join(others[:3])}): name one"
        raise UserError(f"init_from={path!r} has {what}")
    return config, [inside(path, name) for name in names]


def inside(folder: str, name: str) -> str:
    """The path of `name` in `folder`. Raises UserError if it is a link out of it.

    The hub's cache keeps files once, with links from each revision to MODEL/blobs.
    """
    path, root = os.path.join(folder, name), os.path.realpath(folder)
    for parent in (root, os.path.dirname(root)):
        if os.path.basename(os.path.dirname(parent)) == "snapshots":
            root = os.path.dirname(os.path.dirname(parent))
            break
    real = os.path.realpath(path)
    if os.path.commonpath((root, real)) != root:
        raise UserError(
            f"{path} is a link out of its folder, to {real}; if you mean that, copy the file there"
        )
    return path


def read_object(path: str) -> dict[str, Any] | None:
    """The JSON object in the file `path`, None if there is no such file. Raises UserError."""
    if not os.path.exists(path):
        return None
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_JSON:
        raise UserError(f"{path} is no JSON file of at most {MAX_JSON} bytes; fetch it again")
    try:
        value = report.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({error}); fetch it again") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; fetch it again")
    return value


def fetch(name: str) -> str:
    """The folder of the user's cache with the files of hub model `name`.

    What is cached is taken from there without a look at the network; the rest is fetched.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"init_from={name!r} is no file or folder; to fetch it from the Hugging Face hub, "
            "pip install 'dcae_jax[hub]'"
        ) from error

    def get(file: str) -> str | None:
        try:
            return huggingface_hub.hf_hub_download(name, file, local_files_only=True)
        except LocalEntryNotFoundError:
            pass
        try:
            # Fails at once without a network, where the download would try for half a minute.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file))
            return huggingface_hub.hf_hub_download(name, file)
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError: the hub cannot be reached
            raise
        except EntryNotFoundError:
            return None

    try:
        inner, config = "", get("config.json")
        if config is None:
            inner, config = "vae/", get("vae/config.json")
        if config is None:
            raise UserError(f"init_from={name!r}: that hub model has no config.json of weights")
        for file in (DIFFUSERS_FILE, AUTHORS_FILE):
            if get(inner + file):
                return os.path.dirname(config)
        for file in (DIFFUSERS_FILE, AUTHORS_FILE):
            index = get(f"{inner}{file}.index.json")
            if index:
                break
        else:
            raise UserError(
                f"init_from={name!r}: that hub model has neither {DIFFUSERS_FILE} nor "
                f"{AUTHORS_FILE}; download its weights and name the file"
            )
        for file in _shards(index):
            get(inner + file)
        return os.path.dirname(config)
    except UserError:
        raise
    except Exception as error:  # of the network, the hub, or httpx, which is not ours to import
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"init_from={name!r} is no file or folder here, and the Hugging Face hub does not "
            f"give it: {reason}"
        ) from error


def _shards(index: str) -> list[str]:
    """Names of the files that an index lists; in its own folder, wherever it points."""
    parts = (read_object(index) or {}).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{index} has no weight_map; fetch it again")
    return sorted({os.path.basename(name) for name in parts.values()})


# --- what is in a file ----------------------------------------------------------------------------


def read_file(path: str) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file, mapped, or of a PyTorch file, read. Raises UserError."""
    if not path.endswith(PICKLES):
        return read_safetensors(path)
    try:
        return torch_io.read_state_dict(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """{name: read-only view of the mapped file}.

    The whole header is checked first: a damaged or hostile file ends in a UserError, not in a
    huge allocation or in numbers read from another tensor.
    """
    if not os.path.isfile(path):  # of a pipe, opening it would wait for ever
        raise UserError(f"{path} is no file; check the path")
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); check the path") from error
    if bytes(data[:8]) == b"version ":
        raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")

    def need(condition: bool, why: str) -> None:
        if not condition:
            raise UserError(f"{path} is no readable safetensors: {why}; fetch it again")

    need(data.size >= 8, f"only {data.size} bytes")
    length = int(data[:8].view("<u8")[0])
    need(length <= MAX_HEADER, f"its header claims {length} bytes")
    need(8 + length <= data.size, f"its header of {length} bytes is cut off at {data.size}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no readable safetensors: its header is no JSON; fetch it again"
        ) from error
    need(isinstance(header, dict), "its header is no JSON object")
    header.pop("__metadata__", None)
    body = data[8 + length :]
    spans, out = [], {}
    for name, entry in header.items():
        dtype, shape, span = _entry(name, entry, need)
        need(span[1] <= body.size, f"{name} ends at byte {span[1]} of {body.size}: cut off")
        spans.append((*span, name))
        out[name] = body[span[0] : span[1]].view(dtype).reshape(shape)
    spans.sort()
    for (_, end, before), (start, _, name) in zip(spans, spans[1:], strict=False):
        need(start >= end, f"{before} and {name} overlap")
    return out


def _entry(
    name: str, entry: Any, need: Callable[[bool, str], None]
) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (first byte, end)) of one tensor of a header."""
    need(isinstance(entry, dict), f"{name} has no description")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    need(dtype in DTYPES if isinstance(dtype, str) else False, f"{name} has dtype {dtype!r}")
    for what, numbers in (("shape", shape), ("offsets", span)):
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        need(whole and len(numbers) <= 32, f"{name} has {what} {str(numbers)[:80]}")
    need(len(span) == 2 and span[0] <= span[1], f"{name} has offsets {str(span)[:80]}")
    kind = np.dtype(DTYPES[dtype])
    size = math.prod(shape) * kind.itemsize
    need(span[1] - span[0] == size, f"{name} of shape {shape} takes {size} bytes, not {span}")
    return kind, tuple(shape), (span[0], span[1])
