"""Selectors: online rules that make a plan from q and k, by name.

A new selector is a file here with a `Selector` subclass, and its class in `SELECTORS`.
"""

from __future__ import annotations

from typing import Any

from dit_accel.kernels.compute import make
from dit_accel.kernels.selectors.base import Context, Selector
from dit_accel.kernels.selectors.block_topk import BlockTopK
from dit_accel.kernels.selectors.block_topp import BlockTopP
from dit_accel.kernels.selectors.probe import ProbeError, ProbeSelector

SELECTORS: dict[str, type[Selector]] = {
    cls.name: cls for cls in (BlockTopK, BlockTopP, ProbeSelector, ProbeError)
}

__all__ = ["SELECTORS", "Context", "Selector", "selector"]


def selector(name: str, /, **params: Any) -> Selector:
    """The selector `name` with these parameters.

    Raises DitAccelError for an unknown name or parameter, or a value that is not legal.
    """
    return make("selector", SELECTORS, name, params)
