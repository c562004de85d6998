# SPDX-License-Identifier: Apache-2.0
"""Finds and opens published PyTorch weights: on disk, or on the Hugging Face hub.

A folder as diffusers or the authors write it, a bare file, or a hub name. safetensors files are
memory-mapped and each tensor is read when it is used, without PyTorch.
"""

import logging
import os
import re
from typing import Any

from dcae_jax import errors
from dcae_jax import files as files_lib
from dcae_jax.errors import UserError
from dcae_jax.pretrained import torch_io

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
AUTHORS_FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
HALF = re.compile(r"\.(fp16|bf16)\b")  # in file names of diffusers' half-precision variants
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
AVERAGES = ("ema.", "params_ema.")
WRAPPERS = (*AVERAGES, "module.", "model.", "state_dict.", "params.")
# Downloaded from the hub: configuration and full-precision weights of the model itself or of a
# pipeline's autoencoder.
HUB_FILES = [
    "model_index.json",
    *(
        folder + file
        for folder in ("", "vae/")
        for file in (
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model-*-of-*.safetensors",
            "model.safetensors",
            "model.safetensors.index.json",
            "model-*-of-*.safetensors",
        )
    ),
]
# Downloaded if a model has no others.
HUB_HALF_FILES = [
    f"{folder}{stem}*fp16*.{extension}"
    for folder in ("", "vae/")
    for stem in ("diffusion_pytorch_model", "model")
    for extension in ("safetensors", "json")
]


def read_tensors(path: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(config.json or None, tensors) of a folder, file or hub name. Raises UserError.

    The config.json of a file is the one in its folder, which may be of something else.
    """
    if os.path.isdir(path):
        config, files = _folder(path)
    elif os.path.isfile(path):
        config, files = _beside(path), [path]
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not os.path.exists(path.split("/")[0]):
        config, files = _folder(fetch(path))
    else:
        raise UserError(
            f"init_from={path!r}: there is no such file or folder; give a workdir (with its "
            "config.json), an export, or published weights: a folder, a file or a hub name"
        )
    tensors: dict[str, Any] = {}
    for file in files:
        tensors.update(read_file(file))
    half = bool(HALF.search(os.path.basename(files[0])))
    if half or any(map(HALF.search, os.listdir(os.path.dirname(files[0]) or "."))):
        which = "half-precision weights" if half else "full-precision weights, not the half ones"
        logging.info("%s: read the %s", files[0], which)
    return config, _unwrapped(path, tensors)


def _beside(file: str) -> dict[str, Any] | None:
    """config.json in the folder of a weights file; None, with a warning, if it is not readable."""
    try:
        return files_lib.read_object(files_lib.inside(os.path.dirname(file) or ".", "config.json"))
    except UserError as error:
        logging.warning("%s: read without the config.json beside it: %s", file, error)
        return None


def _unwrapped(path: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors without the prefixes of DistributedDataParallel, torch.compile and trainers; the
    averaged weights if there are both.
    """
    # torch.compile adds this to any module that it compiled.
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    averages = next((p for p in AVERAGES if any(name.startswith(p) for name in tensors)), "")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(averages)}
    removed = ""
    while prefix := next(
        (p for p in WRAPPERS if all(n.startswith(p) for n in tensors or [""])), ""
    ):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        removed += prefix
    if removed:
        logging.info("%s: read the tensors named %s*", path, removed)
    return tensors


def _folder(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json or None, weight files) of a folder; of a pipeline, those of its `vae`."""
    inner = os.path.join(path, "vae")
    if os.path.exists(os.path.join(path, "model_index.json")) and os.path.isdir(inner):
        path = files_lib.inside(path, "vae")
    config = files_lib.read_object(files_lib.inside(path, "config.json"))
    present = sorted(
        name
        for name in os.listdir(path)
        if name.endswith((".safetensors", *PICKLES)) or INDEX.search(name)
    )
    present = [name for name in present if not HALF.search(name)] or present
    index = [name for name in present if INDEX.search(name)]
    whole = [name for name in (DIFFUSERS_FILE, AUTHORS_FILE) if name in present]
    others = [name for name in present if name not in index]
    if whole:
        names = whole[:1]
    elif index:
        names = _shards(files_lib.inside(path, index[0]))
    elif len(others) == 1:
        names = others
    else:
        wanted = f"neither a run's config.json with checkpoints, nor {DIFFUSERS_FILE}"
        what = f"no weights: {wanted} or {AUTHORS_FILE}"
        if others:
            what = f"several weight files ({', '.join(others[:3])}); choose one"
        raise UserError(f"init_from={path!r} has {what}")
    return config, [files_lib.inside(path, name) for name in names]


def fetch(name: str) -> str:
    """The folder of the user's cache with the files of hub model `name`.

    A model that is cached completely is used without network access; otherwise the missing files
    are downloaded, half-precision ones only if there are no others.
    """
    what = f"init_from={name!r} is not a local path, and the Hugging Face hub needs its client"
    errors.require(what, "huggingface_hub")
    import huggingface_hub

    missing = ""
    for offline, wanted in ((True, HUB_FILES), (False, HUB_FILES), (False, HUB_HALF_FILES)):
        try:
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=wanted, local_files_only=offline
            )
        except Exception as error:  # of the network, the hub, or httpx, which we do not import
            if offline:  # not cached, or incomplete
                continue
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"init_from={name!r} is not a local path, and the download from the Hugging Face "
                f"hub failed: {reason}"
            ) from error
        missing = _missing(folder)
        if not missing:
            return folder
    raise UserError(f"init_from={name!r}: that hub model has {missing}")


def _missing(folder: str) -> str:
    """What the snapshot of a hub model lacks; '' if it is complete."""
    try:
        config, files = _folder(folder)
    except (UserError, OSError):
        config, files = files_lib.read_object(os.path.join(folder, "config.json")), []
    if config is None:
        return "no config.json for its weights"
    if not files or not all(os.path.isfile(file) for file in files):
        return (
            f"neither {DIFFUSERS_FILE} nor {AUTHORS_FILE}; download its weights and name the file"
        )
    return ""


def _shards(index: str) -> list[str]:
    """Names of the files that an index lists, always taken from the index's own folder."""
    parts = (files_lib.read_object(index) or {}).get("weight_map")
    if (
        not isinstance(parts, dict)
        or not parts
        or not all(isinstance(name, str) for name in parts.values())
    ):
        raise UserError(f"{index} has no weight_map; fetch it again")
    return sorted({os.path.basename(name) for name in parts.values()})


def read_file(path: str) -> dict[str, Any]:
    """{name: array or Stored} of a safetensors or a PyTorch file. Raises UserError."""
    if path.endswith(PICKLES):
        return torch_io.read_state_dict(path)
    return dict(torch_io.read_safetensors(path))
