# SPDX-License-Identifier: Apache-2.0
"""DDIM and DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), for models that predict noise.

They solve the probability flow ODE in lam = log(alpha / sigma), half the log SNR, where the linear
part has an exact solution (eq. 8):

    x_t = sigma_t / sigma_s x_s + sigma_t * integral from lam_s to lam_t of exp(lam) D(lam) dlam

D is the predicted clean latent. Expanded about lam_s, with h = lam_t - lam_s, that is

    x_t = sigma_t / sigma_s x_s + alpha_t (phi_1 D + phi_2 h D' + phi_3 h^2 D'' + ...)

(phi_k: see `_phis`). The solvers differ in which evaluations they estimate D' and D'' from. Each
is one compiled loop that contains the model once; its coefficients are computed in float64 on the
host. `times` [E + 1] go from noise to data; the model is evaluated at all but the last.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dcae_jax.diffusion import objectives
from dcae_jax.diffusion.objectives import Array, Cond, Model


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Signal and noise levels at time t (1 is pure noise, 0 is data), computed on the host."""

    log_alpha: Callable[[np.ndarray], np.ndarray]  # log of the signal's factor at t
    network_time: Callable[[np.ndarray], np.ndarray]  # the network's time input at t

    def alpha(self, t: np.ndarray) -> np.ndarray:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: np.ndarray) -> np.ndarray:
        """The noise's factor; alpha^2 + sigma^2 = 1."""
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def half_log_snr(self, t: np.ndarray) -> np.ndarray:
        return self.log_alpha(t) - np.log(self.sigma(t))


def chain_schedule(betas: np.ndarray, first: int) -> Schedule:
    """A chain [N] in continuous time: log alpha is linear between t = 1/N, 2/N, ..., 1.

    first: the network's time input at the chain's first step, t = 1/N.
    """
    table, count = objectives.log_alphas(betas), len(betas)
    times = np.arange(1, count + 1) / count
    return Schedule(
        log_alpha=lambda t: np.interp(t, times, table),
        network_time=lambda t: count * np.asarray(t) - 1 + first,
    )


def ddim(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    schedule: Schedule,
    times: Float[np.ndarray, " points"],
) -> Float[Array, "B h w c"]:
    """DDIM (Song et al. 2021), which is DPM-Solver++ of order 1 (Lu et al. 2022, section 5)."""
    predict = _data_prediction(model, cond, schedule, times[:-1], x.dtype)
    phi_1, _, _ = _phis(np.diff(schedule.half_log_snr(times)))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    decay, of_d = _tables(x.dtype, sigma[1:] / sigma[:-1], alpha[1:] * phi_1)

    def step(i: Array, x: Array) -> Array:
        return decay[i] * x + of_d[i] * predict(x, i)

    return jax.lax.fori_loop(0, len(decay), step, x)


def dpmpp_2m(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    schedule: Schedule,
    times: Float[np.ndarray, " points"],
) -> Float[Array, "B h w c"]:
    """DPM-Solver++(2M): Lu et al. 2022, algorithm 2.

    phi_1 / 2 replaces phi_2, as in the paper: equal up to the order.
    """
    predict = _data_prediction(model, cond, schedule, times[:-1], x.dtype)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    h = np.diff(schedule.half_log_snr(times))  # [E]
    r = _earlier(h, 1) / h  # [E]
    phi_1, _, _ = _phis(h)
    half_over_r = np.where(multistep_orders(len(h), 2) == 2, 1 / (2 * r), 0)
    decay, of_d, half_over_r = _tables(
        x.dtype, sigma[1:] / sigma[:-1], alpha[1:] * phi_1, half_over_r
    )

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, d_1 = carry  # d_1: D one step ago
        d = predict(x, i)  # [B, h, w, c]
        middle = d + half_over_r[i] * (d - d_1)  # D extrapolated to lam + h / 2
        return decay[i] * x + of_d[i] * middle, d

    return jax.lax.fori_loop(0, len(h), step, (x, jnp.zeros_like(x)))[0]


def dpmpp_3m(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    schedule: Schedule,
    times: Float[np.ndarray, " points"],
) -> Float[Array, "B h w c"]:
    """DPM-Solver++ multistep of order 3: D', D'' from the parabola through the last three D.

    D'' is TWICE the second divided difference; the published code omits the 2 and so
    converges only with order 2. Steps of order 2 are those of `dpmpp_2m`.
    """
    predict = _data_prediction(model, cond, schedule, times[:-1], x.dtype)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    h = np.diff(schedule.half_log_snr(times))  # [E]
    r_1, r_2 = _earlier(h, 1) / h, _earlier(h, 2) / h  # the last two steps, in units of h
    phi_1, phi_2, phi_3 = _phis(h)
    order = multistep_orders(len(h), 3)
    of_slope = np.where(order == 1, 0, np.where(order == 2, phi_1 / 2, phi_2))
    of_change = np.where(order == 3, (phi_2 * r_1 + 2 * phi_3) / (r_1 + r_2), 0)
    decay, of_d, of_slope, of_change, r_1, r_2 = _tables(
        x.dtype,
        sigma[1:] / sigma[:-1],
        *(alpha[1:] * phi for phi in (phi_1, of_slope, of_change)),
        r_1,
        r_2,
    )

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, d_1, d_2 = carry  # D one and two steps ago
        d = predict(x, i)  # [B, h, w, c]
        slope, slope_before = (d - d_1) / r_1[i], (d_1 - d_2) / r_2[i]  # first differences
        x = decay[i] * x + of_d[i] * d + of_slope[i] * slope + of_change[i] * (slope - slope_before)
        return x, d, d_1

    start = (x, jnp.zeros_like(x), jnp.zeros_like(x))
    return jax.lax.fori_loop(0, len(h), step, start)[0]


def multistep_orders(evaluations: int, order: int) -> Int[np.ndarray, " {evaluations}"]:
    """The order [E] of each step of a multistep solver.

    The first steps have too few past evaluations. With fewer than 15 evaluations the last steps
    also have lower order, which the authors found more stable (Lu et al. 2022, appendix).
    """
    orders = np.minimum(order, np.arange(1, evaluations + 1))
    return np.minimum(orders, orders[::-1]) if evaluations < 15 else orders


def dpm_fast(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    schedule: Schedule,
    times: Float[np.ndarray, " points"],
) -> Float[Array, "B h w c"]:
    """Singlestep DPM-Solver++, "fast": order 3, lower in the last steps (`fast_orders`)."""
    return singlestep(model, x, cond, schedule, times, fast_orders(len(times) - 1))


def fast_orders(evaluations: int) -> list[int]:
    """Orders of the single steps for a number of evaluations (Lu et al. 2022, "fast").

    30 gives nine steps of order 3, then one each of order 2 and 1.
    """
    threes, rest = evaluations // 3, evaluations % 3
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def singlestep(
    model: Model,
    x: Float[Array, "B h w c"],
    cond: Cond,
    schedule: Schedule,
    times: Float[np.ndarray, " points"],
    orders: list[int],
) -> Float[Array, "B h w c"]:
    """DPM-Solver++(S), Lu et al. 2022, algorithm 1, along times [E + 1] from noise to data.

    A step of order k spans k intervals of `times` and evaluates the model at its start s and at
    the points inside, as UViT's authors do; the orders sum to E. Order 3 is DPM-Solver-3 (Lu et
    al. 2022, arXiv:2206.00927, algorithm 2) with data prediction. At each point u of a step,

        x_u = sigma_u / sigma_s x_s + alpha_u (phi_1 D_s + phi_2 h D'),  h = lam_u - lam_s

    where D' is the slope from s to the point before u, 0 at the first point.
    """
    predict = _data_prediction(model, cond, schedule, times[:-1], x.dtype)
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.half_log_snr(times)
    per_step = np.array(orders)
    order = np.repeat(per_step, per_step)  # [E], of the step that evaluation i belongs to
    start = np.repeat(np.cumsum(per_step) - per_step, per_step)  # [E], where that step starts
    starts = start == np.arange(len(start))
    h = lam[1:] - lam[start]  # from the step's start to the point after evaluation i
    r = np.where(starts, 1, lam[:-1] - lam[start]) / h  # evaluation i's place within that
    phi_1, phi_2, _ = _phis(h)
    of_slope = np.select([starts, order == 2], [0, phi_1 / 2], phi_2) / r
    decay, of_d, of_slope = _tables(
        x.dtype, sigma[1:] / sigma[start], alpha[1:] * phi_1, alpha[1:] * of_slope
    )
    starts = jnp.asarray(starts)

    def evaluate(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, x_s, d_s = carry
        d = predict(x, i)  # [B, h, w, c]
        x_s, d_s = jnp.where(starts[i], x, x_s), jnp.where(starts[i], d, d_s)
        return decay[i] * x_s + of_d[i] * d_s + of_slope[i] * (d - d_s), x_s, d_s

    return jax.lax.fori_loop(0, len(start), evaluate, (x, x, jnp.zeros_like(x)))[0]


def _phis(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi_k: the integrals of exp(u - h) (u / h)^(k - 1) / (k - 1)! over u from 0 to h, k = 1..3.

    Lu et al. 2022, appendix B; each follows from the previous one by parts.
    """
    phi_1 = -np.expm1(-h)
    phi_2 = 1 - phi_1 / h
    return phi_1, phi_2, 1 / 2 - phi_2 / h


def _earlier(h: np.ndarray, back: int) -> np.ndarray:
    """h from `back` steps ago [E]; 1, unused, where there is none."""
    return np.concatenate([np.ones(back), h])[: len(h)]


def _tables(dtype: jnp.dtype, *tables: np.ndarray) -> list[Array]:
    return [jnp.asarray(table, dtype) for table in tables]


def _data_prediction(
    model: Model, cond: Cond, schedule: Schedule, times: np.ndarray, dtype: jnp.dtype
) -> Callable[[Array, Array], Array]:
    """(x, i) -> D, the clean latents that the model predicts from x at times[i].

    The model predicts the noise, in its first x.shape[-1] channels.
    """
    time, alpha, sigma = _tables(
        dtype, schedule.network_time(times), schedule.alpha(times), schedule.sigma(times)
    )

    def predict(x: Array, i: Array) -> Array:
        prediction = model(x, jnp.full(x.shape[0], time[i]), cond)
        epsilon = prediction[..., : x.shape[-1]].astype(dtype)  # [B, h, w, c]
        return (x - sigma[i] * epsilon) / alpha[i]

    return predict
