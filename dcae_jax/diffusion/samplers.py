# SPDX-License-Identifier: Apache-2.0
"""Samplers, from noise to clean latents: DDPM, DPM-Solver++ (dpm_solver.py), ODE solvers for flows.

Each is one compiled loop whose body evaluates the model once (Heun twice), so it compiles about as
fast as a single evaluation. `steps` counts evaluations of the model, except for dopri5, which is
adaptive.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Key

from dcae_jax.diffusion import dpm_solver, objectives
from dcae_jax.diffusion.objectives import Array, Cond, Model
from dcae_jax.errors import UserError

# The first of each is its objective's default. The docstring of `sample` describes them.
SAMPLERS = {name: objective.samplers for name, objective in objectives.OBJECTIVES.items()}
SCHEDULES = {
    name: dpm_solver.chain_schedule(objective.betas, objective.first)
    for name, objective in objectives.OBJECTIVES.items()
    if objective.betas is not None
}
DPM_SOLVERS = {
    "dpm_fast": dpm_solver.dpm_fast,
    "dpmpp_2m": dpm_solver.dpmpp_2m,
    "dpmpp_3m": dpm_solver.dpmpp_3m,
    "ddim": dpm_solver.ddim,
}


def sample_keys(seed: int | Array, indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """The random key [B] of each sample, from `seed` and the sample's index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def initial_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float32[Array, "B ..."]:
    """Standard normal noise [B, *shape] float32 of the samples with `keys` [B] (`sample_keys`).

    A sample's noise is the same in every batch.
    """
    return _noise(keys, 0, shape, jnp.float32)


def _noise(keys: Array, use: int | Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Noise [B, *shape] of samples with `keys` [B]. use 0: initial; 1, 2, ...: DDPM's steps."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, use), shape, dtype))(keys)


def sample(
    model: Model,
    noise: Float[Array, "B h w c"],
    cond: Cond = None,
    *,
    objective: str,
    sampler: str = "",
    steps: int,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B h w c"]:
    """Clean, still scaled latents [B, h, w, c] from `noise` of that shape, in its dtype.

    model: (x [B, h, w, c], time [B], cond) -> prediction; 2 c channels for learned_sigma.
    cond: labels [B], or whatever else the model is conditioned on (`objectives.Cond`).
    sampler ('' is the objective's default):
      dpm_fast    DPM-Solver++, single steps of order 3 as UViT's authors run it (epsilon's default)
      dpmpp_2m    DPM-Solver++, multistep, order 2
      dpmpp_3m    DPM-Solver++, multistep, order 3
      ddim        order 1, deterministic (Song et al. 2021)
      ddpm        ancestral over a chain of `steps` of the 1000 steps (learned_sigma's default)
      dopri5      adaptive Dormand-Prince, atol 1e-6, rtol 1e-3, a step size per sample;
                  a sample that is not finished after 4096 steps is NaN (flow's default)
      euler, heun  with uniform steps
      jumps       along average velocities, with uniform steps (meanflow's default); the others of
                  meanflow integrate its instantaneous velocity
    steps: evaluations of the model. keys [B] (`sample_keys`): only ddpm needs them.
    Raises UserError if the objective has no such sampler, or the sampler cannot take `steps`.
    """
    sampler = check(objective, sampler, steps)
    if sampler == "dopri5":
        return dopri5(model, noise, cond)
    if sampler == "euler":
        return euler(model, noise, cond, steps)
    if sampler == "heun":
        return heun(model, noise, cond, steps // 2)
    if sampler == "jumps":
        return jumps(model, noise, cond, np.linspace(0, 1, steps + 1))
    if sampler == "ddpm":
        return ddpm(model, noise, cond, objectives.objective(objective), steps, keys)
    times = np.linspace(1, 1 / 1000, steps + 1)
    return DPM_SOLVERS[sampler](model, noise, cond, SCHEDULES[objective], times)


def check(objective: str, sampler: str, steps: int, guidance: float = 1.0) -> str:
    """The sampler's name; '' gives the objective's default. Raises UserError if they do not fit."""
    o = objectives.objective(objective)
    if o.folded and guidance != 1:
        raise UserError(
            f"guidance={guidance}: objective={objective!r} folds its guidance in while it trains "
            "(meanflow.guidance), and sampling adds none; leave guidance at 1"
        )
    sampler = sampler or o.samplers[0]
    if sampler not in o.samplers:
        names = ", ".join(o.samplers)
        raise UserError(f"sampler={sampler!r} does not fit objective={objective!r}; use {names}")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    if sampler == "heun" and steps % 2:
        raise UserError(f"steps={steps}: heun evaluates twice per step; use an even number")
    if sampler == "ddpm" and o.betas is not None and not 2 <= steps <= len(o.betas):
        raise UserError(f"steps={steps} must be between 2 and {len(o.betas)} for ddpm")
    return sampler


# --- ancestral ------------------------------------------------------------------------------------


def respaced(betas: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A subsampled chain: the indices [steps] of the steps it keeps, and its betas [steps].

    The steps are evenly spaced from first to last, with unchanged noise levels (Nichol & Dhariwal
    2021, section 4).
    """
    indices = np.round(np.linspace(0, len(betas) - 1, steps)).astype(int)
    log_alpha = objectives.log_alphas(betas)[indices]
    return indices, -np.expm1(2 * np.diff(log_alpha, prepend=0.0))


def ddpm(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    objective: objectives.Objective,
    steps: int,
    keys: Key[Array, " B"] | None,
) -> Float[Array, "B h w c"]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over a respaced chain, x0 not clipped.

    A model without learned variance uses the posterior's.
    """
    if keys is None:
        raise ValueError("ddpm draws noise at each step: pass keys=sample_keys(seed, indices)")
    assert objective.betas is not None, "flows have no chain"
    indices, betas = respaced(objective.betas, steps)
    times = jnp.asarray(indices + objective.first, x.dtype)
    c = x.shape[-1]

    def step(i: Array, x: Array) -> Array:
        n = jnp.full(x.shape[0], steps - 1 - i)
        prediction = model(x, times[n], cond).astype(x.dtype)  # [B, h, w, c or 2 c]
        x0 = objectives.x0_from_epsilon(betas, x, n, prediction[..., :c])
        mean, _, log_variance = objectives.posterior(betas, x0, x, n)
        if objective.learned_variance:
            log_variance = objectives.learned_log_variance(betas, prediction[..., c:], n)
        fresh = _noise(keys, i + 1, x.shape[1:], x.dtype)
        return mean + jnp.where(i < steps - 1, jnp.exp(0.5 * log_variance) * fresh, 0)

    return jax.lax.fori_loop(0, steps, step, x)


# --- flows: a velocity, integrated from t = 0 (noise) to 1 (data) ---------------------------------


def euler(
    model: Model, x: Float[Array, "B h w c"], cond: Cond, steps: int
) -> Float[Array, "B h w c"]:
    """Euler's method, with uniform steps."""
    velocity = _velocity(model, cond)

    def step(i: Array, x: Array) -> Array:
        return x + velocity(x, i / steps) / steps

    return jax.lax.fori_loop(0, steps, step, x)


def heun(
    model: Model, x: Float[Array, "B h w c"], cond: Cond, steps: int
) -> Float[Array, "B h w c"]:
    """Heun's method, order 2, with uniform steps: two evaluations per step."""
    velocity = _velocity(model, cond)

    def step(i: Array, x: Array) -> Array:
        first = velocity(x, i / steps)
        second = velocity(x + first / steps, (i + 1) / steps)
        return x + (first + second) / (2 * steps)

    return jax.lax.fori_loop(0, steps, step, x)


def jumps(
    model: Callable[..., Array],
    x: Float[Array, "B h w c"],
    cond: Cond,
    times: Float[np.ndarray, " points"],
) -> Float[Array, "B h w c"]:
    """One jump along each interval's average velocity; times [E + 1] go from 0 (noise) to 1 (data).

    model: (x, t [B], cond, h [B]) -> average velocity from t to t + h (meanflow.py).
    """
    t, h = (jnp.asarray(table, x.dtype) for table in (times[:-1], np.diff(times)))

    def jump(i: Array, x: Array) -> Array:
        at, by = (jnp.full(x.shape[0], table[i]) for table in (t, h))
        return x + h[i] * model(x, at, cond, by).astype(x.dtype)

    return jax.lax.fori_loop(0, len(h), jump, x)


def _velocity(model: Model, cond: Cond) -> Callable[[Array, Array], Array]:
    """(x [B, h, w, c], t [] or [B]) -> velocity [B, h, w, c], in the dtype of x."""

    def velocity(x: Array, t: Array) -> Array:
        return model(x, jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype), cond).astype(x.dtype)

    return velocity


# Dormand & Prince 1980, table 2: the time and the weights of stage i. The last row is the step
# itself, whose velocity is the next step's first (FSAL). The embedded solution of order 4 is
# that of Shampine 1986 ("Some practical Runge-Kutta formulas"), as in torchdiffeq and so SiT.
_C = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
_A = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ]
)
_ORDER_4 = np.array([1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60])


def dopri5(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    first_step: float = 0.01,
    max_steps: int = 4096,
) -> Float[Array, "B h w c"]:
    """Dormand-Prince 5(4), adaptive, with a step size per sample; NaN for unfinished samples.

    All samples go through the stages together, so the model is evaluated on the whole sharded
    batch; time, step size and acceptance are per sample.
    """
    velocity = _velocity(model, cond)
    c, a, of_error = (jnp.asarray(table, x.dtype) for table in (_C, _A, _A[-1] - _ORDER_4))
    end = 1 - 100 * float(jnp.finfo(x.dtype).eps)  # a step past this ends at 1

    def per_sample(v: Array) -> Array:
        return v[:, None, None, None]  # [B, 1, 1, 1]

    def combined(weights: Array, k: Array) -> Array:
        # Not a dot product: on a TPU it would round its factors to bfloat16.
        terms = [weights[i] * k[i] for i in range(len(k))]
        return functools.reduce(jnp.add, terms)  # [B, h, w, c]

    def attempt(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        n, t, h, x, k = carry  # [], [B], [B], [B, h, w, c], [7, B, h, w, c]

        def stage(i: Array, k: Array) -> Array:
            return k.at[i].set(velocity(x + per_sample(h) * combined(a[i], k), t + c[i] * h))

        # Stage 0 is the previous step's last stage, except in the first attempt.
        k = jax.lax.fori_loop(jnp.minimum(n, 1), len(_C), stage, k.at[1:].set(0))
        new = x + per_sample(h) * combined(a[-1], k)
        tolerance = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(new))
        error = per_sample(h) * combined(of_error, k) / tolerance
        error = jnp.sqrt(jnp.mean(jnp.square(error), (1, 2, 3)))  # [B]
        accepted = (error < 1) & (t < 1)
        x = jnp.where(per_sample(accepted), new, x)
        k = k.at[0].set(jnp.where(per_sample(accepted), k[-1], k[0]))
        t = jnp.where(accepted, jnp.where(h >= 1 - t, 1, t + h), t)
        factor = 0.9 * error ** (-1 / 5)
        h = h * jnp.where(error < 1, jnp.clip(factor, 1, 10), jnp.clip(factor, 0.2, 0.9))
        return n + 1, t, jnp.where(t + h > end, 1 - t, h), x, k

    def running(carry: tuple[Array, ...]) -> Array:
        n, t, h = carry[:3]
        return (n < max_steps) & jnp.any((t < 1) & jnp.isfinite(h))

    t = jnp.zeros(x.shape[0], x.dtype)
    k = jnp.zeros((len(_C), *x.shape), x.dtype)
    _, t, _, x, _ = jax.lax.while_loop(running, attempt, (jnp.int32(0), t, t + first_step, x, k))
    return jnp.where(per_sample(t) == 1, x, jnp.nan)


# --- guidance -------------------------------------------------------------------------------------


def guided(
    model: Model,
    none: int,
    scale: float | Array,
    *,
    objective: str,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Model:
    """`model` with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    It predicts uncond + scale (cond - uncond) for labels [B], in one call of `model` with 2 B
    examples; `none` is the label for no class. scale: a number, or an array of one value or [B];
    the number 1 skips the unconditional half. interval: the noise levels (1 is pure noise, 0 data)
    at which guidance applies; elsewhere the prediction is the conditional one (Kynkaanniemi et al.
    2024). A learned variance is always the conditional one.
    """
    if not isinstance(scale, jax.Array) and np.ndim(scale) == 0 and scale == 1:
        return model
    low, high = interval

    def predict(x: Array, time: Array, labels: Array) -> Array:
        both = jnp.concatenate([labels, jnp.full_like(labels, none)])  # [2 B]
        prediction = model(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        cond, uncond = jnp.split(prediction.astype(x.dtype), 2)  # [B, h, w, c or 2 c] each
        level = objectives.objective(objective).noise_level(time)  # [B]
        acts = (low <= level) & (level <= high)
        extra = jnp.where(acts, jnp.asarray(scale, x.dtype) - 1, 0)[:, None, None, None]
        c = x.shape[-1]
        first = cond[..., :c] + extra * (cond[..., :c] - uncond[..., :c])
        return jnp.concatenate([first, cond[..., c:]], axis=-1)

    return predict
