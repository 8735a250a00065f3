"""CLEAR's disc: keys within a circle of the picture, in frames nearby.

Key (t', y', x') is seen by query (t, y, x) if (y - y')^2 + (x - x')^2 < r^2 (strictly) and
|t - t'| <= frame_window // 2. Both are cut off at the borders, not moved inward.
Source: CLEAR (arXiv 2412.16112), for images; the window over frames is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tiling import Tiling, Triple
from dit_accel.kernels.geometry.visibility import DiscRelation, Relation
from dit_accel.kernels.geometry.windows import WHOLE, Window
from dit_accel.kernels.patterns.base import EXACT_HELP, Rules, parts_see, window_param


@dataclass(frozen=True)
class Disc(Rules):
    """Keeps a disc around each query."""

    name: ClassVar[str] = "disc"

    radius: Window = window_param(
        {"tokens": 16},
        "Radius of the disc; a fraction is of the longer of height and width, tiles are of the "
        "longer edge of a tile.",
        axes=1,
    )
    frame_window: Window = window_param(
        {"tokens": WHOLE},
        "Width of the window over frames; -1 or a fraction of 1 is all of them.",
        axes=1,
    )
    tile: Triple | str = tile_param()
    exact: bool = param(False, help=EXACT_HELP)

    @property
    def per_tile(self) -> bool:
        """See Rules."""
        return self.radius.unit == "tiles"

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        edge = max(tiling.tile[1:])
        return "disc", (self._limit(grid, edge), self._half(grid, tiling.tile[0]))

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Rules."""
        limit, half = self.token_rule(grid, tiling)[1]
        return DiscRelation(_near(grid[0], half), limit)

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules: the square around the disc."""
        if axis == 0:
            half = self._half(grid, max(sizes))
        else:
            half = math.isqrt(self._limit(grid, max(sizes)) - 1)
        return parts_see(_near(grid[axis], half), sizes)

    def _limit(self, grid: Triple, edge: int) -> int:
        """Squared distances below this are seen."""
        longer = max(grid[1:])
        all_of_it = 2 * longer**2  # more would be no more, and overflow 32 bits
        value = self.radius.values[0]
        radius = {"tokens": value, "tiles": value * edge, "fraction": value * longer}
        if value == WHOLE or radius[self.radius.unit] > 2 * longer:
            return all_of_it
        return min(all_of_it, max(1, math.ceil(radius[self.radius.unit] ** 2 - 1e-6)))

    def _half(self, grid: Triple, edge: int) -> int:
        return self.frame_window.tokens_aside(0, grid[0], edge)


def _near(length: int, half: int) -> np.ndarray:
    place = np.arange(length)
    return abs(place[:, None] - place) <= half
