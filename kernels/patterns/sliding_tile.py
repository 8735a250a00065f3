"""Sliding tile attention: each tile of queries sees a box of whole tiles around it.

With n tiles on an axis and an odd window of k tiles, query tile q looks from the centre
c = clamp(q, k // 2, n - 1 - k // 2) and sees the tiles with |c - tile| <= k // 2: exactly k of
them, moved inward at the borders. Whole tiles only, so no block needs a token mask.
Source: Sliding Tile Attention (arXiv 2502.04507). Unlike there, grids need not divide by the tile,
tiles are at most 128 tokens, and an even k is rounded up to odd (see `tiling.Window`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.blocks import video_plan
from dit_accel.kernels.patterns.base import LayoutKind, Pattern, kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.tiling import (
    BLOCK_EFFICIENCY,
    Tiling,
    Window,
    choose_tiling,
    fixed_tiling,
    parse_tile,
    visible_range,
)
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class SlidingTile(Pattern):
    """Keeps a box of tiles around each query tile.

    window: {"tiles" | "tokens" | "fraction": [t, h, w]}, the width of the box along each axis.
    tile: "auto" chooses the tile for each grid and window; [t, h, w] (at most 128 tokens) is taken
        as it is, clipped at the far edges.
    """

    name: ClassVar[str] = "sliding_tile"

    window: Any = field(default_factory=lambda: {"tiles": [3, 3, 3]})
    tile: Any = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Window.parse(self.window))
        object.__setattr__(self, "tile", parse_tile(self.tile))

    def tiling(
        self,
        layout: TokenLayout,
        device: torch.device | str,
        block_efficiency: Mapping[int, float] | None = None,
        layout_kind: LayoutKind | None = None,
    ) -> Tiling:
        """How the grid is cut for this window on that kind of device."""
        if self.tile != "auto":
            return fixed_tiling(layout.grid, self.tile)
        speed = tuple((block_efficiency or BLOCK_EFFICIENCY).items())
        kind = layout_kind or kind_for(device)
        return choose_tiling(
            layout.grid,
            self.window,
            padded=kind != "lengths",
            others=layout.before + layout.after,
            efficiency=speed,
            boxes=kind == "boxes",
        )

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
        tiling = self.tiling(layout, device, block_efficiency, layout_kind)
        t, h, w = (self._visible(axis, layout, tiling, device) for axis in range(3))
        # [T, 1, 1, T', 1, 1] & [1, H, 1, 1, H', 1] & [1, 1, W, 1, 1, W']
        pairs = (
            t[:, None, None, :, None, None]
            & h[None, :, None, None, :, None]
            & w[None, None, :, None, None, :]
        )
        return video_plan(layout, tiling, pairs.view(tiling.tiles, tiling.tiles), device)

    def _visible(
        self, axis: int, layout: TokenLayout, tiling: Tiling, device: torch.device | str
    ) -> Tensor:
        parts = tiling.counts[axis]
        window = self.window.tiles(axis, layout.grid[axis], parts)
        ranges = [visible_range(tile, window, parts) for tile in range(parts)]
        first, stop = torch.tensor(ranges, device=device).unsqueeze(-1).unbind(1)
        tiles = torch.arange(parts, device=device)
        return (first <= tiles) & (tiles < stop)
