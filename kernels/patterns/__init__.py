"""Patterns: static rules that make a plan from a layout, by name.

A new pattern is a file here with a `Pattern` subclass, and its class in `PATTERNS`.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from dit_accel.errors import unknown
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns.attention_tile import AttentionTile
from dit_accel.kernels.patterns.bands import SpatialBand, TemporalBand
from dit_accel.kernels.patterns.base import Pattern, kind_for
from dit_accel.kernels.patterns.composite import Union
from dit_accel.kernels.patterns.disc import Disc
from dit_accel.kernels.patterns.full import Full
from dit_accel.kernels.patterns.inward_window import InwardWindow
from dit_accel.kernels.patterns.neighborhood import Neighborhood
from dit_accel.kernels.patterns.power_strided import PowerStrided
from dit_accel.kernels.patterns.radial import Radial
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls
    for cls in (
        Full,
        SlidingTile,
        Neighborhood,
        AttentionTile,
        Radial,
        Disc,
        InwardWindow,
        PowerStrided,
        SpatialBand,
        TemporalBand,
        Union,
    )
}


def pattern(name: str, /, **params: Any) -> Pattern:
    """The pattern `name` with these parameters.

    Raises DitAccelError for an unknown name or parameter, or a value that breaks a rule.
    """
    if name not in PATTERNS:
        raise unknown("pattern", name, PATTERNS)
    known = [field.name for field in fields(PATTERNS[name])]
    for key in params:
        if key not in known:
            raise unknown(f"parameter of {name}", key, known)
    return PATTERNS[name](**params)


def plan_for(
    layout: TokenLayout,
    pattern: Pattern,
    device: torch.device | str,
    heads: int | None = None,
    layout_kind: LayoutKind | None = None,
) -> BlockPlan:
    """The plan of `pattern` for `layout` on `device`, made once and kept (the last 128 plans)."""
    kind = layout_kind or kind_for(device)
    return _cached_plan(
        layout, pattern, torch.device(device), heads if pattern.by_head else None, kind
    )


@lru_cache(maxsize=128)
def _cached_plan(
    layout: TokenLayout,
    pattern: Pattern,
    device: torch.device,
    heads: int | None,
    layout_kind: LayoutKind,
) -> BlockPlan:
    return pattern.build(layout, device, heads, layout_kind=layout_kind)
