"""The clock of a GPU from readings of it: the one that tells them best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import torch

from dit_accel.costs.clock import STEADY, Clock

TELLING = 0.02
"""Relative error of a clock up to which it counts in full in a fit: single readings jump."""


@dataclass(frozen=True)
class Reading:
    """MHz of a GPU after `ms` milliseconds of calls of `kflops` thousand operations a cycle."""

    mhz: float
    ms: float
    kflops: float


def fit_clock(readings: Sequence[Reading]) -> Clock:
    """The clock that tells readings best; STEADY without any."""
    if not readings:
        return STEADY
    mhz, ms, kflops = torch.tensor([astuple(reading) for reading in readings]).double().T
    highest = mhz.max()
    # In units in which each unknown is about 1, so that steps in all of them are alike.
    units = torch.tensor(
        [mhz.min(), highest, 10.0, 30.0, 1e3 / highest, 1e2 / highest / kflops.max()]
    ).double()
    unknown = torch.ones(len(fields(Clock)), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [unknown], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        busy, free, lag, settling, cycle, kflop = unknown * units
        free = torch.minimum(free, highest)  # nothing else would bound it from above
        end = torch.minimum(free, 1e3 / (cycle + kflop * kflops))
        told = end + (busy - end) * torch.exp(-(ms - lag).clamp_min(0) / settling)
        far = (told / mhz - 1) / TELLING
        return ((1 + far**2).sqrt() - 1).mean()

    def step() -> torch.Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(step)
    found = Clock(*(unknown.detach() * units).tolist())
    return replace(found, free=min(found.free, highest.item()))
