# SPDX-License-Identifier: Apache-2.0
"""LPIPS weights from torchvision's classifiers or our converted file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dcae_jax.models import lpips, torch_layout

Arrays = Mapping[str, np.ndarray]
NETS = ("vgg", "alex")


def from_torch(state: Arrays, linear: Arrays | None = None) -> tuple[str, dict[str, np.ndarray]]:
    """State dict of torchvision's vgg16 or alexnet -> (net, weights).

    state: name -> NumPy array; the classifier's layers may be present and are dropped. linear: the
    state dict of PerceptualSimilarity's v0.1/vgg.pth or alex.pth; None takes the shipped layers.
    Raises ValueError for any other network.
    """
    net = "vgg" if "features.28.weight" in state else "alex"
    expected = lpips.shapes(net)
    names = {k for k in state if not k.startswith("classifier.")}
    wanted = {k.replace("kernel", "weight") for k in expected if k.startswith("features.")}
    if names != wanted:
        odd = sorted(names ^ wanted)[0]
        fault = "unexpected" if odd in names else "missing"
        raise ValueError(f"not torchvision's vgg16 or alexnet: {odd!r} is {fault}")
    weights = lpips.linear_layers(net)
    if linear is not None:
        wanted = {f"lin{i}.model.1.weight": f"lin{i}" for i in range(5)}
        if set(linear) != set(wanted):
            raise ValueError(f"not LPIPS linear layers of v0.1: it holds {sorted(linear)[:3]}")
        weights = {ours: linear[name].reshape(-1) for name, ours in wanted.items()}
    for name in expected:
        if name.endswith("kernel"):
            kernel = state[name.replace("kernel", "weight")]
            weights[name] = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel
        elif name.endswith("bias"):
            weights[name] = state[name]
    weights = {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}
    torch_layout.check_shapes(weights, expected, "this file", _title(net))
    return net, weights


def load(path: str | Path, net: str | None = None) -> dict[str, np.ndarray]:
    """Reads a file that `dcae-jax convert` wrote -> weights for `lpips.distance`.

    net: 'vgg' or 'alex' rejects a file of the other network; None accepts either. Raises ValueError
    for a file of another kind, or with missing, unknown or misshapen arrays.
    """
    wanted = NETS if net is None else (net,)
    network, weights = torch_layout.read_converted(
        path,
        "LPIPS",
        f"LPIPS of net={net or 'vgg or alex'}",
        tuple(f"lpips-{name}" for name in wanted),
    )
    found = network.removeprefix("lpips-")
    torch_layout.check_shapes(weights, lpips.shapes(found), path, _title(found))
    return weights


def _title(net: str) -> str:
    return f"LPIPS of net={net!r}"
