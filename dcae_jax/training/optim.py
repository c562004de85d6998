# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run, and which parameters it trains."""

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import optax

from dcae_jax.config.schema import Optimizer
from dcae_jax.errors import UserError


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
    settings: Optimizer, steps: int, names: Iterable[str], trained: frozenset[str]
) -> optax.GradientTransformation:
    """AdamW on the parameters in `trained`; the others get zero updates and have no moments.

    Clipping and weight decay are inside the trained branch: outside it, they would need the
    gradients of frozen parameters, and XLA would compute the backward pass that freezing saves.
    """
    names = tuple(names)
    decayed = match(settings.decay, names, "optimizer.decay") if settings.decay else frozenset()

    def decays(params: Mapping[str, Any]) -> dict[str, bool]:
        return {name: name in decayed for name in params}

    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    parts.append(
        optax.adamw(
            schedule(settings, steps),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decays,
        )
    )
    labels = {name: "train" if name in trained else "freeze" for name in names}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "train": optax.chain(*parts),
        "freeze": optax.set_to_zero(),
    }
    return optax.partition(transforms, labels)


def discriminator_optimizer(
    settings: Optimizer, learning_rate: float
) -> optax.GradientTransformation:
    """AdamW for the whole discriminator, with the run's betas and its own learning rate."""
    return optax.adamw(
        learning_rate, b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=0.0
    )
