# SPDX-License-Identifier: Apache-2.0
"""Converts the weights of metric networks from PyTorch files to safetensors of this package.

    dcae-jax convert INPUT [LINEAR] --out=X.safetensors
    dcae-jax convert alexnet-owt-7be5be79.pth --out=lpips-alex.safetensors

INPUT is recognised by its tensors' names: torchvision's vgg16 or alexnet (LPIPS), or the Inception
of FID from pytorch-fid or torch-fidelity. LINEAR is PerceptualSimilarity's v0.1/vgg.pth or alex.pth
for LPIPS; by default the same layers are taken from this package. A `.safetensors` with the same
names is read without PyTorch; `.pth` needs it.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcae_jax import errors, files
from dcae_jax.errors import UserError
from dcae_jax.models import inception_torch, lpips_torch
from dcae_jax.runtime import process

if TYPE_CHECKING:
    from safetensors import safe_open

# The first hex digits of each official file's SHA-256. torchvision and pytorch-fid put 8 of them
# in the file's name; the linear layers' files are those of the PyPI package lpips 0.1.4.
CHECKSUMS = {
    "lpips-vgg": {"397923af": "vgg16-397923af.pth"},
    "lpips-alex": {"7be5be79": "alexnet-owt-7be5be79.pth"},
    "inception-fid": {"6726825d": "pt_inception-2015-12-05-6726825d.pth"},
    "linear layers of lpips-vgg": {"a78928a0": "v0.1/vgg.pth"},
    "linear layers of lpips-alex": {"df73285e": "v0.1/alex.pth"},
}


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


def read_safetensors(path: str) -> dict[str, Stored]:
    """{name: tensor, not yet read} of a safetensors file. Raises UserError for a bad header."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # opening a pipe would block forever
        raise UserError(f"{path} is not a file; check the path")
    try:
        with open(path, "rb") as opened:
            if opened.read(8) == b"version ":
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there"
                )
        file = safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        _refuse_other_kinds(path)
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path} is not a readable safetensors file ({reason}); fetch it again"
        ) from error
    return {
        name: Stored(file, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()
    }


# How files of other kinds begin.
KINDS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or another RIFF file",
    b"BM": "a BMP image",
    b"%PDF": "a PDF document",
    b"<": "a web page, or XML",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive (an .npz, or a PyTorch file, whose name must end in .pt)",
    b"\x80\x02": "a pickle (a PyTorch file, whose name must end in .pt)",
}


def _refuse_other_kinds(path: str | Path) -> None:
    """Raises UserError for a file that is unreadable because it is something else."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(9)
        if head[8:] == b"{":  # safetensors: the size of its header may begin as other files do
            return
        kind = next((kind for start, kind in KINDS.items() if head.startswith(start)), "")
        if kind:
            raise UserError(f"{path} is {kind}, not weights; name a .safetensors or a .pt file")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """{name: NumPy array} of a `.safetensors`, or of a `.pt`/`.pth` that holds a state dict.

    Of a trainer's file the averaged weights are taken if there are any. Pickles are opened with
    `weights_only=True`, so a file cannot run code. bfloat16 is returned as float32. Raises
    UserError for a file that is missing, unreadable or not a state dict, and for a `.pth` if
    PyTorch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix == ".safetensors":
        return {name: np.asarray(tensor) for name, tensor in read_safetensors(str(path)).items()}
    what = f"{path}: reading a {path.suffix or 'pickled'} file needs PyTorch"
    errors.require(what, "torch", otherwise=", or pass a .safetensors")
    import torch  # pyright: ignore[reportMissingImports]  # an extra

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes happen to break
        with open(path, "rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):
                _refuse_other_kinds(path)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a readable PyTorch file ({reason[0][:120]})") from None
    state = _weights_of(path, state)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict (names to tensors); pass the weights alone")
    return {name: _to_numpy(path, name, tensor) for name, tensor in state.items()}


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]  # an extra

    tensor = tensor.detach()
    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # quantised, sparse, without data
        kind = f"{tensor.dtype}".removeprefix("torch.")
        raise UserError(
            f"{path}: {name} has dtype {kind} ({tensor.layout}, {tensor.device}); convert "
            "quantised weights to dense floats"
        ) from error


# Where trainers keep weights in their files; averages first.
WEIGHTS = ("ema", "params_ema", "ema_state_dict", "model_ema", "ema_model")
WEIGHTS += ("state_dict", "model_state_dict", "model", "params", "module")


def _weights_of(path: Path, state: Any) -> Any:
    """The weights in a trainer's file, which also has counters and moments; otherwise `state`.

    Averaged weights are preferred; of several, {decay: weights}, those with the largest decay.
    """
    for _ in range(4):  # a file can hold itself
        if not isinstance(state, dict):
            break
        inner = {key: state[key] for key in WEIGHTS if isinstance(state.get(key), dict)}
        key = next((key for key, weights in inner.items() if weights), None)
        if key is None:
            break
        logging.info("%s: read the weights under %r", path, key)
        by_decay = all(isinstance(decay, float) for decay in inner[key])
        state = inner[key][max(inner[key])] if by_decay else inner[key]
    return state


def sha256(path: str | Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(
    path: str | Path, weights: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes `weights` to `path` atomically, with `metadata` in the header."""
    from safetensors.numpy import save_file

    path, folder = str(path), os.path.dirname(path) or "."
    if not path.endswith(".safetensors"):
        raise UserError(f"--out={path}: the name must end in .safetensors")
    if not os.path.isdir(folder):
        raise UserError(f"--out={path}: the folder {folder} does not exist; create it first")
    with files.atomic(path) as beside:
        save_file(weights, beside, metadata=metadata)
        os.chmod(beside, 0o644)


def convert_metric_network(
    source: str | Path,
    out: str | Path,
    linear: str | Path | None = None,
    allow_unknown_checksum: bool = False,
) -> str:
    """Converts the file `source`, as described above, to `out`. Returns the network's name.

    linear: the file of LPIPS's linear layers. The network is 'lpips-vgg', 'lpips-alex' or
    'inception-fid'. Raises UserError for another network, a wrong shape, or a checksum that is not
    the official file's unless `allow_unknown_checksum`.
    """
    state = read_state_dict(source)
    try:
        if any(k.startswith("features.") for k in state):
            layers = None if linear is None else read_state_dict(linear)
            network, weights = lpips_torch.from_torch(state, layers)
            network = f"lpips-{network}"
        elif any(k.startswith("Mixed_") for k in state):
            if linear is not None:
                raise UserError(f"{linear}: Inception takes one file; leave the second out")
            network, weights = "inception-fid", inception_torch.from_torch(state)
        else:
            raise UserError(
                f"{source} is not vgg16, alexnet or the Inception of FID: its names begin with "
                f"{sorted(state)[:2]}"
            )
    except UserError:
        raise
    except ValueError as error:  # from the networks' modules, which do not know the path
        raise UserError(f"{source}: {error}") from None
    metadata = {"network": network, "sha256": sha256(source), "source": Path(source).name}
    _check_sum(source, metadata["sha256"], network, allow_unknown_checksum)
    if linear is not None:
        metadata["linear_sha256"] = sha256(linear)
        kind = f"linear layers of {network}"
        _check_sum(linear, metadata["linear_sha256"], kind, allow_unknown_checksum)
    write_safetensors(out, weights, metadata)
    return network


def _check_sum(path: str | Path, digest: str, kind: str, allow_unknown: bool) -> None:
    """Prints the digest. Raises UserError unless it is an official file's, or any is allowed."""
    sys.stdout.write(f"sha256 {digest}  {path}\n")
    for known, name in CHECKSUMS[kind].items():
        if digest.startswith(known):
            sys.stdout.write(f"this is {name}, {kind}\n")
            return
    names = " or ".join(f"{name} ({known}...)" for known, name in CHECKSUMS[kind].items())
    if not allow_unknown:
        raise UserError(
            f"{path} has the names of {kind}, but its sha256 {digest[:8]}... is not that of "
            f"{names}: fetch it again, or pass --allow_unknown_checksum"
        )
    logging.warning("%s is %s with an unknown checksum, not %s", path, kind, names)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 2 user error, reported in one line."""
    parser = process.parser("dcae-jax convert", __doc__)
    parser.add_argument("input", help="a .pth, .pt or .safetensors")
    parser.add_argument("linear", nargs="?", help="LPIPS linear layers")
    parser.add_argument("--out", required=True, help="the .safetensors to write")
    parser.add_argument(
        "--allow_unknown_checksum", action="store_true", help="warn, not fail, if SHA-256 differs"
    )
    try:
        flags = parser.parse_args(arguments)
        network = convert_metric_network(
            flags.input, flags.out, flags.linear, flags.allow_unknown_checksum
        )
    except (Exception, KeyboardInterrupt) as error:
        return process.failure(error)
    sys.stdout.write(f"wrote {flags.out}: {network}, {os.path.getsize(flags.out)} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
