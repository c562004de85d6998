# SPDX-License-Identifier: Apache-2.0
"""Cost: the search for the largest batch, and the price of a step."""

import math
import os

import pytest
from support import CONFIGS, planning

from dcae_jax.config.schema import Plan
from dcae_jax.planner import chips, compile, cost


@pytest.mark.parametrize("most, start", [(1, 256), (7, 8), (63, 256), (100, 1), (1000, 8)])
def test_the_largest_batch_is_found(most, start):
    """Catches a search that ends one too low or too high, or compiles for ever."""
    tries = []

    def compile_with(batch):
        tries.append(batch)
        return batch <= most * 4, 10 + 3.0 * batch

    assert cost.largest_batch(compile_with, 4, start, 10 + 3.0 * (most * 4 + 1)) == most * 4
    assert len(tries) == len(set(tries)) <= cost.MAX_COMPILES


def test_a_search_without_sizes_halves():
    """Catches a search that trusts sizes where the compiler gave none."""
    found = cost.largest_batch(lambda b: (b <= 48, 1.0 if b <= 48 else math.inf), 8, 8, 2.0)
    assert found == 48


def test_no_batch_fits():
    """Catches an endless search where the state alone is too large."""
    tries = []
    assert cost.largest_batch(lambda b: (bool(tries.append(b)), 9.0), 8, 32, 1.0) == 0
    assert tries == [32, 16, 8]


@pytest.mark.parametrize(
    "settings, steps",
    [
        (Plan(config=planning.PHASE1, overrides=planning.SMALL, find_batch=True), 1200),
        (Plan(**planning.SAMPLES, find_batch=True), 2),  # 20 images
    ],
)
def test_find_batch_plans_what_it_found(monkeypatch, settings, steps):
    """Catches a search whose result is not the batch of the row, or which compiles it twice."""
    seen = []

    def fake(settings, text, size, batch, part):
        seen.append(batch)
        return _facts(topology=text, size=size, batch_size=batch, peak_bytes=batch * 1e9)

    monkeypatch.setattr(compile, "compile_in_subprocess", fake)
    (row,) = cost.plan(settings, compile.target_job(settings), "v5e:2x2")
    assert row["batch_size"] == 16 and row["fits"]  # the last multiple of 4 below 16.6 GB
    assert row["steps"] == steps
    assert len(seen) == len(set(seen))


def _facts(**changes):
    """What `compile.measure` gives, of a made-up program on four v5e."""
    facts = dict(
        topology="v5e:2x2", chips=4, mesh={}, batch_size=64, batch_per_chip=16, size=256,
        arguments_bytes=1e9, output_bytes=1e9, temp_bytes=1e9, alias_bytes=1e9, peak_bytes=2e9,
        flops=197e12, bytes_accessed=81.9e9, collectives={}, compile_s=1.0, compile_cpu_s=2.0,
    )  # fmt: skip
    return facts | changes


def test_the_price_of_a_step():
    """Catches a factor of chips, of 1000 or of 3600 in chip-hours, kWh and images per second."""
    row = cost.priced(_facts(), 3600, 0.0)
    assert row["step_s_roofline"] == pytest.approx(1.0) and row["bound"] == "compute"
    assert row["images_per_s"] == pytest.approx(64)
    assert row["chip_hours"] == pytest.approx(4)
    assert row["kwh"] == pytest.approx(4 * chips.CHIPS["v5e"].watts / 1000)
    assert cost.priced(_facts(), 3600, 500.0)["kwh"] == pytest.approx(2)
    slow = cost.priced(_facts(bytes_accessed=819e9 * 3), 3600, 0.0)
    assert slow["step_s_roofline"] == pytest.approx(3) and slow["bound"] == "memory"


def test_what_fits():
    """Catches a program called fitting to the last byte, and one that XLA refused."""
    room = chips.CHIPS["v5e"].hbm - chips.RESERVE
    assert cost.priced(_facts(peak_bytes=room), 1, 0.0)["fits"]
    assert not cost.priced(_facts(peak_bytes=room + 1), 1, 0.0)["fits"]
    refused = cost.priced(_facts(compile_s=None, bytes_accessed=None, peak_bytes=None), 1, 0.0)
    assert not refused["fits"] and refused["chip_hours"] is None
    assert "-" in cost.cells(refused) and cost.table([refused])


def test_a_drawn_resolution_is_priced_by_its_fraction_of_steps():
    """Catches the largest resolution priced as if every step had it."""
    sizes = {256: 0.25, 512: 0.75}
    rows = [
        cost.priced(_facts(size=size, flops=flops, peak_bytes=peak), 3600, 0.0)
        for size, flops, peak in ((256, 197e12, 1e9), (512, 4 * 197e12, 20e9))
    ]
    row = cost.mean(rows, sizes, 3600)
    assert row["size"] == cost.MEAN and row["peak_bytes"] == 20e9 and not row["fits"]
    assert row["step_s_roofline"] == pytest.approx(0.25 + 0.75 * 4)
    assert row["chip_hours"] == pytest.approx(4 * row["step_s_roofline"])
    job = compile.job_config(os.path.join(CONFIGS, "phase2.py"), ())
    assert cost.size_fractions(job) == {256: 0.25, 512: 0.5, 1024: 0.25}
