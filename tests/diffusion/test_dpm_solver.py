# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver against the exact solution for a Gaussian: errors, and orders of convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gaussian import (
    BETAS,
    COUNTS,
    START,
    WIDE,
    chain_model,
    epsilon_of,
    exact,
    order_of,
)

from dcae_jax.diffusion import dpm_solver, samplers


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def largest_error(objective, sampler, steps):
    model = functools.partial(chain_model, objective)
    run = functools.partial(
        samplers.sample, model, objective=objective, sampler=sampler, steps=steps
    )
    log_alpha = np.log(np.cumprod(1 - BETAS[objective])) / 2
    return np.abs(jax.jit(run)(WIDE) - exact(WIDE, log_alpha[-1], log_alpha[0])).max()


@pytest.mark.parametrize(
    "sampler, steps, want",
    [
        ("dpm_fast", 30, 0.0444),
        ("dpm_fast", 60, 0.0187),
        ("ddim", 30, 0.0810),
        ("ddim", 60, 0.0431),
    ],
)
def test_errors_on_the_gaussian_are_those_of_the_authors_samplers(sampler, steps, want):
    """Catches another grid, other orders, inner evaluations off the grid, a wrong network time."""
    assert round(float(largest_error("epsilon", sampler, steps)), 4) == want


@pytest.mark.parametrize("sampler", samplers.SAMPLERS["learned_sigma"][1:])
def test_samplers_of_the_other_chain_converge_too(sampler):
    """Catches DiT's network given UViT's times, and its variances taken for noise."""
    errors = [largest_error("learned_sigma", sampler, steps) for steps in (100, 400)]
    # Uniform time is a coarse grid near the data, where its log-SNR changes fast.
    assert errors[0] < 0.1 and errors[1] < 0.4 * errors[0]


def smooth_log_alpha(t):
    """The variance preserving process with beta from 0.1 to 20 (Song et al. 2021)."""
    return -(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2


SMOOTH = dpm_solver.Schedule(log_alpha=smooth_log_alpha, network_time=lambda t: t)


def smooth_grid(count, bend=1.0):
    """Times from 1 to 0.05, spaced in half-log-SNR as i^bend, by bisection; 1: evenly."""
    first, last = SMOOTH.half_log_snr(1.0), SMOOTH.half_log_snr(0.05)
    wanted = first + (last - first) * np.linspace(0, 1, count + 1) ** bend
    low, high = np.full(count + 1, 0.01), np.full(count + 1, 1.5)
    for _ in range(60):
        middle = (low + high) / 2
        noisier = SMOOTH.half_log_snr(middle) < wanted
        low, high = np.where(noisier, low, middle), np.where(noisier, middle, high)
    return (low + high) / 2


def singlestep(order, model, x, cond, schedule, times):
    orders = [order] * (len(times) // order)
    return dpm_solver.singlestep(model, x, cond, schedule, times, orders)


SOLVERS = {
    "ddim": dpm_solver.ddim,
    "2m": dpm_solver.dpmpp_2m,
    "3m": dpm_solver.dpmpp_3m,
    "single 2": functools.partial(singlestep, 2),
    "single 3": functools.partial(singlestep, 3),
}


@pytest.mark.parametrize(
    "solver, low, high",
    [
        ("ddim", 0.85, 1.15),
        ("2m", 1.85, 2.15),
        ("3m", 2.85, 3.15),
        ("single 2", 1.85, 2.15),
        ("single 3", 2.8, 3.15),
    ],
)
@pytest.mark.parametrize("bend", [1.0, 1.3])
def test_orders_of_convergence_of_dpm_solvers(solver, low, high, bend):
    """Catches a wrong coefficient, which lowers the order even where samples look right, and one
    that is right for steps of equal length alone."""
    model = lambda x, t, _: epsilon_of(x, smooth_log_alpha(t))  # noqa: E731
    want = exact(START, smooth_log_alpha(1.0), smooth_log_alpha(0.05))
    errors = []
    for count in COUNTS:
        solve = functools.partial(SOLVERS[solver], schedule=SMOOTH, times=smooth_grid(count, bend))
        run = jax.jit(lambda x, solve=solve: solve(model, x, None))
        errors.append(np.abs(run(START) - want).max())
    assert low <= order_of(errors) <= high, errors


@pytest.mark.parametrize(
    "steps, tail", [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (30, [2, 1])]
)
def test_the_orders_of_the_fast_rule_use_every_evaluation(steps, tail):
    """Catches a plan with one evaluation more or less than asked for."""
    orders = dpm_solver.fast_orders(steps)
    assert sum(orders) == steps
    assert orders == [3] * ((steps - sum(tail)) // 3) + tail


@pytest.mark.parametrize("order, solver", [(2, dpm_solver.dpmpp_2m), (3, dpm_solver.dpmpp_3m)])
def test_few_multisteps_end_with_low_orders(order, solver):
    """Catches high orders over the last, largest steps: 5 evaluations would blow up."""
    assert dpm_solver.multistep_orders(5, 3).tolist() == [1, 2, 3, 2, 1]
    assert dpm_solver.multistep_orders(15, 3).tolist() == [1, 2, *[3] * 13]
    times, seen = smooth_grid(5), []

    def model(x, t, _):
        seen.append(x)
        return epsilon_of(x, smooth_log_alpha(t))

    with jax.disable_jit():
        end = solver(model, jnp.asarray(START), None, SMOOTH, times)

    def first_order(x, i):
        alpha, sigma = SMOOTH.alpha(times[i : i + 2]), SMOOTH.sigma(times[i : i + 2])
        noise = epsilon_of(x, jnp.full(9, smooth_log_alpha(times[i])))
        return alpha[1] / alpha[0] * (x - sigma[0] * noise) + sigma[1] * noise

    steps = [*seen, end]
    low = [np.allclose(first_order(steps[i], i), steps[i + 1], rtol=1e-9) for i in range(5)]
    assert low == [True, False, False, False, True]
