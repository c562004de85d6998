# SPDX-License-Identifier: Apache-2.0
"""The step of goldens/make_gan.py here: its configuration, weights by our paths, and its result."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from goldens import judges, make_gan
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import config as config_lib
from dcae_jax.models import dcae_torch, lpips_torch
from dcae_jax.models.weights import Weights
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib
from support import CONFIGS

WARMUP = 3  # steps of the discriminator alone; the golden's step is the first after them
VARIANT = dcae_torch.variant_of(make_gan.CONFIG, "diffusers")


def golden() -> dict[str, dict[str, np.ndarray]]:
    """{part: {PyTorch's name: array}} of the stored step."""
    with np.load(make_gan.PATH) as file:
        return parts({name: file[name] for name in file.files})


def parts(flat: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{'part/name': array} -> {part: {name: array}}."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for key, value in flat.items():
        part, name = key.split("/")
        out.setdefault(part, {})[name] = value
    return out


def config() -> ConfigDict:
    """Phase 3 of `tiny` with the sizes and settings of the golden step."""
    c = config_lib.load_file(os.path.join(CONFIGS, "phase3.py"), "tiny")
    s = make_gan.STEP
    c.model.widths, c.model.latent_channels = (8, 8, 16, 32, 32), 8
    c.batch_size, c.resolution, c.resolutions = s["batch_size"], s["resolution"], ()
    for key in ("l1_weight", "lpips_weight", "gan_weight", "gan_adaptive_max", "gan_learning_rate"):
        c.loss[key] = s[key]
    c.loss.gan_channels, c.loss.gan_layers = make_gan.DISCRIMINATOR
    c.loss.gan_warmup_steps, c.optimizer.warmup_steps = WARMUP, 0
    for key in ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm"):
        c.optimizer[key] = s[key]
    return c


def run(seed: int, mesh: Mesh) -> dict[str, dict[str, np.ndarray]]:
    """One step from the golden's weights, as `golden` has it but by our paths.

    The gradients are read off Adam's first moments, (1 - b1) times the gradient after one step.
    Also 'frozen': {path: whether it is bit-equal to what it was}, and 'warming': the metrics of a
    step before it, in which the GAN loss has no weight yet.
    """
    c = config()
    spec = state_lib.train_spec(c, mesh)
    start = state_lib.init_state(c, mesh, spec, autoencoder_weights(seed))
    channels, depth = make_gan.DISCRIMINATOR
    other = discriminator_weights(seed, channels, depth)
    assert {k: v.shape for k, v in other.items()} == {
        k: v.shape for k, v in start.discriminator.params.items()
    }
    params = {
        name: mesh_lib.host_to_global(v, mesh_lib.replicated(mesh)) for name, v in other.items()
    }
    start.discriminator.params.update(params)
    batch = {
        "image": make_gan.images(seed),
        "label": np.zeros(c.batch_size, np.int32),
    }
    step = jax.jit(step_lib.make_step(c, spec))
    inputs = mesh_lib.put_batch(batch, mesh), lpips_weights()
    _, warming = step(dataclasses.replace(start, step=start.step + WARMUP - 1), *inputs)
    after, metrics = step(dataclasses.replace(start, step=start.step + WARMUP), *inputs)
    old, new = ({**s.params, **s.stats} for s in (start, after))
    return {
        "metrics": {name: np.asarray(value) for name, value in metrics.items()},
        "warming": {name: np.asarray(value) for name, value in warming.items()},
        "gradients": _gradients(after.opt_state, c.optimizer.b1),
        "trained": {name: np.asarray(new[name]) for name in spec.trained},
        "frozen": {n: np.array_equal(old[n], new[n]) for n in new if n not in spec.trained},
        "discriminator_gradients": _gradients(after.discriminator.opt_state, c.optimizer.b1),
        "discriminator": {k: np.asarray(v) for k, v in after.discriminator.params.items()},
    }


def _gradients(opt_state: optax.OptState, b1: float) -> dict[str, np.ndarray]:
    mu = optax.tree_utils.tree_get(opt_state, "mu")
    arrays = {k: v for k, v in mu.items() if not isinstance(v, optax.MaskedNode)}
    return {name: np.asarray(value) / (1 - b1) for name, value in arrays.items()}


def autoencoder_weights(seed: int) -> Weights:
    """The golden's autoencoder by our paths."""
    tensors = make_gan.weights(seed, dcae_torch.shapes_in(VARIANT, "diffusers"))
    return dcae_torch.from_torch(tensors, VARIANT, "diffusers")


def autoencoder_parts(tensors: dict[str, np.ndarray]) -> Weights:
    """Some of an autoencoder's tensors by our paths."""
    shapes = dcae_torch.shapes_in(VARIANT, "diffusers")
    marked = {n: np.full(s, np.nan, np.float32) for n, s in shapes.items()} | tensors
    ours = dcae_torch.from_torch(marked, VARIANT, "diffusers")
    return {name: value for name, value in ours.items() if not np.isnan(value).any()}


def discriminator_weights(seed: int, channels: int, depth: int) -> Weights:
    """The golden's discriminator by our paths."""
    widths = [channels * min(2**i, 8) for i in range(depth + 1)]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (name, inputs, outputs) in enumerate(
        zip(_convs(depth), [3, *widths], [*widths, 1], strict=True)
    ):
        shapes[f"{name}.weight"] = (outputs, inputs, 4, 4)
        if index in (0, depth + 1):
            shapes[f"{name}.bias"] = (outputs,)
        else:
            norm = int(name) + 1
            shapes |= {f"{norm}.weight": (outputs,), f"{norm}.bias": (outputs,)}
    return discriminator_parts(make_gan.weights(seed, shapes, make_gan.GAIN), depth)


def discriminator_parts(tensors: dict[str, np.ndarray], depth: int) -> Weights:
    """A discriminator's tensors by our paths: 'convs.0.kernel', 'norms.0.scale', ..."""
    layers = {name: f"convs.{i}" for i, name in enumerate(_convs(depth))}
    layers |= {str(int(name) + 1): f"norms.{i}" for i, name in enumerate(_convs(depth)[1:-1])}
    layers[_convs(depth)[-1]] = "project_out"
    out = {}
    for name, value in tensors.items():
        number, kind = name.split(".")
        if kind == "weight":
            kind = "kernel" if value.ndim == 4 else "scale"
        out[f"{layers[number]}.{kind}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return out


def _convs(depth: int) -> list[str]:
    """The numbers of the convolutions in the discriminator's nn.Sequential."""
    return ["0", *(str(2 + 3 * i) for i in range(depth + 1))]


def lpips_weights() -> Weights:
    weights = lpips_torch.from_torch(judges.lpips_state("vgg", scale=1.0))[1]
    for i, linear in enumerate(make_gan.lpips_linear()):
        assert weights[f"lin{i}"].shape == linear.shape
        weights[f"lin{i}"] = linear
    return {name: jnp.asarray(value) for name, value in weights.items()}
