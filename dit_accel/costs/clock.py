"""The clock that a GPU runs a call at: prices of a cost table are cycles, and this makes them time.

A GPU at work with matrix products runs at `busy` MHz, its power limit's clock for them. A call that
needs less power than they do speeds it up, not at once: the power is averaged over a while. Calls
of one kind, one behind the other, run at `busy` for the first `lag` milliseconds, then near the
clock that they settle at, with the time constant `settling`. That one keeps their own power at the
limit: a cycle takes `cycle` nanoseconds, and `kflop` more for each thousand floating-point
operations in it; but it is never above `free`, the clock without a limit.

So a short call runs at the products' clock, whatever it does, and a long one at its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AHEAD = 11.5
"""Calls of its kind that a call is predicted behind, as in samples/tools/measure_planner.py, where
8 go ahead and it is the middle one of 7. It matters for calls of 1 to 10 ms: others are at the
first clock, or have come to their own."""
TURNS = 12
"""A time and the clock for it are found in turn; the error shrinks to about an eighth each time."""


@dataclass(frozen=True)
class Clock:
    """Clocks in MHz, lag and settling in milliseconds, cycle and kflop in nanoseconds."""

    busy: float
    free: float
    lag: float
    settling: float
    cycle: float
    kflop: float

    def settled(self, kflops: float) -> float:
        """MHz that calls settle at, of so many thousand floating-point operations a cycle."""
        return min(self.free, 1e3 / (self.cycle + self.kflop * kflops))

    def at(self, kflops: float, ms: float) -> float:
        """MHz after so many milliseconds of such calls."""
        end = self.settled(kflops)
        return end + (self.busy - end) * math.exp(-max(0.0, ms - self.lag) / self.settling)

    def ms(self, cycles: float, flops: float) -> float:
        """Milliseconds of a call of so many cycles, behind AHEAD others of its kind."""
        if cycles <= 0:
            return 0.0
        spent = cycles / self.busy / 1e3
        for _ in range(TURNS):
            spent = cycles / self.at(flops / cycles / 1e3, AHEAD * spent) / 1e3
        return spent


STEADY = Clock(1000.0, 1000.0, 0.0, 1.0, 1.0, 0.0)
"""Where no clock was watched: cycles are nanoseconds."""
