"""The clock that calls run at: a short one at that of the products before it, a long one at its
own; and how it is fitted."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "samples" / "tools"
sys.path.insert(0, str(TOOLS))

from planner_clock import Reading, fit_clock  # noqa: E402

from dit_accel.costs.clock import AHEAD, STEADY, Clock  # noqa: E402
from dit_accel.costs.table import cost_table  # noqa: E402

OWN = Clock(busy=1500.0, free=1950.0, lag=10.0, settling=35.0, cycle=0.4, kflop=6e-4)
LIGHT, HEAVY = 20.0, 400.0


def test_calls_settle_where_their_power_is_the_limit() -> None:
    assert OWN.settled(LIGHT) == 1950.0, "1e3 / (0.4 + 0.012) is more than the GPU can"
    assert OWN.settled(HEAVY) == pytest.approx(1e3 / 0.64)
    for kflops in (LIGHT, HEAVY):
        assert OWN.at(kflops, 0.0) == OWN.at(kflops, 9.9) == 1500.0
        assert OWN.at(kflops, 1e4) == pytest.approx(OWN.settled(kflops))
    half = 10.0 + 35.0 * math.log(2)
    assert OWN.at(LIGHT, half) == pytest.approx((1500 + 1950) / 2)


@pytest.mark.parametrize("kflops", [LIGHT, HEAVY])
@pytest.mark.parametrize("short", [0.05, 0.8, 3.0, 7.0, 40.0])
def test_a_time_and_its_clock_agree(kflops: float, short: float) -> None:
    """short: milliseconds at the first clock."""
    cycles = short * 1500e3
    ms = OWN.ms(cycles, kflops * 1e3 * cycles)
    assert ms * OWN.at(kflops, AHEAD * ms) * 1e3 == pytest.approx(cycles, rel=1e-9)
    assert short * 1500 / OWN.settled(kflops) <= ms * (1 + 1e-12) <= short * (1 + 2e-12)
    if short * AHEAD < OWN.lag:
        assert ms == pytest.approx(short)


def test_without_readings_cycles_are_nanoseconds() -> None:
    assert fit_clock([]) == STEADY
    assert STEADY.ms(3e6, 5e12) == 3.0
    assert STEADY.ms(0.0, 0.0) == 0.0


def test_fits_find_the_clock() -> None:
    """From readings that jump by a percent, and a few by a fifth."""
    noise = np.random.default_rng(0)
    readings = []
    for ms in np.geomspace(0.5, 400, 40).tolist():
        for kflops in (30.0, 150.0, 250.0, 330.0, 400.0):
            off = noise.normal(1, 0.01) * (1.2 if noise.random() < 0.03 else 1.0)
            readings.append(Reading(OWN.at(kflops, ms) * off, ms, kflops))
    found = fit_clock(readings)
    assert (found.busy, found.free) == (
        pytest.approx(1500, rel=0.01),
        pytest.approx(1950, rel=0.01),
    )
    assert found.lag == pytest.approx(OWN.lag, abs=2.5)
    assert found.settling == pytest.approx(OWN.settling, rel=0.15)
    for kflops in (150.0, 300.0, 400.0):
        assert found.settled(kflops) == pytest.approx(OWN.settled(kflops), rel=0.015)
    again = fit_clock(readings[::-1])
    assert again.settling == pytest.approx(found.settling, rel=1e-4)


def test_shipped_clocks_make_sense() -> None:
    """An H200 at work runs at 1.4 to 1.7 GHz, never above 1,980 MHz; attention of head_dim 128
    keeps it near there, masks let it rise."""
    table = cost_table("h200")
    assert table is not None
    clock = table.clock
    assert 1400 < clock.busy < 1700 < clock.free <= 1980
    rows, tokens = 16, 65536
    flops = 4.0 * rows * 128 * tokens**2
    cycles = table.dense_ms(1, rows, tokens, 128) * 1630e3
    assert clock.settled(flops / cycles / 1e3) == pytest.approx(1630, rel=0.04)
    assert clock.settled(0.3 * flops / cycles / 1e3) == clock.free
