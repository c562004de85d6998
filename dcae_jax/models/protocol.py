# SPDX-License-Identifier: Apache-2.0
"""The interface of a model file.

An autoencoder is a file with what `AutoencoderModule` lists, a backbone of diffusion models one
with what `BackboneModule` lists; nothing else names either. A file with `_torch` after its name
beside it, if there is one, knows the weights that others publish (`AutoencoderNames`,
`BackboneNames`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from flax import nnx

Arrays = dict[str, np.ndarray]


class AutoencoderArchitecture(Protocol):
    """Everything that fixes the parameters, and the scale of the latents. Frozen."""

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


class AutoencoderModule(Protocol):
    """Its model has `encode` and `decode`, and `posterior` if it gives a distribution.

    A mapping PUBLISHED, if there is one, has further names that `variant` takes.
    """

    __name__: str
    VARIANTS: Mapping[str, Any]
    variant: Callable[[str], Any]
    architecture: Callable[[Any], Any]
    create: Callable[..., nnx.Module]
    reach: Callable[[Any], tuple[int | None, int | None]]
    last_layer: Callable[[Any], str]


class BackboneArchitecture(Protocol):
    """Everything that fixes the parameters. Frozen."""

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
    """An autoencoder in the formats of PyTorch: 'diffusers', and others that FORMATS lists."""

    FORMATS: tuple[str, ...]
    CLASS_NAME: str  # in diffusers

    def to_torch(self, weights: Mapping[str, Any], arch: Any, form: str) -> Arrays: ...
    def from_torch(self, tensors: Mapping[str, Any], arch: Any, form: str) -> Arrays: ...

    def format_of(self, found: Iterable[str]) -> str | None:
        """The format whose names these are; None where they are none of this model's."""
        ...

    def recognise(self, tensors: Mapping[str, Any]) -> Any | None:
        """The variant that has these tensors, None if none has; for files without config.json."""
        ...

    def config_of(self, arch: Any, form: str) -> dict[str, Any]:
        """config.json of an architecture."""
        ...

    def variant_of(self, config: Mapping[str, Any], form: str) -> Any:
        """The architecture of a config.json, scaling_factor None where it says none."""
        ...

    def published_name(self, arch: Any) -> str:
        """The authors' name of this architecture; '' if it is none of theirs."""
        ...

    def settings_of(self, arch: Any) -> dict[str, Any]:
        """The keys of config.model that make the architecture."""
        ...


class BackboneNames(Protocol):
    """A backbone as its authors publish it; their names may have a prefix."""

    TITLE: str  # what its paper calls it
    FIRST: str  # a tensor that only this model has
    KINDS: Mapping[str, str]  # objective -> what the authors call the model trained on it

    def to_torch(self, weights: Mapping[str, Any], arch: Any, prefix: str = "") -> Arrays: ...
    def from_torch(self, tensors: Mapping[str, Any], arch: Any, prefix: str = "") -> Arrays: ...

    def recognise(self, tensors: Mapping[str, Any], heads: int, prefix: str = "") -> Any | None:
        """The architecture that has these tensors, None if it is no model of this kind."""
        ...
