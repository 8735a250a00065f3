"""Every block visible: equal to dense attention to rounding, through the sparse kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.geometry.blocks import Member, Union
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.tiling import Tiling, Triple, raster_runs
from dit_accel.kernels.geometry.visibility import Whole
from dit_accel.kernels.patterns.base import Pattern
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class Full(Pattern):
    """Keeps every pair of valid tokens; the video is cut in runs of consecutive tokens."""

    name: ClassVar[str] = "full"
    everywhere: ClassVar[bool] = True

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern."""
        return raster_runs(grid)

    def members(self, layout: TokenLayout, kind: LayoutKind, shared: Tiling | None = None) -> Union:
        """See Pattern."""
        return (Member(Whole()),)
