# SPDX-License-Identifier: Apache-2.0
"""Reads weights that others published for PyTorch, and writes them as this package's safetensors.

    python -m dcae_jax.pretrained.torch_io INPUT [LINEAR] --out=X.safetensors

INPUT is one of the judges' files, recognised by its names: torchvision's vgg16 or alexnet (LPIPS),
or the Inception of FID from pytorch-fid or torch-fidelity. LINEAR is PerceptualSimilarity's
v0.1/vgg.pth or alex.pth for LPIPS; without it the same layers are taken from this package.
A `.safetensors` of the same names is read without PyTorch; `.pth` needs it (extra `torch`).
"""

import argparse
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dcae_jax import files
from dcae_jax.models import inception_torch, lpips_torch

# The first hex digits of each official file's SHA-256; torchvision and pytorch-fid put 8 of them
# in the file's name, those of the linear layers are of the files in the PyPI package lpips 0.1.4.
CHECKSUMS = {
    "lpips-vgg": {"397923af": "vgg16-397923af.pth"},
    "lpips-alex": {"7be5be79": "alexnet-owt-7be5be79.pth"},
    "inception-fid": {"6726825d": "pt_inception-2015-12-05-6726825d.pth"},
    "linear layers of lpips-vgg": {"a78928a0": "v0.1/vgg.pth"},
    "linear layers of lpips-alex": {"df73285e": "v0.1/alex.pth"},
}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a `.safetensors`, or a `.pt`/`.pth` that holds a state dict -> name -> NumPy array.

    Of a trainer's file it takes the averaged weights if there are any, else the weights. Pickles
    are opened with `weights_only=True`, so a file cannot run code. bfloat16 arrives as float32.
    Raises ValueError with one line for a file that is missing, unreadable or no state dict, and
    where `.pth` needs PyTorch and it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} is not readable safetensors ({error}): fetch it again"
            ) from None
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: reading a {path.suffix or 'pickled'} file needs PyTorch; "
            "pip install 'dcae_jax[torch]', or pass a .safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes happen to break
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is not a readable PyTorch file ({reason[0][:120]})") from None
    state = _weights_of(state)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict (names with tensors): pass the weights alone")
    return {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in state.items()}


def _weights_of(state: Any) -> Any:
    """The weights of a trainer's file, which has counters and moments beside them; or `state`.

    Averages come first; of averages by decay, {0.9999: weights}, those of the largest decay.
    """
    if not isinstance(state, dict):
        return state
    for key in ("ema", "state_dict", "model_state_dict"):
        weights = state.get(key)
        if isinstance(weights, dict) and weights:
            by_decay = all(isinstance(decay, float) for decay in weights)
            return weights[max(weights)] if by_decay else weights
    return state


def sha256(path: str | Path) -> str:
    """-> the file's SHA-256 as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(
    path: str | Path, weights: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes `weights` (name -> array) beside `path`, then renames: nobody reads half a file.

    metadata: name -> str, stored in the header.
    """
    from safetensors.numpy import save_file

    path, folder = str(path), os.path.dirname(path) or "."
    if not path.endswith(".safetensors"):
        raise ValueError(f"--out={path}: the name must end in .safetensors")
    if not os.path.isdir(folder):
        raise ValueError(f"--out={path}: the folder {folder} does not exist; create it first")
    with files.atomic(path) as beside:
        save_file(weights, beside, metadata=metadata)
        os.chmod(beside, 0o644)


def convert_judge(
    source: str | Path,
    out: str | Path,
    linear: str | Path | None = None,
    allow_unknown_checksum: bool = False,
) -> str:
    """Converts a judge's weights, see the top of this file -> the network's name.

    source, linear, out: paths. The network is 'lpips-vgg', 'lpips-alex' or 'inception-fid'. Raises
    ValueError, one line, for another network, a wrong shape, or a checksum that is not the
    official file's unless `allow_unknown_checksum`.
    """
    state = read_state_dict(source)
    if any(k.startswith("features.") for k in state):
        layers = None if linear is None else read_state_dict(linear)
        network, weights = _named(source, lpips_torch.from_torch, state, layers)
        network = f"lpips-{network}"
    elif any(k.startswith("Mixed_") for k in state):
        if linear is not None:
            raise ValueError(f"{linear}: Inception takes one file; leave the second out")
        network, weights = "inception-fid", _named(source, inception_torch.from_torch, state)
    else:
        raise ValueError(
            f"{source} is none of vgg16, alexnet and the Inception of FID: "
            f"its names begin with {sorted(state)[:2]}"
        )
    metadata = {"network": network, "sha256": sha256(source), "source": Path(source).name}
    _check_sum(source, metadata["sha256"], network, allow_unknown_checksum)
    if linear is not None:
        metadata["linear_sha256"] = sha256(linear)
        kind = f"linear layers of {network}"
        _check_sum(linear, metadata["linear_sha256"], kind, allow_unknown_checksum)
    write_safetensors(out, weights, metadata)
    return network


def _named(path, convert, *arguments):
    try:
        return convert(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_sum(path, digest, kind, allow_unknown):
    sys.stdout.write(f"sha256 {digest}  {path}\n")
    for known, name in CHECKSUMS[kind].items():
        if digest.startswith(known):
            sys.stdout.write(f"this is {name}, {kind}\n")
            return
    names = " or ".join(f"{name} ({known}...)" for known, name in CHECKSUMS[kind].items())
    if not allow_unknown:
        raise ValueError(
            f"{path} has the names of {kind}, but its sha256 {digest[:8]}... is not that of "
            f"{names}: fetch it again, or pass --allow_unknown_checksum"
        )
    logging.warning("%s is %s with an unknown checksum, not %s", path, kind, names)


def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit status: 0 done, 2 a mistake of the user, told in one line."""
    parser = argparse.ArgumentParser(
        "python -m dcae_jax.pretrained.torch_io",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="a .pth, .pt or .safetensors")
    parser.add_argument("linear", nargs="?", help="LPIPS linear layers")
    parser.add_argument("--out", required=True, help="the .safetensors to write")
    parser.add_argument("--allow_unknown_checksum", action="store_true")

    def fail(message):
        sys.stderr.write(f"{message}\n")
        raise SystemExit(2)

    parser.error = fail
    flags = parser.parse_args(argv)
    try:
        network = convert_judge(flags.input, flags.out, flags.linear, flags.allow_unknown_checksum)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"wrote {flags.out}: {network}, {os.path.getsize(flags.out)} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
