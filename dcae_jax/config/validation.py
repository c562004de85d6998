# SPDX-License-Identifier: Apache-2.0
"""Validation of a ConfigDict into the frozen `Config`: types, bounds and choices of each key."""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from ml_collections import ConfigDict

from dcae_jax.config import checks
from dcae_jax.config.loading import PHASES
from dcae_jax.config.schema import INT_MAX, Config, Diffusion, Model, known_keys
from dcae_jax.errors import UserError

T = TypeVar("T")


def validate(config: ConfigDict | Config) -> Config:
    """The frozen configuration. Raises UserError for wrong types and invalid values."""
    if not isinstance(config, Config):
        config = _section(Config, config.to_dict(), "")
    checks.check(config)
    return config


def validate_phases(chain: ConfigDict) -> dict[str, Config]:
    """{phase: frozen configuration} of the job `phases`. Raises UserError."""
    return {phase: validate(cast(ConfigDict, chain[phase])) for phase in PHASES}


def model_section(saved: Any) -> Model:
    """The section `model` of a JSON file. Raises UserError.

    The file is untrusted: unknown keys, wrong types and out-of-range sizes are errors.
    """
    if not isinstance(saved, dict):
        raise UserError(f"model is {str(saved)[:40]!r}, not an object")
    for name in saved:
        if name not in known_keys(Model):
            raise UserError(f"model.{str(name)[:40]} is not a key of this version")
    return _section(Model, dataclasses.asdict(Model()) | saved, "model.")


def diffusion_section(saved: Mapping[str, Any]) -> Diffusion:
    """The keys of a diffusion model from a JSON file's, others ignored. Raises UserError."""
    known = {key: saved[key] for key in known_keys(Diffusion) if key in saved}
    return _section(Diffusion, dataclasses.asdict(Diffusion()) | known, "")


@functools.cache
def _types(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _section(section: type[T], values: Mapping[str, Any], prefix: str) -> T:
    found = {}
    for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
        kind, value = _types(section)[field.name], values[field.name]
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            found[field.name] = _section(cast(type, kind), value, f"{name}.")
            continue
        found[field.name] = _value(name, value, kind, field.default, field.metadata)
    return section(**found)


def _value(name: str, value: Any, kind: Any, default: Any, rules: Mapping[str, Any]) -> Any:
    """`value` as the type of its key: lists become tuples, ints floats. Raises UserError."""
    mistyped = f"must have the type of the default {default!r} ({type(default).__name__})"
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list):
            raise UserError(f"{name}={_short(value)} {mistyped}")
        value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
        problem = _tuple_problem(name, value, typing.get_args(kind)[0], rules)
    else:
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise UserError(f"{name}={_short(value)} {mistyped}")
        problem = _problem(name, value, kind, rules)
    if problem:
        raise UserError(problem)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _problem(name: str, value: Any, kind: Any, rules: Mapping[str, Any]) -> str:
    """The error of a single value, with the remedy; '' if the value is valid."""
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        choices = ", ".join(typing.get_args(kind))
        return f"{name}={value!r} is not known; choose one of {choices}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return f"{name}={value} is not finite; give a number"
    ge, gt, le, lt = (rules[rule] for rule in ("ge", "gt", "le", "lt"))
    if ge is not None and le is not None and not ge <= value <= le:
        return f"{name}={value} must be in [{ge}, {le}]"
    if ge is not None and lt is not None and not ge <= value < lt:
        return f"{name}={value} must be in [{ge}, {lt})"
    if gt is not None and not gt < value < (math.inf if lt is None else lt):
        return f"{name}={value} must be above {gt}" + (f" and below {lt}" if lt else "")
    if ge is not None and value < ge:
        return f"{name}={value} is too small; it must be at least {ge}"
    if isinstance(value, int) and le is None and value > INT_MAX:
        return f"{name}={value} is too large; it must be at most {INT_MAX}"
    return ""


def _tuple_problem(name: str, value: tuple, kind: Any, rules: Mapping[str, Any]) -> str:
    """The same for a tuple with entries of type `kind`."""
    if rules["length"] and len(value) not in rules["length"]:
        return f"{name}={value!r} must be two numbers"
    for entry in value:
        if kind is str:
            if not isinstance(entry, str) or not entry:
                return f"{name}={value!r}: {entry!r} must be a non-empty string, as in ('...',)"
        elif kind in (int, float):
            right = isinstance(entry, int | kind) and not isinstance(entry, bool)
            if not right or not rules["ge"] <= entry <= rules["le"]:
                what = "an int" if kind is int else "a number"
                bounds = f"[{rules['ge']}, {rules['le']}]"
                return f"{name}={value!r}: {entry!r} must be {what} in {bounds}"
        else:
            parts = typing.get_args(kind)
            fits = isinstance(entry, tuple) and len(entry) == len(parts)
            if kind == tuple[str, str] and not (fits and all(isinstance(p, str) for p in entry)):
                return f"{name}: {entry!r} must be a pair (path pattern, rule)"
            if not fits or (parts[0] is float and isinstance(entry[0], str)):
                return f"{name}: {entry!r} must be (weight, source, path)"
    return ""
