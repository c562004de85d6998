# SPDX-License-Identifier: Apache-2.0
"""One training step: a pure function (state, batch, judges) -> (state, metrics), jitted once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcae_jax import losses, optim
from dcae_jax.models import layers
from dcae_jax.state import Blueprint, TrainState

Array = jax.Array
Metrics = dict[str, Array]
Judges = dict[str, layers.Weights]  # weights of the networks in the loss, which never train
Step = Callable[[TrainState, dict[str, Array], Judges], tuple[TrainState, Metrics]]


def make_step(config: Any, plan: Blueprint) -> Step:
    """The step of an autoencoder run.

    The batch holds 'image' [B, H, W, 3] uint8; judges hold 'lpips' where the loss has that term.
    Metrics are float32 scalars; 'finite' is 0 for a step that was skipped because its loss or
    gradient was not finite: nothing but the counters changes then.
    """
    loss_and_aux = _autoencoder_loss(config, plan)
    gradient = jax.value_and_grad(loss_and_aux, has_aux=True)
    learning_rate = optim.schedule(config)

    def step(
        state: TrainState, batch: dict[str, Array], judges: Judges
    ) -> tuple[TrainState, Metrics]:
        images = to_float(batch["image"])
        (metrics, stats), grads = _accumulated(
            gradient, state.params, state.stats, images, judges, config.accumulate
        )
        grad_norm = optax.global_norm({k: g for k, g in grads.items() if k in plan.trained})
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        params = {
            name: value + updates[name] if name in plan.trained else value
            for name, value in state.params.items()
        }
        ema = moving_average(state, {**params, **stats}, config)
        # One decision for everything: a half-applied step would be worse than none.
        changed = (params, stats, ema, opt_state)
        unchanged = (state.params, state.stats, state.ema, state.opt_state)
        params, stats, ema, opt_state = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(finite, new, old), changed, unchanged
        )
        bad = (~finite).astype(jnp.int32)
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.step - state.skipped),
            "finite": finite,
            "skipped": state.skipped + bad,
            "skipped_in_row": (state.skipped_in_row + 1) * bad,
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            stats=stats,
            ema=ema,
            opt_state=opt_state,
            skipped=metrics["skipped"],
            skipped_in_row=metrics["skipped_in_row"],
        )
        return new_state, {k: v.astype(jnp.float32) for k, v in metrics.items()}

    return step


def to_float(images: Array) -> Array:
    """uint8 levels -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def _autoencoder_loss(config: Any, plan: Blueprint):
    """(params, stats, images, judges) -> (loss, (metrics, new statistics))."""

    def loss_fn(params, stats, images, judges):
        # Frozen parameters are constants of the loss: XLA drops their backward pass.
        params = {
            name: value if name in plan.trained else jax.lax.stop_gradient(value)
            for name, value in params.items()
        }
        model = layers.merge(plan.graph, {**params, **stats})
        layers.train_norms(model, plan.trained.__contains__)
        output = model(images)
        l1 = losses.l1(output, images)
        loss = config.loss.l1_weight * l1
        metrics = {"l1": l1, "psnr": losses.psnr(output, images)}
        if config.loss.lpips_weight:
            metrics["lpips"] = losses.perceptual(judges["lpips"], output, images)
            loss += config.loss.lpips_weight * metrics["lpips"]
        metrics["loss"] = loss
        new_stats = layers.split(model)[2]
        # The arrays of frozen statistics themselves, so that they are seen to be unchanged.
        stats = {k: new_stats[k] if k in plan.trained else v for k, v in stats.items()}
        return loss, (metrics, stats)

    return loss_fn


def _accumulated(gradient, params, stats, images, judges, count: int):
    """Metrics and gradients averaged over `count` microbatches; statistics pass through all."""
    if count == 1:
        (_, (metrics, stats)), grads = gradient(params, stats, images, judges)
        return (metrics, stats), grads

    # Neighbours go to different microbatches, so that each device keeps the images it has.
    split = images.reshape(-1, count, *images.shape[1:]).swapaxes(0, 1)

    def one(carry, microbatch):
        stats, total = carry
        (_, (metrics, stats)), grads = gradient(params, stats, microbatch, judges)
        return (stats, jax.tree.map(jnp.add, total, (metrics, grads))), None

    (_, (metrics, _)), grads = jax.eval_shape(gradient, params, stats, split[0], judges)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (metrics, grads))
    (stats, total), _ = jax.lax.scan(one, (stats, zeros), split)
    metrics, grads = jax.tree.map(lambda value: value / count, total)
    return (metrics, stats), grads


def moving_average(state: TrainState, new: layers.Weights, config: Any) -> layers.Weights:
    """The averages after this step: e + (1 - d)(w - e), so that equal stays bit-equal."""
    done = (state.step - state.skipped + 1).astype(jnp.float32)
    decay = config.ema_decay * (1 - jnp.exp(-done / config.ema_warmup))
    return {name: old + (1 - decay) * (new[name] - old) for name, old in state.ema.items()}
