# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run, and which parameters it trains."""

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import optax
import optax.contrib

from dcae_jax.config.schema import Optimizer
from dcae_jax.errors import UserError

RMS = 0.2  # of Muon's updates before the learning rate, about AdamW's (arXiv:2502.16982)


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then constant or cosine to 0 at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    if not warmup:
        return after
    rise = optax.linear_schedule(settings.warmup_from * peak, peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def match(patterns: Iterable[str], names: Iterable[str], key: str) -> frozenset[str]:
    """The names that at least one pattern matches in full.

    Raises UserError for a pattern that matches nothing: renaming a layer must not silently change
    what is trained or frozen.
    """
    names = tuple(names)
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression ({error})") from error
        if not hits:
            # Paths of stacked blocks have '*' where a user expects the block's number.
            numbers = {"0", *re.findall(r"\d+", pattern)}
            stacked = [name for name in names if "*" in name]
            if any(re.fullmatch(pattern, s.replace("*", n)) for s in stacked for n in numbers):
                raise UserError(
                    f"{key}: pattern {pattern!r} names one block of a stack, which is one array; "
                    f"name the whole stack: its paths look like {stacked[0]!r}"
                )
            raise UserError(
                f"{key}: pattern {pattern!r} matches no parameter; paths look like {names[0]!r}"
            )
        found |= hits
    return frozenset(found)


def optimizer(
    settings: Optimizer, steps: int, params: Mapping[str, Any], trained: frozenset[str]
) -> optax.GradientTransformation:
    """AdamW on the parameters in `trained`, or Muon on those of them that optimizer.muon matches.

    params: arrays or their shapes, by path. The others get zero updates and have no moments.

    Clipping and weight decay are inside the trained branch: outside it, they would need the
    gradients of frozen parameters, and XLA would compute the backward pass that freezing saves.
    """
    decayed = match(settings.decay, params, "optimizer.decay") if settings.decay else frozenset()
    rate = schedule(settings, steps)

    def decays(params: Mapping[str, Any]) -> dict[str, bool]:
        return {name: name in decayed for name in params}

    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    adamw = optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decays,
    )
    if settings.muon:
        axes = _matrices(settings.muon, params)

        def matrices(params: Any) -> Any:  # optax types arrays only
            return {name: axes.get(name) for name in params}

        muon = optax.contrib.muon(
            rate,
            weight_decay=settings.weight_decay,
            weight_decay_mask=decays,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=RMS,
        )
        kinds = {name: "muon" if name in axes else "adamw" for name in params}
        parts.append(optax.partition({"adamw": adamw, "muon": muon}, kinds))
    else:
        parts.append(adamw)
    labels = {name: "train" if name in trained else "freeze" for name in params}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "train": optax.chain(*parts),
        "freeze": optax.set_to_zero(),
    }
    return optax.partition(transforms, labels)


def _matrices(
    patterns: Iterable[str], params: Mapping[str, Any]
) -> dict[str, optax.contrib.MuonDimensionNumbers]:
    """{path: its axes as a matrix} of the kernels that Muon can train. Raises UserError.

    A kernel's last axis is its output, the others are its inputs; those of stacked blocks are one
    matrix each. The kernel of a depthwise convolution is not a matrix, and stays with AdamW.
    """
    axes = {}
    for name in match(patterns, params, "optimizer.muon"):
        shape, first = params[name].shape, int("*" in name)
        if len(shape) - first < 2:
            raise UserError(
                f"optimizer.muon matches {name!r}, a vector; match kernels, as '.*kernel' does"
            )
        if shape[-2] > 1:
            inputs = tuple(range(first, len(shape) - 1))
            axes[name] = optax.contrib.MuonDimensionNumbers(inputs, len(shape) - 1)
    return axes


def discriminator_optimizer(
    settings: Optimizer, learning_rate: float
) -> optax.GradientTransformation:
    """AdamW for the whole discriminator, with the run's betas and its own learning rate."""
    return optax.adamw(
        learning_rate, b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=0.0
    )
