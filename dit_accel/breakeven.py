"""Where a sparse call stops paying: below these sizes and above these densities dense is faster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BreakEven:
    """Bounds of one backend.

    Args:
        tokens: shortest sequence that a sparse call is worth its overhead for.
        density: highest launched density at which the backend beats dense attention.
    """

    tokens: int
    density: float


MEASURED = {
    "torch": BreakEven(tokens=1024, density=0.7),
    "triton": BreakEven(tokens=4096, density=0.5),
}


def pays(backend: str, tokens: int, density: float) -> bool:
    """Whether a call of `tokens` tokens at a launched density runs faster than dense."""
    bound = MEASURED.get(backend)
    return bound is None or (tokens >= bound.tokens and density <= bound.density)
