# SPDX-License-Identifier: Apache-2.0
"""From noise to clean latents: the samplers, guidance, and where each sample's noise comes from.

Everything here can be traced inside one jit. A sampler is a table made on the host in float64 and
one compiled loop over its rows that calls the model once, so it compiles about as fast as a single
evaluation. Evaluations are counted, not steps: `steps=30` costs 30 of them with every sampler but
dopri5, which chooses for itself.

The steps of DDIM and DPM-Solver++ are exact for the linear part of the ODE and expand the
predicted clean latent D in half the log of the signal-to-noise ratio, lambda = log(alpha / sigma):
    x(t) = sigma_t / sigma_s x(s) + sigma_t * integral of exp(lambda) D over lambda from s to t
(Lu et al. 2022, "DPM-Solver++", eq. 8).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from dcae_jax import diffusion
from dcae_jax.config import UserError
from dcae_jax.diffusion import Array, Model

# The first of each is its objective's own. What they do: docstring of `sample`.
_MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "dpmpp_3m_corrected")
SAMPLERS = {
    "epsilon": ("dpm_fast", *_MULTISTEP, "ddim", "ddpm"),
    "learned_sigma": ("ddpm", "dpm_fast", *_MULTISTEP, "ddim"),
    "flow": ("dopri5", "euler", "heun"),
}


def sample_keys(seed: int | Array, indices: Array) -> Array:
    """The random key [B] of each sample, from `seed` and its number alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def initial_noise(keys: Array, shape: tuple) -> Array:
    """Standard normal noise [B, *shape] float32 of the samples with `keys` [B] (`sample_keys`).

    A sample's is the same whatever the batch.
    """
    return _noise(keys, 0, shape, jnp.float32)


def _noise(keys: Array, use: int | Array, shape: tuple, dtype: jnp.dtype) -> Array:
    """Noise [B, *shape] of samples with `keys` [B]. use 0: initial; 1, 2, ...: DDPM's steps."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, use), shape, dtype))(keys)


def sample(
    model: Model,
    noise: Array,
    *,
    objective: str,
    sampler: str = "",
    steps: int,
    keys: Array | None = None,
) -> Array:
    """Clean, still scaled latents [B, h, w, c] from `noise` of that shape, in its dtype.

    model: (x [B, h, w, c], time [B]) -> prediction; 2 c channels if objective is learned_sigma.
    sampler, '' being the objective's own:
      dpm_fast    DPM-Solver++, single steps of order 3 as UViT's authors run it (epsilon's own)
      dpmpp_2m    DPM-Solver++, multistep, order 2
      dpmpp_3m    the same of order 3 as published, which converges with order 2 only
      dpmpp_3m_corrected  with the factor 2 that its second difference lacks: order 3
      ddim        order 1, deterministic (Song et al. 2021)
      ddpm        ancestral over a chain of `steps` of the 1000 steps (learned_sigma's own)
      dopri5      adaptive Dormand-Prince, atol 1e-6, rtol 1e-3, a step size for each sample;
                  a sample that has not arrived after 4096 steps is NaN (flow's own)
      euler, heun  of even steps
    steps: evaluations of the model. keys [B] (`sample_keys`): needed by ddpm alone.
    Raises UserError if the objective has no such sampler, or the sampler cannot take `steps`.
    """
    if objective not in SAMPLERS:
        raise UserError(f"objective={objective!r} is none of {', '.join(SAMPLERS)}")
    sampler = sampler or SAMPLERS[objective][0]
    if sampler not in SAMPLERS[objective]:
        names = ", ".join(SAMPLERS[objective])
        raise UserError(f"sampler={sampler!r} does not fit objective={objective!r}: take {names}")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    if sampler == "dopri5":
        return _dopri5(model, noise)
    if sampler == "euler":
        return euler(model, noise, steps)
    if sampler == "heun":
        if steps % 2:
            raise UserError(f"steps={steps}: heun evaluates twice a step; take an even number")
        return heun(model, noise, steps // 2)
    if sampler == "ddpm":
        return _ddpm(model, noise, objective, steps, keys)
    schedule = SCHEDULES[objective]
    grid = np.linspace(1, 1 / 1000, steps + 1)
    if sampler == "dpm_fast":
        plan = single_step_plan(schedule, grid, fast_orders(steps))
    elif sampler == "ddim":
        plan = multistep_plan(schedule, grid, 1)
    elif sampler == "dpmpp_2m":
        plan = multistep_plan(schedule, grid, 2)
    else:
        plan = multistep_plan(schedule, grid, 3, corrected=sampler == "dpmpp_3m_corrected")
    return solve(model, noise, plan)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much signal and noise there is at time t: 1 is pure noise, 0 is data. On the host."""

    log_alpha: Callable[[np.ndarray], np.ndarray]  # log of the signal's factor at t
    network_time: Callable[[np.ndarray], np.ndarray]  # what the network is given at t

    def alpha(self, t: np.ndarray) -> np.ndarray:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: np.ndarray) -> np.ndarray:
        """The noise's factor; alpha^2 + sigma^2 = 1."""
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def half_log_snr(self, t: np.ndarray) -> np.ndarray:
        return self.log_alpha(t) - np.log(self.sigma(t))


def chain_schedule(betas: np.ndarray, first: int) -> Schedule:
    """A chain [N] in continuous time: log alpha is linear between t = 1/N, 2/N, ..., 1.

    first: what the network is given at the chain's first step, t = 1/N.
    """
    table, count = diffusion.log_alphas(betas), len(betas)
    times = np.arange(1, count + 1) / count
    return Schedule(
        log_alpha=lambda t: np.interp(t, times, table),
        network_time=lambda t: count * np.asarray(t) - 1 + first,
    )


SCHEDULES = {
    "epsilon": chain_schedule(diffusion.scaled_linear_betas(), first=1),
    "learned_sigma": chain_schedule(diffusion.linear_betas(), first=0),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A deterministic sampler: one row for each evaluation of the model, [E] in all.

    A row: at `time` the model predicts D = (x - sigma epsilon) / alpha, which is kept in one of
    three places, `place`. The next x is `of_base` times the x where this step began, plus the
    three kept predictions times `of_kept`. Where `lands` is true, that x begins the next step.
    """

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    place: np.ndarray
    of_base: np.ndarray
    of_kept: np.ndarray  # [E, 3]
    lands: np.ndarray


def _plan(schedule: Schedule, times: np.ndarray, rows: list[tuple]) -> Plan:
    """rows: (place, of_base, of_kept, lands) of each evaluation, which are at `times`."""
    place, of_base, of_kept, lands = (np.array(column) for column in zip(*rows, strict=True))
    return Plan(
        time=schedule.network_time(times),
        alpha=schedule.alpha(times),
        sigma=schedule.sigma(times),
        place=place,
        of_base=of_base,
        of_kept=of_kept,
        lands=lands,
    )


def fast_orders(evaluations: int) -> list[int]:
    """Orders of the single steps that use so many evaluations (Lu et al. 2022, "fast").

    30 gives nine of order 3, then 2 and 1.
    """
    threes, rest = evaluations // 3, evaluations % 3
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def single_step_plan(schedule: Schedule, grid: np.ndarray, orders: list[int]) -> Plan:
    """DPM-Solver++ with single steps, along `grid` [E + 1], times from noise to data.

    A step of order k spans k intervals of the grid and evaluates the model at its beginning and
    on the grid points inside, as UViT's authors do; the orders sum up to E. DPM-Solver++ (Lu et
    al. 2022), algorithm 1; the order 3 is that of DPM-Solver-3 with predictions of the data.
    """
    rows, start = [], 0
    for order in orders:
        t = grid[start : start + order + 1]
        alpha, sigma, depth = schedule.alpha(t), schedule.sigma(t), schedule.half_log_snr(t)
        h = depth[1:] - depth[0]  # from the step's beginning to each of its points
        # What D, and what D' times h, contribute: the integrals of e^lambda and lambda e^lambda.
        constant = -alpha[1:] * np.expm1(-h)
        slope = alpha[1:] * (1 + np.expm1(-h) / h)
        if order == 1:
            of_kept = [[constant[0], 0, 0]]
        elif order == 2:
            share = constant[1] * h[1] / (2 * h[0])
            of_kept = [[constant[0], 0, 0], [constant[1] - share, share, 0]]
        else:
            inner, outer = slope[1] * h[1] / h[0], slope[2] * h[2] / h[1]
            of_kept = [
                [constant[0], 0, 0],
                [constant[1] - inner, inner, 0],
                [constant[2] - outer, 0, outer],
            ]
        rows += [(i, sigma[i + 1] / sigma[0], of_kept[i], i == order - 1) for i in range(order)]
        start += order
    return _plan(schedule, grid[:-1], rows)


def multistep_plan(
    schedule: Schedule, grid: np.ndarray, order: int, *, corrected: bool = True
) -> Plan:
    """DPM-Solver++ with multisteps along `grid` [E + 1], times from noise to data; 1 is DDIM.

    The first steps, which have no past, are of lower order; with fewer than 15 steps so are the
    last ones, which the authors found stabler. Order 3 expands D up to its second derivative,
    which is TWICE the second divided difference; the published code leaves out that factor.
    corrected=False does as it does.
    """
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    h = np.diff(schedule.half_log_snr(grid))
    count = len(h)
    rows = []
    for i in range(count):
        now = min(order, i + 1, count - i if count < 15 else order)
        constant = -np.expm1(-h[i])
        of_past = np.zeros(3)  # of D here, one and two steps ago
        of_past[0] = constant
        if now == 2:
            # Half the constant instead of the slope's own integral: equal up to the order.
            of_past += constant * h[i] / (2 * h[i - 1]) * np.array([1, -1, 0])
        elif now == 3:
            slope = 1 - constant / h[i]
            curvature = 0.5 - slope / h[i]
            near = np.array([1, -1, 0]) / h[i - 1]
            far = np.array([0, 1, -1]) / h[i - 2]
            second = (near - far) / (h[i - 1] + h[i - 2])
            of_past += slope * h[i] * (near + h[i - 1] * second)
            of_past += curvature * h[i] ** 2 * second * (2 if corrected else 1)
        of_kept = np.zeros(3)
        of_kept[(i - np.arange(3)) % 3] = alpha[i + 1] * of_past
        rows.append((i % 3, sigma[i + 1] / sigma[i], of_kept, True))
    return _plan(schedule, grid[:-1], rows)


def solve(model: Model, x: Array, plan: Plan) -> Array:
    """Runs a plan from x [B, ...]. The model predicts epsilon in its first x.shape[-1] channels."""

    def evaluate(carry, row):
        base, x, kept = carry
        time, alpha, sigma, place, of_base, of_kept, lands = row
        epsilon = _epsilon(model(x, jnp.full(x.shape[0], time)), x)
        kept = kept.at[place].set((x - sigma * epsilon) / alpha)
        # No dot product: on a TPU it would round its factors to bfloat16.
        x = of_base * base + sum(of_kept[i] * kept[i] for i in range(3))
        return (jnp.where(lands, x, base), x, kept), None

    rows = [
        jnp.asarray(column, x.dtype if column.dtype == np.float64 else None)
        for column in dataclasses.astuple(plan)
    ]
    carry = (x, x, jnp.zeros((3, *x.shape), x.dtype))
    return jax.lax.scan(evaluate, carry, tuple(rows))[0][0]


def _epsilon(prediction: Array, x: Array) -> Array:
    return prediction[..., : x.shape[-1]].astype(x.dtype)


def respaced(betas: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A chain through `steps` of the steps of another: their numbers [steps], and its betas.

    Evenly spread from the first to the last, and equally noisy there (Nichol & Dhariwal 2021,
    section 4).
    """
    numbers = np.round(np.linspace(0, len(betas) - 1, steps)).astype(int)
    log_alpha = diffusion.log_alphas(betas)[numbers]
    return numbers, -np.expm1(2 * np.diff(log_alpha, prepend=0.0))


def _ddpm(model: Model, x: Array, objective: str, steps: int, keys: Array | None) -> Array:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over a respaced chain, x0 not clipped.

    A model without learned sigma gets the posterior's variance.
    """
    if keys is None:
        raise ValueError("ddpm draws noise at each step: pass keys=sample_keys(seed, indices)")
    learned = objective == "learned_sigma"
    betas = diffusion.linear_betas() if learned else diffusion.scaled_linear_betas()
    if not 2 <= steps <= len(betas):
        raise UserError(f"steps={steps} must be between 2 and {len(betas)} for ddpm")
    numbers, betas = respaced(betas, steps)
    times = jnp.asarray(numbers if learned else numbers + 1, x.dtype)
    c = x.shape[-1]

    def step(i, x):
        n = jnp.full(x.shape[0], steps - 1 - i)
        prediction = model(x, times[n]).astype(x.dtype)
        x0 = diffusion.x0_from_epsilon(betas, x, n, prediction[..., :c])
        mean, _, log_variance = diffusion.posterior(betas, x0, x, n)
        if learned:
            log_variance = diffusion.learned_log_variance(betas, prediction[..., c:], n)
        fresh = _noise(keys, i + 1, x.shape[1:], x.dtype)
        return mean + jnp.where(i < steps - 1, jnp.exp(0.5 * log_variance) * fresh, 0)

    return jax.lax.fori_loop(0, steps, step, x)


def euler(model: Model, x: Array, steps: int) -> Array:
    """Integrates a velocity from t = 0 (x, noise) to 1 (data) by Euler's method."""

    def step(i, x):
        return x + _velocity(model, x, i / steps) / steps

    return jax.lax.fori_loop(0, steps, step, x)


def heun(model: Model, x: Array, steps: int) -> Array:
    """Integrates a velocity from t = 0 (x, noise) to 1 (data) by Heun's method, order 2."""

    def step(i, x):
        first = _velocity(model, x, i / steps)
        second = _velocity(model, x + first / steps, (i + 1) / steps)
        return x + (first + second) / (2 * steps)

    return jax.lax.fori_loop(0, steps, step, x)


def _velocity(model: Model, x: Array, t: Array) -> Array:
    return model(x, jnp.full(x.shape[0], t, x.dtype)).astype(x.dtype)


def _dopri5(model: Model, x: Array) -> Array:
    """Dormand & Prince 1980, adaptive, each sample with its own step size."""
    import diffrax

    # diffrax sees one sample and asks it for a shape; under the vmap below, the model is called
    # once for the whole batch, whose labels it has closed over. Traced values in its closure are
    # made arguments, since the rule of a custom vmap runs when their own trace is out of reach.
    traced = jax.make_jaxpr(lambda y, t: model(y, t).astype(x.dtype))(x, x[:, 0, 0, 0])

    @jax.custom_batching.custom_vmap
    def velocity(t, y, closure):
        return jnp.zeros_like(y)

    @velocity.def_vmap
    def _(axis_size, is_batched, t, y, closure):
        t = t if is_batched[0] else jnp.full(axis_size, t)
        y = y if is_batched[1] else jnp.broadcast_to(y, (axis_size, *y.shape))
        whole = jax.extend.core.ClosedJaxpr(traced.jaxpr, closure)
        return jax.extend.core.jaxpr_as_fun(whole)(y, t)[0], True

    def integrate(y):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Dopri5(),
            t0=jnp.zeros((), x.dtype),
            t1=jnp.ones((), x.dtype),
            dt0=None,
            y0=y,
            args=traced.consts,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            adjoint=diffrax.ForwardMode(),
            max_steps=4096,
            throw=False,
        )
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan)

    return jax.vmap(integrate)(x)


def guided(
    model: Callable[[Array, Array, Array], Array],
    labels: Array,
    none: int,
    scale: float | Array,
    *,
    objective: str,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Model:
    """Classifier-free guidance (Ho & Salimans 2022): labels [B], the extrapolated prediction.

    uncond + scale (cond - uncond), from one call of `model` (x, time, labels) with 2 B examples;
    `none` is the label that stands for no label. scale: a number, or an array, of one value or
    [B]; the number 1 leaves out the second half. interval: the noise levels, 1 being pure noise
    and 0 data, at which guidance acts; elsewhere the conditional prediction counts
    (Kynkaanniemi et al. 2024). Of a learned sigma the conditional one is kept.
    """
    if not isinstance(scale, jax.Array) and np.ndim(scale) == 0 and scale == 1:
        return lambda x, time: model(x, time, labels)
    low, high = interval

    def predict(x, time):
        both = jnp.concatenate([labels, jnp.full_like(labels, none)])
        prediction = model(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        cond, uncond = jnp.split(prediction.astype(x.dtype), 2)
        level = {"epsilon": time / 1000, "learned_sigma": (time + 1) / 1000, "flow": 1 - time}
        acts = (low <= level[objective]) & (level[objective] <= high)
        extra = jnp.where(acts, jnp.asarray(scale, x.dtype) - 1, 0)[:, None, None, None]
        c = x.shape[-1]
        first = cond[..., :c] + extra * (cond[..., :c] - uncond[..., :c])
        return jnp.concatenate([first, cond[..., c:]], axis=-1)

    return predict
