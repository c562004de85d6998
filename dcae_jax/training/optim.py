# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run, and which parameters it trains."""

import re
from collections.abc import Hashable, Iterable
from typing import Any

import optax

from dcae_jax.errors import UserError


def schedule(config: Any) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then constant or cosine to 0 at config.steps."""
    o = config.optimizer
    peak, warmup = o.learning_rate, o.warmup_steps
    if o.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1))
    if not warmup:
        return after
    rise = optax.linear_schedule(o.warmup_from * peak, peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def match(patterns: Iterable[str], names: Iterable[str], key: str) -> frozenset[str]:
    """The names that one of the patterns matches whole.

    Raises UserError for a pattern that matches nothing: after a layer is renamed, it must not
    silently train (or freeze) everything else.
    """
    names = tuple(names)
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from error
        if not hits:
            # Blocks that are one stacked array have '*' in place of the number that a user counts.
            numbers = {"0", *re.findall(r"\d+", pattern)}
            stacked = [name for name in names if "*" in name]
            if any(re.fullmatch(pattern, s.replace("*", n)) for s in stacked for n in numbers):
                raise UserError(
                    f"{key}: pattern {pattern!r} names one of several blocks, which are one array; "
                    f"name all of them: their paths look like {stacked[0]!r}"
                )
            raise UserError(
                f"{key}: pattern {pattern!r} matches no parameter; paths look like {names[0]!r}"
            )
        found |= hits
    return frozenset(found)


def optimizer(
    config: Any, names: Iterable[str], trained: frozenset[str]
) -> optax.GradientTransformation:
    """AdamW on the parameters in `trained`; the others get zero updates and have no moments.

    Clipping and weight decay stand inside the trained branch: outside of it they would need the
    gradients of frozen parameters, and XLA would compute the backward pass that freezing saves.
    """
    o = config.optimizer
    names = tuple(names)
    decayed = match(o.decay, names, "optimizer.decay") if o.decay else frozenset()

    def decays(params: Any) -> dict[str, bool]:
        return {name: name in decayed for name in params}

    steps = []
    if o.clip_norm:
        steps.append(optax.clip_by_global_norm(o.clip_norm))
    steps.append(
        optax.adamw(
            schedule(config),
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mask=decays,
        )
    )
    labels = {name: "train" if name in trained else "freeze" for name in names}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "train": optax.chain(*steps),
        "freeze": optax.set_to_zero(),
    }
    return optax.partition(transforms, labels)


def discriminator_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW for all of the discriminator, with the betas of the run and its own learning rate."""
    o = config.optimizer
    return optax.adamw(config.loss.gan_learning_rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=0.0)
