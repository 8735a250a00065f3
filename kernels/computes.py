"""All that a rule of a profile can name as its compute, beside "dense"."""

from __future__ import annotations

from typing import Any

from dit_accel.kernels.compute import Compute, from_table, make
from dit_accel.kernels.patterns import PATTERNS
from dit_accel.kernels.selectors import SELECTORS

COMPUTES: dict[str, type[Compute]] = {**PATTERNS, **SELECTORS}


def compute(name: str, /, **params: Any) -> Compute:
    """The compute `name` with these parameters.

    Raises DitAccelError for an unknown name or parameter, or a value that is not legal.
    """
    return make("compute", COMPUTES, name, params)


def parse_compute(value: object, where: str) -> Compute:
    """A compute from itself, a table {compute = name, ...} or its bare name; see `from_table`."""
    return value if isinstance(value, Compute) else from_table(value, where, compute)
