# SPDX-License-Identifier: Apache-2.0
"""Finds and opens published PyTorch weights: on disk, or on the Hugging Face hub.

A folder as diffusers or the authors write it, a bare file, or a hub name. safetensors files are
memory-mapped and each tensor is read when it is used, without PyTorch.
"""

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from dcae_jax import errors
from dcae_jax import files as files_lib
from dcae_jax.errors import UserError
from dcae_jax.pretrained import torch_io

if TYPE_CHECKING:
    from safetensors import safe_open


DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
AUTHORS_FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
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


def read_tensors(path: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
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
    tensors: dict[str, Any] = {}
    for file in files:
        tensors.update(read_file(file))
    return config, tensors


def _folder(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json or None, weight files) of a folder; of a pipeline, those of its `vae`."""
    inner = os.path.join(path, "vae")
    if os.path.exists(os.path.join(path, "model_index.json")) and os.path.isdir(inner):
        path = files_lib.inside(path, "vae")
    config = files_lib.read_object(files_lib.inside(path, "config.json"))
    present = sorted(os.listdir(path))
    index = [name for name in present if name.endswith(".safetensors.index.json")]
    whole = [name for name in (DIFFUSERS_FILE, AUTHORS_FILE) if name in present]
    others = [name for name in present if name.endswith((".safetensors", *PICKLES))]
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
            what = f"several files of weights ({', '.join(others[:3])}): name one"
        raise UserError(f"init_from={path!r} has {what}")
    return config, [files_lib.inside(path, name) for name in names]


def fetch(name: str) -> str:
    """The folder of the user's cache with the files of hub model `name`.

    A model that is cached completely is used without network access; otherwise the missing files
    are downloaded.
    """
    what = f"init_from={name!r} is no file or folder, and the Hugging Face hub needs its client"
    errors.require(what, "huggingface_hub")
    import huggingface_hub

    missing = ""
    for offline in (True, False):
        try:
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=HUB_FILES, local_files_only=offline
            )
        except Exception as error:  # of the network, the hub, or httpx, which we do not import
            if offline:  # not cached, or incomplete
                continue
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"init_from={name!r} is no file or folder here, and the Hugging Face hub does not "
                f"give it: {reason}"
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
        return "no config.json of weights"
    if not files or not all(os.path.isfile(file) for file in files):
        return (
            f"neither {DIFFUSERS_FILE} nor {AUTHORS_FILE}; download its weights and name the file"
        )
    return ""


def _shards(index: str) -> list[str]:
    """Names of the files that an index lists, always taken from the index's own folder."""
    parts = (files_lib.read_object(index) or {}).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{index} has no weight_map; fetch it again")
    return sorted({os.path.basename(name) for name in parts.values()})


# --- opening files --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; np.asarray reads it."""

    file: "safe_open"
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always a copy
        try:
            return np.asarray(self.file.get_tensor(self.name), dtype)
        except AttributeError as error:  # NumPy has no such type
            kind = self.file.get_slice(self.name).get_dtype()
            raise UserError(
                f"{self.name} has dtype {kind}; convert quantised weights to floats"
            ) from error


def read_file(path: str) -> dict[str, Any]:
    """{name: array or Stored} of a safetensors or a PyTorch file. Raises UserError."""
    if path.endswith(PICKLES):
        return torch_io.read_state_dict(path)
    return read_safetensors(path)


def read_safetensors(path: str) -> dict[str, Stored]:
    """{name: tensor, not yet read} of a safetensors file. Raises UserError for a bad header."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # opening a pipe would block forever
        raise UserError(f"{path} is no file; check the path")
    try:
        with open(path, "rb") as opened:
            if opened.read(8) == b"version ":
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there"
                )
        file = safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} is no readable safetensors ({reason}); fetch it again") from error
    return {
        name: Stored(file, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()
    }
