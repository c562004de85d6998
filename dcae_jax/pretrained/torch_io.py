# SPDX-License-Identifier: Apache-2.0
"""Converts the weights of metric networks from PyTorch files to safetensors of this package.

    dcae-jax convert INPUT [LINEAR] --out=X.safetensors
    dcae-jax convert alexnet-owt-7be5be79.pth --out=lpips-alex.safetensors

INPUT is recognised by its tensors' names: torchvision's vgg16 or alexnet (LPIPS), or the Inception
of FID from pytorch-fid or torch-fidelity. LINEAR is PerceptualSimilarity's v0.1/vgg.pth or alex.pth
for LPIPS; by default the same layers are taken from this package. A `.safetensors` with the same
names is read without PyTorch; `.pth` needs it.
"""

import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dcae_jax import errors, files
from dcae_jax.errors import UserError
from dcae_jax.models import inception_torch, lpips_torch
from dcae_jax.runtime import process

# The first hex digits of each official file's SHA-256. torchvision and pytorch-fid put 8 of them
# in the file's name; the linear layers' files are those of the PyPI package lpips 0.1.4.
CHECKSUMS = {
    "lpips-vgg": {"397923af": "vgg16-397923af.pth"},
    "lpips-alex": {"7be5be79": "alexnet-owt-7be5be79.pth"},
    "inception-fid": {"6726825d": "pt_inception-2015-12-05-6726825d.pth"},
    "linear layers of lpips-vgg": {"a78928a0": "v0.1/vgg.pth"},
    "linear layers of lpips-alex": {"df73285e": "v0.1/alex.pth"},
}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """{name: NumPy array} of a `.safetensors`, or of a `.pt`/`.pth` that holds a state dict.

    Of a trainer's file the averaged weights are taken if there are any. Pickles are opened with
    `weights_only=True`, so a file cannot run code. bfloat16 is returned as float32. Raises
    UserError for a file that is missing, unreadable or no state dict, and for a `.pth` if PyTorch
    is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not readable safetensors ({error}): fetch it again"
            ) from None
    what = f"{path}: reading a {path.suffix or 'pickled'} file needs PyTorch"
    errors.require(what, "torch", otherwise=", or pass a .safetensors")
    import torch  # pyright: ignore[reportMissingImports]  # an extra

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes happen to break
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a readable PyTorch file ({reason[0][:120]})") from None
    state = _weights_of(state)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict (names with tensors): pass the weights alone")
    return {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in state.items()}


def _weights_of(state: Any) -> Any:
    """The weights of a trainer's file, which has counters and moments beside them; or `state`.

    Averages are preferred; of averages by decay, {0.9999: weights}, those of the largest decay.
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
                f"{source} is none of vgg16, alexnet and the Inception of FID: "
                f"its names begin with {sorted(state)[:2]}"
            )
    except UserError:
        raise
    except ValueError as error:  # of the networks' files, which do not know the path
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
    parser.add_argument("--allow_unknown_checksum", action="store_true")
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
