# SPDX-License-Identifier: Apache-2.0
"""The interface of a model file.

An autoencoder file implements `AutoencoderModule`, a diffusion backbone file `BackboneModule`; no
other file names either. An optional `<file>_torch.py` beside it maps published weights
(`AutoencoderNames`, `BackboneNames`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from flax import nnx

Arrays = dict[str, np.ndarray]


class AutoencoderArchitecture(Protocol):
    """Everything that determines the parameters and the scale of the latents. Frozen."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def encoder_depths(self) -> tuple[int, ...]: ...
    @property
    def decoder_depths(self) -> tuple[int, ...]: ...
    @property
    def scaling_factor(self) -> float | None: ...
    @property
    def compression(self) -> int: ...
    @property
    def cuttable(self) -> bool: ...


class AutoencoderModule(Protocol):
    """Its model has `encode` and `decode`, and `posterior` if it encodes to a distribution.

    An optional mapping PUBLISHED has further names that `variant` accepts. A module with cuttable
    variants has `cut`.
    """

    __name__: str
    VARIANTS: Mapping[str, Any]
    variant: Callable[[str], Any]
    architecture: Callable[[Any], Any]
    create: Callable[..., nnx.Module]
    reach: Callable[[Any], tuple[int | None, int | None]]
    last_layer: Callable[[Any], str]


class BackboneArchitecture(Protocol):
    """Everything that determines the parameters. Frozen."""

    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def latent_size(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...


class BackboneModule(Protocol):
    """Its model maps (noisy latents, time, labels) to a prediction."""

    __name__: str
    VARIANTS: Mapping[str, Any]
    architecture: Callable[..., Any]
    create: Callable[..., nnx.Module]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]


class AutoencoderNames(Protocol):
    """An autoencoder in PyTorch's formats: 'diffusers', and others listed in FORMATS."""

    FORMATS: tuple[str, ...]
    CLASS_NAME: str  # in diffusers

    def to_torch(self, weights: Mapping[str, Any], arch: Any, form: str) -> Arrays: ...
    def from_torch(self, tensors: Mapping[str, Any], arch: Any, form: str) -> Arrays: ...

    def format_of(self, found: Iterable[str]) -> str | None:
        """The format that uses these names; None if they are not this model's."""
        ...

    def recognise(self, tensors: Mapping[str, Any]) -> Any | None:
        """The variant with these tensors, or None; for files without config.json."""
        ...

    def config_of(self, arch: Any, form: str) -> dict[str, Any]:
        """config.json of an architecture."""
        ...

    def variant_of(self, config: Mapping[str, Any], form: str) -> Any:
        """The architecture of a config.json; scaling_factor is None if it has none."""
        ...

    def published_name(self, arch: Any) -> str:
        """The authors' name for this architecture; '' if they have none."""
        ...

    def settings_of(self, arch: Any) -> dict[str, Any]:
        """The keys of config.model that build the architecture."""
        ...


class BackboneNames(Protocol):
    """A backbone as its authors publish it; their names may have a prefix."""

    TITLE: str  # its name in the paper
    FIRST: str  # a tensor that only this model has
    KINDS: Mapping[str, str]  # objective -> the authors' name for a model trained on it

    def to_torch(self, weights: Mapping[str, Any], arch: Any, prefix: str = "") -> Arrays: ...
    def from_torch(self, tensors: Mapping[str, Any], arch: Any, prefix: str = "") -> Arrays: ...

    def recognise(self, tensors: Mapping[str, Any], heads: int, prefix: str = "") -> Any | None:
        """The architecture with these tensors, or None if they are not of this kind of model."""
        ...
