# SPDX-License-Identifier: Apache-2.0
"""One training step: a pure function (state, batch, lpips) -> (state, metrics), jitted once."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Float32

from dcae_jax import models
from dcae_jax.config import Config
from dcae_jax.data import transforms
from dcae_jax.diffusion import meanflow, objectives
from dcae_jax.models import layers
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.weights import Array, Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.training import latent_draws, losses, optim
from dcae_jax.training.latent_draws import LatentDraws
from dcae_jax.training.state import Discriminator, TeacherSpec, TrainSpec, TrainState

Metrics = dict[str, Array]  # scalars
Batch = dict[str, Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]  # (state, batch, *weights of `Frozen`)


class Frozen(NamedTuple):
    """Weights of networks that the loss uses and no step changes."""

    lpips: Weights = {}  # of the perceptual loss, {} for a loss without it
    teacher: Weights = {}  # of a student's teacher: its decoder; {} without one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Results of one batch; gradients and metrics are means over its examples."""

    params: Weights  # of the model's loss
    discriminator: Weights  # of the discriminator's own loss; {} without a discriminator
    metrics: Metrics
    stats: Weights  # the model's running statistics after these passes


def make_step(config: Config, spec: TrainSpec) -> TrainStep:
    """The training step of an autoencoder, in any phase, or of a diffusion model.

    An autoencoder's batch holds 'image' [B, H, W, 3] uint8. A diffusion model's batch holds
    'latent' [B, h, w, c], unscaled, and 'label' [B] int32.
    Metrics are float32 scalars; 'finite' is 0 for a step that was skipped because its loss or
    gradient was not finite. Such a step changes only the counters.
    """
    learning_rate = optim.schedule(config.optimizer, config.steps)

    def train_step(
        state: TrainState, batch: Batch, *networks: Weights
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        draws = draw_latents(config, batch, key)
        frozen = Frozen(*networks)
        grads = accumulated_gradients(config, spec, state, batch, key, draws, frozen)
        trained = {name: grad for name, grad in grads.params.items() if name in spec.trained}
        metrics = grads.metrics | draws.metrics | {"grad_norm": optax.global_norm(trained)}

        updates, opt_state = spec.optimizer.update(grads.params, state.opt_state, state.params)
        params = apply_updates(state.params, updates, spec.trained)
        new = dataclasses.replace(
            state,
            params=params,
            stats=grads.stats,
            ema=moving_average(
                state, {**params, **grads.stats}, config.ema_decay, config.ema_warmup
            ),
            opt_state=opt_state,
            discriminator=update_discriminator(spec, state.discriminator, grads.discriminator),
        )

        # One decision for everything: a half-applied step is worse than none.
        finite = is_finite(metrics, grads, new)
        new = jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, state)
        bad = (~finite).astype(jnp.int32)
        new = dataclasses.replace(
            new,
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_row=(state.skipped_in_row + 1) * bad,
        )
        metrics |= {
            "learning_rate": learning_rate(state.step - state.skipped),  # of applied steps
            "finite": finite,
            "skipped": new.skipped,
            "skipped_in_row": new.skipped_in_row,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def jit_step(config: Config, spec: TrainSpec, abstract: TrainState) -> jax.stages.Wrapped:
    """Jitted train step. Donates the state; the new one keeps its sharding.

    abstract: the state from `state.abstract_state`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    mesh = shardings.step.mesh
    step = make_step(config, spec)

    def run(state: TrainState, batch: Batch, *networks: Weights) -> tuple[TrainState, Metrics]:
        with sharding.on_mesh(mesh):
            return step(state, batch, *networks)

    return jax.jit(run, donate_argnums=0, out_shardings=(shardings, mesh_lib.replicated(mesh)))


# --- gradients ------------------------------------------------------------------------------------


def draw_latents(config: Config, batch: Batch, key: Array) -> LatentDraws:
    """What the step with this key draws for its latents."""
    if config.objective:
        augment = config.augment
        last = config.model.latent_channels if augment.always_full else None
        counts = latent_draws.channel_counts(augment.channels, augment.count, last, key)
        return LatentDraws(counts)
    arch = models.find(config.model).architecture(config.model)
    structured = config.structured
    last = arch.latent_channels if structured.always_full else None
    counts = latent_draws.channel_counts(structured.channels, structured.count, last, key)
    scales = latent_draws.scales(config.loss, batch["image"].shape[1], arch.compression)
    scale, turn = latent_draws.transform(config.loss.equivariance, len(scales), key)
    return LatentDraws(counts, scale, turn)


def accumulated_gradients(
    config: Config,
    spec: TrainSpec,
    state: TrainState,
    batch: Batch,
    key: Array,
    draws: LatentDraws,
    frozen: Frozen,
) -> Gradients:
    """Gradients over the batch, in config.accumulate microbatches."""

    def once(stats: Weights, batch: Batch, key: Array) -> Gradients:
        now = dataclasses.replace(state, stats=stats)
        if config.objective:
            return denoising_gradients(config, spec, now, batch, key, draws)
        if draws.scale is None:
            return reconstruction_gradients(config, spec, now, batch, frozen, draws)
        arch = models.find(config.model).architecture(config.model)
        scales = latent_draws.scales(config.loss, batch["image"].shape[1], arch.compression)
        # One branch per scale: their shapes differ, so each has a program of its own inside.
        return jax.lax.switch(
            draws.scale,
            [
                functools.partial(
                    reconstruction_gradients, config, spec, now, batch, frozen, draws, scale
                )
                for scale in (None, *scales)
            ],
        )

    count = config.accumulate
    if count == 1:
        return once(state.stats, batch, key)

    # Neighbours go to different microbatches, so each device keeps its own examples.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    inputs = (split, jax.random.split(key, count))

    def add(total: Gradients, inputs: tuple[Batch, Array]) -> tuple[Gradients, None]:
        grads = once(total.stats, *inputs)
        summed = jax.tree.map(jnp.add, total, grads)
        return dataclasses.replace(summed, stats=grads.stats), None  # the latest, not a sum

    shapes = jax.eval_shape(once, state.stats, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = dataclasses.replace(zeros, stats=state.stats)
    total, _ = jax.lax.scan(add, start, inputs, unroll=config.unroll)
    mean = jax.tree.map(lambda value: value / count, total)
    return dataclasses.replace(mean, stats=total.stats)


def denoising_gradients(
    config: Config,
    spec: TrainSpec,
    state: TrainState,
    batch: Batch,
    key: Array,
    draws: LatentDraws,
) -> Gradients:
    """One forward and backward pass of a diffusion model.

    With draws.channels [n], of a batch of n copies: each has its own noise, time and dropped label.
    """
    x0, channels = latent_draws.repeated(batch["latent"], draws.channels)  # [Bn, h, w, c]
    x0 = objectives.scaled(x0, config.model.scaling_factor)
    labels, _ = latent_draws.repeated(batch["label"], draws.channels)
    label_key, key = jax.random.split(key)
    labels = drop_labels(labels, label_key, config.label_dropout, config.model.num_classes)

    def loss_fn(params: Weights) -> tuple[Array, Metrics]:
        model = weights_lib.merge(spec.graphdef, stop_frozen_gradients(spec, params))
        model = sharding.all_gather_weights(model)
        if config.objective == "meanflow":
            none = config.model.num_classes
            copies = len(x0) // len(batch["latent"])
            return meanflow.loss(
                config.meanflow, model, x0, labels, key, none=none, channels=channels, copies=copies
            )
        return objectives.loss(config.objective, model, x0, labels, key, channels)

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return Gradients(grads, {}, metrics | {"loss": loss}, state.stats)


def reconstruction_gradients(
    config: Config,
    spec: TrainSpec,
    state: TrainState,
    batch: Batch,
    frozen: Frozen,
    draws: LatentDraws,
    scale: float | None = None,
) -> Gradients:
    """One forward and backward pass of an autoencoder, and of its discriminator, if any.

    scale: of the transform between encoder and decoder; None: no transform.
    A teacher (config.distill) decodes the same latents; its images are a second target.

    The losses are first differentiated with respect to the model's output. The backward pass
    through the model is linear in those gradients, so the GAN loss is weighted before that pass,
    which runs only once.
    """
    images = transforms.to_float(batch["image"])  # [B, H, W, 3]

    def forward(params: Weights) -> tuple[Array, tuple[Array, Array, Weights]]:
        weights = {**stop_frozen_gradients(spec, params), **state.stats}
        model = sharding.all_gather_weights(weights_lib.merge(spec.graphdef, weights))
        model = layers.training_norms(model, spec.trained.__contains__)
        z, targets = latent_draws.latents(model.encode, images, draws, scale)
        return model.decode(z), (z, targets, weights_lib.split(model)[2])

    def reconstruction_loss(output: Array) -> tuple[Array, Metrics]:
        terms = losses.reconstruction_terms(config.loss)
        values = {name: term(output, images, frozen.lpips) for name, (term, _) in terms.items()}
        if taught is not None:
            more = losses.distillation_terms(config.distill)
            values |= {name: term(output, taught, frozen.lpips) for name, (term, _) in more.items()}
            values["teacher_psnr"] = losses.psnr(taught, images)
            terms |= more
        weighted = (weight * values[name] for name, (_, weight) in terms.items())
        loss = sum(weighted, jnp.zeros(()))
        return loss, values | {"psnr": losses.psnr(output, images)}

    output, backward, (z, images, new_stats) = jax.vjp(forward, state.params, has_aux=True)
    taught = None
    if spec.teacher:
        taught = teacher_images(spec.teacher, {**state.params, **state.stats}, frozen.teacher, z)
    (loss, metrics), pull = jax.value_and_grad(reconstruction_loss, has_aux=True)(output)

    discriminator_grads: Weights = {}
    if spec.discriminator and state.discriminator:
        graphdef, params = spec.discriminator.graphdef, state.discriminator.params

        def logits(params: Weights, images: Array) -> Array:  # [B, H, W, 3] -> [B, h, w]
            return sharding.all_gather_weights(weights_lib.merge(graphdef, params))(images)

        def gan_loss_fn(output: Array) -> Array:
            return losses.generator_hinge(logits(params, output))

        gan_loss, gan_pull = jax.value_and_grad(gan_loss_fn)(output)
        # Only the last layer's part of these two backward passes is used; XLA drops the rest.
        norm, gan_norm = (
            optax.global_norm(backward(p)[0][spec.last_layer]) for p in (pull, gan_pull)
        )
        weight = losses.adaptive_weight(norm, gan_norm, config.loss.gan_adaptive_max)
        weight *= config.loss.gan_weight * (state.step >= config.loss.gan_warmup_steps)
        pull += weight * gan_pull
        loss += weight * gan_loss
        metrics |= {
            "gan_g_loss": gan_loss,
            "gan_weight": weight,
            "reconstruction_grad_norm": norm,
            "gan_grad_norm": gan_norm,
        }
        discriminator_grads, discriminator_metrics = jax.grad(discriminator_loss, has_aux=True)(
            params, logits, images, jax.lax.stop_gradient(output)
        )
        metrics |= discriminator_metrics

    (grads,) = backward(pull)
    # Frozen statistics stay the same arrays, so `train_step` sees them as unchanged.
    stats = {k: new_stats[k] if k in spec.trained else v for k, v in state.stats.items()}
    return Gradients(grads, discriminator_grads, metrics | {"loss": loss}, stats)


def teacher_images(
    spec: TeacherSpec, student: Weights, decoder: Weights, z: Float[Array, "B h w c"]
) -> Float32[Array, "B H W 3"]:
    """What the teacher makes of the student's latents z, which are its own.

    decoder: the teacher's weights, without those of the encoder, which are the student's.
    """
    encoder = {name: student[name] for name in spec.encoder}
    model = weights_lib.merge(spec.graphdef, {**encoder, **decoder})
    teacher: Any = sharding.all_gather_weights(model)
    return teacher.decode(z)


def discriminator_loss(
    params: Weights, logits: Callable[[Weights, Array], Array], real: Array, fake: Array
) -> tuple[Array, Metrics]:
    """(hinge loss, metrics) of the discriminator with `params` on two batches [B, H, W, 3]."""
    # One batch of pairs [B, 2, ...], so each device keeps its own images.
    pairs = jnp.stack([real, fake], axis=1)
    both = logits(params, pairs.reshape(-1, *real.shape[1:]))  # [2B, h, w]
    on_real, on_fake = jnp.moveaxis(both.reshape(*pairs.shape[:2], *both.shape[1:]), 1, 0)
    loss = losses.hinge(on_real, on_fake)
    return loss, {
        "gan_d_loss": loss,
        "logits_real": jnp.mean(on_real),
        "logits_fake": jnp.mean(on_fake),
        "gan_accuracy": 0.5 * (jnp.mean(on_real > 0) + jnp.mean(on_fake < 0)),
    }


# --- parts of a step ------------------------------------------------------------------------------


def stop_frozen_gradients(spec: TrainSpec, params: Weights) -> Weights:
    """The parameters, with frozen ones as constants, so XLA drops their backward pass."""
    return {
        name: value if name in spec.trained else jax.lax.stop_gradient(value)
        for name, value in params.items()
    }


def drop_labels(labels: Array, key: Array, share: float, none: int) -> Array:
    """Labels [B], each replaced by `none` with probability `share` (Ho & Salimans 2022)."""
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return jnp.where(draws(jnp.arange(labels.shape[0])) < share, none, labels)


def apply_updates(params: Weights, updates: Any, trained: Collection[str]) -> Weights:
    """The parameters after the optimizer's updates; frozen ones stay the same arrays."""
    return {
        name: value + updates[name] if name in trained else value for name, value in params.items()
    }


def update_discriminator(
    spec: TrainSpec, old: Discriminator | None, grads: Weights
) -> Discriminator | None:
    """The discriminator after its own optimizer's step."""
    if spec.discriminator is None or old is None:
        return None
    updates, opt_state = spec.discriminator.optimizer.update(grads, old.opt_state, old.params)
    return Discriminator(apply_updates(old.params, updates, old.params), opt_state)


def moving_average(state: TrainState, new: Weights, limit: float, warmup: int) -> Weights:
    """The averages after this step: e + (1 - d)(w - e), which keeps equal values bit-equal.

    The decay d rises to `limit` over about `warmup` steps.
    """
    done = (state.step - state.skipped + 1).astype(jnp.float32)
    decay = limit * (1 - jnp.exp(-done / warmup))
    return {name: old + (1 - decay) * (new[name] - old) for name, old in state.ema.items()}


def is_finite(metrics: Metrics, grads: Gradients, new: TrainState) -> Array:
    """Whether losses, gradients and the new weights are all finite, a boolean scalar.

    Finite gradients can still overflow the weights; such a checkpoint is useless.
    """
    values = [metrics["loss"], metrics["grad_norm"], optax.global_norm(new.params)]
    if new.discriminator:
        values += [metrics["gan_d_loss"], optax.global_norm(grads.discriminator)]
        values += [optax.global_norm(new.discriminator.params)]
    return jnp.isfinite(jnp.stack(values)).all()
