"""Patterns: static rules that make a plan from a layout, by name.

A new pattern is a file here with a `Pattern` subclass, and its class in `PATTERNS`.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.kernels.compute import make
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns.attention_tile import AttentionTile
from dit_accel.kernels.patterns.bands import SpatialBand, TemporalBand
from dit_accel.kernels.patterns.base import PATTERNS, Pattern
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

PATTERNS.update(
    (cls.name, cls)
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
)


def pattern(name: str, /, **params: Any) -> Pattern:
    """The pattern `name` with these parameters.

    Raises DitAccelError for an unknown name or parameter, or a value that breaks a rule.
    """
    return make("pattern", PATTERNS, name, params)


def plan_for(
    layout: TokenLayout,
    pattern: Pattern,
    device: torch.device | str,
    heads: int | None = None,
    layout_kind: LayoutKind | None = None,
) -> BlockPlan:
    """A new plan of `pattern` for `layout` on `device`; whoever needs it again keeps it."""
    return pattern.build(layout, device, heads, layout_kind=layout_kind)
