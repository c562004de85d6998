# SPDX-License-Identifier: Apache-2.0
"""FID's Inception from PyTorch's weights (pytorch-fid, torch-fidelity) or our converted file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dcae_jax.models import inception, torch_layout

TITLE = "the Inception of FID"


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State dict of pytorch-fid's or torch-fidelity's Inception -> weights, BatchNorm folded in.

    state: name -> NumPy array. Raises ValueError for any other network, including torchvision's.
    """
    statistics = ("weight", "bias", "running_mean", "running_var")
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    layers = [k.removesuffix(".kernel") for k in inception.shapes() if k.endswith(".kernel")]
    layers.remove("fc")
    expected = {"fc.weight", "fc.bias"}
    for name in layers:
        expected |= {f"{name}.conv.weight", *(f"{name}.bn.{s}" for s in statistics)}
    if any(k.startswith("AuxLogits.") for k in state):
        raise ValueError(
            "this is torchvision's ImageNet Inception, which gives a different FID: "
            "use pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
        )
    if expected != state.keys():
        odd = sorted(expected ^ state.keys())[0]
        fault = "unexpected" if odd in state else "missing"
        raise ValueError(f"not the Inception of FID: {odd!r} is {fault}")
    weights = {"fc.kernel": state["fc.weight"].T, "fc.bias": state["fc.bias"]}
    for name in layers:
        scale, bias, mean, variance = (
            np.asarray(state[f"{name}.bn.{s}"], np.float64) for s in statistics
        )
        scale = scale / np.sqrt(variance + 1e-3)
        kernel = np.asarray(state[f"{name}.conv.weight"], np.float64)
        if kernel.ndim == 4 and kernel.shape[0] == scale.size:
            kernel = kernel.transpose(2, 3, 1, 0) * scale
        weights[f"{name}.kernel"] = kernel
        weights[f"{name}.bias"] = bias - mean * scale
    weights = {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}
    torch_layout.check_shapes(weights, inception.shapes(), "this file", TITLE)
    return weights


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a file that `dcae-jax convert` wrote -> weights for `inception.features`.

    Raises ValueError for a file of another kind, or with missing, unknown or misshapen arrays.
    """
    _, weights = torch_layout.read_converted(path, "Inception", TITLE, ("inception-fid",))
    torch_layout.check_shapes(weights, inception.shapes(), path, TITLE)
    return weights
