"""Sliding tile attention: each tile of queries sees a box of whole tiles around it.

With n tiles on an axis and an odd window of k tiles, query tile q looks from the centre
c = clamp(q, k // 2, n - 1 - k // 2) and sees the tiles with |c - tile| <= k // 2: exactly k of
them, moved inward at the borders. Whole tiles only, so no block needs a token mask, unless blocks
straddle the tiles.
Source: Sliding Tile Attention (arXiv 2502.04507). Unlike there, grids need not divide by the tile,
tiles are at most 128 tokens, and an even k is rounded up to odd (see `windows.Window`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tiling import Tiling, Triple
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns.base import AxisRules, window_param


@dataclass(frozen=True)
class SlidingTile(AxisRules):
    """Keeps a box of tiles around each query tile."""

    name: ClassVar[str] = "sliding_tile"

    window: Window = window_param(
        {"tiles": [3, 3, 3]},
        "Width of the box of tiles along each axis; -1 or a fraction of 1 is the whole axis.",
    )
    tile: Triple | str = tile_param()
    exact: bool = param(
        False,
        help="Whether blocks that straddle tiles mask the tokens of tiles that the query's tile "
        "does not see.",
    )

    @property
    def per_tile(self) -> bool:
        """See Rules."""
        return self.window.unit == "tiles"

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        params: list[int] = []
        for axis, sizes in enumerate(tiling.parts):
            params += [*part_sizes(sizes), len(sizes)]
            params.append(self.window.tiles(axis, grid[axis], len(sizes)))
        return "sliding_tile", tuple(params)

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules."""
        parts = len(sizes)
        return tiles_see(parts, self.window.tiles(axis, grid[axis], parts))

    def reaches(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> bool:
        """Every query, away from the border, sees half of the asked half-width to either side.

        A window of one tile would see nothing past a tile's edge.
        """
        length, parts = grid[axis], len(sizes)
        seen = self.window.tiles(axis, length, parts)
        side = seen // 2 * (length / parts)
        return self.per_tile or seen == parts or side >= (self.window.tokens(axis, length) - 1) / 4


def part_sizes(sizes: tuple[int, ...]) -> tuple[int, int]:
    """(size, longer): the first `longer` parts are size + 1 long, the others size.

    Holds for even splits, and for clipped ones, whose last part is the short one.
    """
    if all(size == sizes[0] for size in sizes[:-1]):
        return sizes[0], 0
    return sizes[-1], sizes.count(sizes[0])


def tiles_see(parts: int, window: int) -> np.ndarray:
    """bool [n, n]: the tiles that each tile sees, exactly `window` of them (odd, or at least n)."""
    tiles = np.arange(parts)
    if window >= parts:
        return np.ones((parts, parts), bool)
    half = window // 2
    centre = tiles.clip(half, parts - 1 - half)
    return abs(centre[:, None] - tiles) <= half
