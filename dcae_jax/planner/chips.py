# SPDX-License-Identifier: Apache-2.0
"""TPU slices you don't have: published specifications, and compile-only devices."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dcae_jax import errors
from dcae_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip, and libtpu's name of its configuration."""

    flops: float  # per second, bfloat16
    hbm: float  # bytes
    bandwidth: float  # of the HBM, bytes per second
    watts: float  # under load
    axes: int  # of a slice: v5e:4x4, v5p:2x2x1
    config_name: str  # libtpu's chip_config_name; with megacore a chip's two cores are one device


# Compute, memory and bandwidth: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture).
# Watts: for v4 the mean of its production use (Jouppi et al. 2023, arXiv:2304.01433, table 4: 121
# min, 170 mean, 192 max). None are published for the later ones. ASSUMED: v5e and v5p take v4's
# energy per FLOP at their peaks, v6e 1/1.67 of v5e's (Google's announcement of Trillium, May 2024).
# --config.plan.watts replaces them. Hosts, network and cooling are not included.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 170.0, 3, "megacore"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 120.0, 2, "default"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 280.0, 3, "megacore"),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 340.0, 2, "default"),
}

# Device kinds, as JAX reports them.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


# FLOPs per second of GPUs, bfloat16 without sparsity (NVIDIA's data sheets); none is planned for.
GPUS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """FLOPs per second, in bfloat16, of a device of this kind; None if unknown, as of a CPU."""
    return CHIPS[KINDS[kind]].flops if kind in KINDS else GPUS.get(kind)


# Not available to a program: libtpu keeps a quarter of a GiB, and prefetched batches take room.
RESERVE = GIB / 2


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips along each axis; () for the CPU of this host."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.kind)


def topology(text: str) -> Topology:
    """The slice called `text`: cpu, or KIND:AxB or KIND:AxBxC. Raises UserError."""
    if text == "cpu":
        return Topology("cpu", ())
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[1] not in CHIPS:
        raise UserError(
            f"topology {text!r} is not known; name one of {', '.join(CHIPS)} with the chips along "
            "each axis, as in v5e:4x4 or v5p:2x2x1, or cpu"
        )
    kind, shape = found[1], tuple(map(int, found[2].split("x")))
    axes = CHIPS[kind].axes
    if len(shape) != axes or not all(shape):
        example = "x".join("221"[:axes])
        raise UserError(
            f"topology {text!r}: a {kind} slice has {axes} axes, as in {kind}:{example}"
        )
    return Topology(kind, shape)


def count(text: str) -> int:
    """Number of devices of a topology."""
    shape = topology(text).shape
    return math.prod(shape) if shape else len(jax.devices("cpu"))


def check_compiler(text: str) -> None:
    """Raises UserError unless the compiler for a topology is installed."""
    if topology(text).kind != "cpu":
        what = f"topology {text!r} needs the TPU compiler"
        errors.require(what, "libtpu", otherwise=" (it needs no TPU), or plan for cpu")


def devices(text: str) -> Sequence[Any]:  # type checkers do not know jax.Device as a type
    """Devices of a topology to compile for; TPU devices cannot run anything.

    Loads libtpu and holds its lock until this process exits. Raises UserError for a slice that
    libtpu rejects.
    """
    slice_ = topology(text)
    if slice_.chip is None:
        return jax.devices("cpu")
    check_compiler(text)
    # A host has up to 2 x 2 chips; fewer if an axis is odd.
    host = [math.gcd(2, size) for size in slice_.shape[:2]] + [1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=text,
            chip_config_name=slice_.chip.config_name,
            chips_per_host_bounds=host,
        )
    except Exception as error:
        raise UserError(
            f"topology {text!r} is rejected by libtpu: {str(error).splitlines()[0]}"
        ) from error
    return found.devices
