# SPDX-License-Identifier: Apache-2.0
"""The latents of one image as a file: .npz or .safetensors, with what a decoder needs to know.

Either holds `latent` [h, w, c] float32, unscaled, and these facts: `height` and `width` of the
image, `compression`, `scaling_factor` ('' if unknown; latent * scaling_factor has an rms of about
1), `model` (the path that encoded it), `encoder` (the checksum of the weights that latents depend
on). In .npz each is an array of a string; in .safetensors they are the metadata.
"""

import dataclasses
import io
import zipfile
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dcae_jax import files
from dcae_jax.errors import UserError

EXTENSIONS = (".npz", ".safetensors")
MOST_BYTES = 2**30  # of the latents in one file


@dataclasses.dataclass(frozen=True)
class Facts:
    """All but the latents."""

    height: int
    width: int
    compression: int
    scaling_factor: float | None
    model: str
    encoder: str


def write(path: str, latent: np.ndarray, facts: Facts) -> None:
    """Writes latents [h, w, c] to a file of one of EXTENSIONS."""
    texts = {k: "" if v is None else str(v) for k, v in dataclasses.asdict(facts).items()}
    if path.endswith(".safetensors"):
        data = safetensors.numpy.save({"latent": np.ascontiguousarray(latent)}, texts)
    else:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {key: np.array(text) for key, text in texts.items()}
        np.savez(buffer, latent=latent, **arrays)
        data = buffer.getvalue()
    files.write_file(path, data)


def read(path: str) -> tuple[np.ndarray, Facts]:
    """(latents [h, w, c] float32, the facts) of a file. Runs no code in it. Raises UserError."""
    if not path.endswith(EXTENSIONS):
        raise UserError(f"{path} is not a file of latents ({' '.join(EXTENSIONS)})")
    try:
        opened = _read_safetensors if path.endswith(".safetensors") else _read_npz
        latent, texts = opened(path)
        factor = texts["scaling_factor"]
        facts = Facts(
            int(texts["height"]),
            int(texts["width"]),
            int(texts["compression"]),
            float(factor) if factor else None,
            texts["model"],
            texts["encoder"],
        )
    except (
        OSError,
        ValueError,
        KeyError,
        MemoryError,  # of a header that claims more than the file holds
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no {reason}; latents are written by `dcae-jax encode`"
        raise UserError(f"{path} is not a file of latents: {reason}") from error
    if latent.ndim != 3 or latent.dtype.kind != "f" or 0 in latent.shape:
        what = f"{latent.dtype} {list(latent.shape)}"
        raise UserError(f"{path} is not a file of latents: [h, w, c] of floats, not {what}")
    if not np.isfinite(latent).all():
        raise UserError(f"{path} has latents that are not finite; encode the image again")
    fits = [
        0 < size <= latents * facts.compression
        for size, latents in zip((facts.height, facts.width), latent.shape[:2], strict=True)
    ]
    if not all(fits):
        size = f"{facts.width}x{facts.height}"
        raise UserError(f"{path} has {list(latent.shape)} latents for {size} pixels; encode again")
    return latent.astype(np.float32), facts


def _read_npz(path: str) -> tuple[np.ndarray, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:  # before NumPy allocates what the file claims
        if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        fields = [field.name for field in dataclasses.fields(Facts)]
        return arrays["latent"], {name: str(arrays[name]) for name in fields}


def _read_safetensors(path: str) -> tuple[np.ndarray, dict[str, str]]:
    with safetensors.safe_open(path, framework="numpy") as opened:
        return opened.get_tensor("latent"), opened.metadata() or {}
