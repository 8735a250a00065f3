"""Every block visible: equal to dense attention to rounding, through the sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.kernels.blocks import runs_tiling, video_plan
from dit_accel.kernels.patterns.base import LayoutKind, Pattern
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class Full(Pattern):
    """Keeps every pair of valid tokens; the video is cut in runs of consecutive tokens."""

    name: ClassVar[str] = "full"

    def build(
        self,
        layout: TokenLayout,
        device: torch.device | str,
        heads: int | None = None,
        *,
        block_efficiency: Mapping[int, float] | None = None,
        layout_kind: LayoutKind | None = None,
    ) -> BlockPlan:
        """See Pattern.build."""
        tiling = runs_tiling(layout)
        everything = torch.ones(tiling.tiles, tiling.tiles, dtype=torch.bool, device=device)
        return video_plan(layout, tiling, everything, device)
