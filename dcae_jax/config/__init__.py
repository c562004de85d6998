# SPDX-License-Identifier: Apache-2.0
"""The configuration: schema.py declares every key; the files of configs/ override some."""

from dcae_jax.config.checks import check, check_resolution
from dcae_jax.config.identity import flatten, identity_changes, to_json
from dcae_jax.config.loading import (
    MISTAKES,
    SHIPPED,
    explain,
    key_flag,
    load_file,
    locate_in,
    parse_file,
    suggest,
)
from dcae_jax.config.schema import Config, default, replace, training_resolutions
from dcae_jax.config.validation import (
    diffusion_section,
    model_section,
    validate,
    validate_phases,
)

__all__ = [
    "MISTAKES",
    "SHIPPED",
    "Config",
    "check",
    "check_resolution",
    "default",
    "diffusion_section",
    "explain",
    "flatten",
    "identity_changes",
    "key_flag",
    "load_file",
    "locate_in",
    "model_section",
    "parse_file",
    "replace",
    "suggest",
    "to_json",
    "training_resolutions",
    "validate",
    "validate_phases",
]
