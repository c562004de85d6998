# SPDX-License-Identifier: Apache-2.0
"""One training step: a pure function (state, batch, judges) -> (state, metrics), jitted once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcae_jax import diffusion, losses, optim, sharding
from dcae_jax.models import layers
from dcae_jax.models.layers import Weights
from dcae_jax.state import Blueprint, Discriminator, TrainState

Array = jax.Array
Metrics = dict[str, Array]
Batch = dict[str, Array]
Judges = dict[str, Weights]  # weights of the networks in the loss, which never train
Step = Callable[[TrainState, Batch, Judges], tuple[TrainState, Metrics]]

LECAM_DECAY = 0.99  # of the running means of the logits (Tseng et al. 2021, section 4)


def make_step(config: Any, plan: Blueprint) -> Step:
    """The step of a run: of an autoencoder in any of its phases, or of a diffusion model.

    An autoencoder's batch holds 'image' [B, H, W, 3] uint8; judges hold 'lpips' where the loss has
    that term. A diffusion model's holds 'latent' [B, h, w, c], unscaled, and 'label' [B] int32.
    Metrics are float32 scalars; 'finite' is 0 for a step that was skipped because its loss or
    gradient was not finite: nothing but the counters changes then.
    """
    learning_rate = optim.schedule(config)

    def step(state: TrainState, batch: Batch, judges: Judges) -> tuple[TrainState, Metrics]:
        out = _gradients(config, plan, state, batch, judges)
        trained = {name: g for name, g in out.grads.items() if name in plan.trained}
        metrics = out.metrics | {"grad_norm": optax.global_norm(trained)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if plan.discriminator:
            finite &= jnp.isfinite(metrics["gan_d_loss"]) & jnp.isfinite(
                optax.global_norm(out.discriminator_grads)
            )

        updates, opt_state = plan.optimizer.update(out.grads, state.opt_state, state.params)
        params = {
            name: value + updates[name] if name in plan.trained else value
            for name, value in state.params.items()
        }
        new = dataclasses.replace(
            state,
            params=params,
            stats=out.stats,
            ema=moving_average(state, {**params, **out.stats}, config),
            opt_state=opt_state,
            discriminator=_update_discriminator(plan, state.discriminator, out),
        )
        # Finite gradients can still carry weights beyond float32; such a checkpoint is no good.
        finite &= jnp.isfinite(optax.global_norm(new.params))
        if plan.discriminator:
            finite &= jnp.isfinite(optax.global_norm(new.discriminator.params))
        # One decision for everything: a half-applied step would be worse than none.
        new = jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, state)
        bad = (~finite).astype(jnp.int32)
        metrics |= {
            "learning_rate": learning_rate(state.step - state.skipped),
            "finite": finite,
            "skipped": state.skipped + bad,
            "skipped_in_row": (state.skipped_in_row + 1) * bad,
        }
        new = dataclasses.replace(
            new,
            step=state.step + 1,
            skipped=metrics["skipped"],
            skipped_in_row=metrics["skipped_in_row"],
        )
        return new, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return step


def jit_step(config: Any, plan: Blueprint, abstract: TrainState) -> Any:
    """Jitted train step. Donates the state; the new one keeps its sharding.

    abstract: the state as `state.abstract_state` gives it.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    mesh = shardings.step.mesh
    step = make_step(config, plan)

    def run(state: TrainState, batch: Batch, judges: Judges) -> tuple[TrainState, Metrics]:
        with sharding.on_mesh(mesh):
            return step(state, batch, judges)

    return jax.jit(run, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def to_float(images: Array) -> Array:
    """uint8 levels -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def moving_average(state: TrainState, new: Weights, config: Any) -> Weights:
    """The averages after this step: e + (1 - d)(w - e), so that equal stays bit-equal."""
    done = (state.step - state.skipped + 1).astype(jnp.float32)
    decay = config.ema_decay * (1 - jnp.exp(-done / config.ema_warmup))
    return {name: old + (1 - decay) * (new[name] - old) for name, old in state.ema.items()}


@dataclasses.dataclass(frozen=True)
class _Output:
    """What one pass over a (micro)batch gives; gradients and metrics are means."""

    grads: Weights
    discriminator_grads: Weights  # empty without a discriminator
    metrics: Metrics
    stats: Weights  # the model's, after this pass
    discriminator_stats: Weights


jax.tree_util.register_dataclass(
    _Output,
    data_fields=[field.name for field in dataclasses.fields(_Output)],
    meta_fields=[],
)


def _gradients(
    config: Any, plan: Blueprint, state: TrainState, batch: Batch, judges: Judges
) -> _Output:
    """Gradients over the batch, in config.accumulate microbatches."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def once(stats, discriminator_stats, batch, key):
        now = dataclasses.replace(state, stats=stats)
        if config.objective:
            return _denoising(config, plan, now, batch, key)
        if plan.discriminator:
            d = dataclasses.replace(state.discriminator, stats=discriminator_stats)
            now = dataclasses.replace(now, discriminator=d)
        return _reconstruction(config, plan, now, to_float(batch["image"]), judges, key)

    stats = state.stats
    d_stats = state.discriminator.stats if plan.discriminator else {}
    count = config.accumulate
    if count == 1:
        return once(stats, d_stats, batch, key)

    # Neighbours go to different microbatches, so that each device keeps the examples it has.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(carry, inputs):
        stats, d_stats, total = carry
        out = once(stats, d_stats, *inputs)
        means = (out.grads, out.discriminator_grads, out.metrics)
        return (out.stats, out.discriminator_stats, jax.tree.map(jnp.add, total, means)), None

    shapes = jax.eval_shape(once, stats, d_stats, jax.tree.map(lambda x: x[0], split), key)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        (shapes.grads, shapes.discriminator_grads, shapes.metrics),
    )
    inputs = (split, jax.random.split(key, count))
    start = (stats, d_stats, zeros)
    (stats, d_stats, total), _ = jax.lax.scan(body, start, inputs, unroll=config.unroll)
    return _Output(*jax.tree.map(lambda value: value / count, total), stats, d_stats)


def _denoising(config: Any, plan: Blueprint, state: TrainState, batch: Batch, key: Array):
    """One forward and backward pass of a diffusion model."""
    x0 = diffusion.scaled(batch["latent"], config.model.scaling_factor)
    label_key, key = jax.random.split(key)
    labels = drop_labels(batch["label"], label_key, config.label_dropout, config.model.num_classes)

    def loss_fn(params):
        model = layers.merge(plan.graph, _constant_where_frozen(plan, params))
        model = sharding.all_gather_weights(model)
        return diffusion.loss(config.objective, lambda x, t: model(x, t, labels), x0, key)

    (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return _Output(grads, {}, parts | {"loss": loss}, state.stats, {})


def drop_labels(labels: Array, key: Array, share: float, none: int) -> Array:
    """Labels [B] of which a `share` is replaced by `none`, each drawn by itself (Ho & Salimans)."""
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return jnp.where(draws(jnp.arange(labels.shape[0])) < share, none, labels)


def _constant_where_frozen(plan: Blueprint, params: Weights) -> Weights:
    """The parameters; frozen ones as constants, so that XLA drops their backward pass."""
    return {
        name: value if name in plan.trained else jax.lax.stop_gradient(value)
        for name, value in params.items()
    }


def _reconstruction(
    config: Any, plan: Blueprint, state: TrainState, images: Array, judges: Judges, key: Array
) -> _Output:
    """One forward and backward pass of an autoencoder, and of a discriminator where there is one.

    Losses are differentiated at the model's output first. The backward pass through the model is
    linear in that, so the GAN's share can be weighed against the rest before it is run.
    """

    def forward(params):
        weights = {**_constant_where_frozen(plan, params), **state.stats}
        model = sharding.all_gather_weights(layers.merge(plan.graph, weights))
        model = layers.training_norms(model, plan.trained.__contains__)
        output = model(images)
        return output, layers.split(model)[2]

    output, backward, new_stats = jax.vjp(forward, state.params, has_aux=True)

    def reconstruction(output):
        parts = {"l1": losses.l1(output, images), "psnr": losses.psnr(output, images)}
        loss = config.loss.l1_weight * parts["l1"]
        if config.loss.lpips_weight:
            parts["lpips"] = losses.perceptual(judges["lpips"], output, images)
            loss += config.loss.lpips_weight * parts["lpips"]
        return loss, parts

    (loss, metrics), pull = jax.value_and_grad(reconstruction, has_aux=True)(output)
    d_grads, d_stats = {}, {}
    if plan.discriminator:
        gan = _Gan(config, plan, state.discriminator, key)
        g_loss, gan_pull = jax.value_and_grad(gan.generator_loss)(output)
        # Only the last layer's part of these two passes is used, so XLA drops the rest.
        norms = [optax.global_norm(backward(p)[0][plan.last_layer]) for p in (pull, gan_pull)]
        weight = losses.adaptive_weight(*norms, config.loss.gan_adaptive_max)
        weight *= config.loss.gan_weight * (state.step >= config.loss.gan_warmup_steps)
        pull = jax.tree.map(lambda a, b: a + weight * b, pull, gan_pull)
        loss += weight * g_loss
        d_grads, (d_metrics, d_stats) = gan.discriminator_gradients(
            images, jax.lax.stop_gradient(output)
        )
        metrics |= d_metrics | {
            "gan_g_loss": g_loss,
            "gan_weight": weight,
            "reconstruction_grad_norm": norms[0],
            "gan_grad_norm": norms[1],
        }
    (grads,) = backward(pull)
    # The arrays of frozen statistics themselves, so that they are seen to be unchanged.
    stats = {k: new_stats[k] if k in plan.trained else v for k, v in state.stats.items()}
    return _Output(grads, d_grads, metrics | {"loss": loss}, stats, d_stats)


@dataclasses.dataclass(frozen=True)
class _Gan:
    """The discriminator in one pass: what it says of pictures, and what it learns from them."""

    config: Any
    plan: Blueprint
    state: Discriminator
    key: Array

    def logits(self, params: Weights, pictures: Array) -> tuple[Array, Weights]:
        """(logits [B, h, w], statistics after this pass)."""
        weights = {**params, **self.state.stats}
        model = layers.merge(self.plan.discriminator.graph, weights)
        model = sharding.all_gather_weights(model)
        if self.config.loss.gan_diff_augment:
            pictures = losses.diff_augment(self.key, pictures)
        return model(pictures), layers.split(model)[2]

    def generator_loss(self, output: Array) -> Array:
        return -jnp.mean(self.logits(self.state.params, output)[0])

    def discriminator_gradients(self, real: Array, fake: Array):
        """(gradients, (metrics, statistics)) of the hinge loss and its regularisers."""
        loss = self.config.loss

        def loss_fn(params):
            # One batch of both: BatchNorm must not tell them apart by its statistics.
            # In pairs, so that each device keeps the images it has.
            pairs = jnp.stack([real, fake], axis=1)
            both, stats = self.logits(params, pairs.reshape(-1, *real.shape[1:]))
            on_real, on_fake = jnp.moveaxis(both.reshape(*pairs.shape[:2], *both.shape[1:]), 1, 0)
            total = losses.hinge(on_real, on_fake)
            metrics = {
                "gan_d_loss": total,
                "logits_real": jnp.mean(on_real),
                "logits_fake": jnp.mean(on_fake),
                "gan_accuracy": 0.5 * (jnp.mean(on_real > 0) + jnp.mean(on_fake < 0)),
            }
            if loss.gan_lecam:
                means = self.state.logit_means
                total += loss.gan_lecam * losses.lecam(on_real, on_fake, means[0], means[1])
            if loss.gan_r1:
                slope = jax.grad(lambda x: jnp.sum(self.logits(params, x)[0].mean((1, 2))))(real)
                total += 0.5 * loss.gan_r1 * jnp.mean(jnp.sum(jnp.square(slope), (1, 2, 3)))
            return total, (metrics, stats)

        return jax.grad(loss_fn, has_aux=True)(self.state.params)


def _update_discriminator(plan: Blueprint, old: Discriminator | None, out: _Output):
    """The discriminator after its own optimizer's step."""
    if not plan.discriminator:
        return old
    updates, opt_state = plan.discriminator.optimizer.update(
        out.discriminator_grads, old.opt_state, old.params
    )
    seen = jnp.stack([out.metrics["logits_real"], out.metrics["logits_fake"]])
    return Discriminator(
        params=optax.apply_updates(old.params, updates),
        stats=out.discriminator_stats,
        opt_state=opt_state,
        logit_means=LECAM_DECAY * old.logit_means + (1 - LECAM_DECAY) * seen,
    )
