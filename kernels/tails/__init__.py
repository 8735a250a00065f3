"""Tails: what stands for the keys that no visit of a plan touches, by name.

A new tail is a file here with a `Tail` subclass, and its class in `TAILS`.
"""

from __future__ import annotations

from typing import Any

from dit_accel.kernels.compute import make
from dit_accel.kernels.tails.base import Drop, Tail
from dit_accel.kernels.tails.linear import Linear
from dit_accel.kernels.tails.pooled import Pooled

TAILS: dict[str, type[Tail]] = {cls.name: cls for cls in (Drop, Pooled, Linear)}

__all__ = ["TAILS", "Drop", "Linear", "Pooled", "Tail", "tail"]


def tail(kind: str, /, **params: Any) -> Tail:
    """The tail `kind` with these parameters.

    Raises DitAccelError for an unknown name or parameter, or a value that is not legal.
    """
    return make("tail", TAILS, kind, params)
