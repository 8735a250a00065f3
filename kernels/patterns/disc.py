"""CLEAR's disc: keys within a circle of the picture, in frames nearby.

Key (t', y', x') is seen by query (t, y, x) if (y - y')^2 + (x - x')^2 < r^2 (strictly) and
|t - t'| <= frame_window // 2. Both are cut off at the borders, not moved inward.
Source: CLEAR (arXiv 2412.16112), for images; the window over frames is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tiling import Tiling, Triple, parse_tile
from dit_accel.kernels.geometry.visibility import Disc as DiscRelation
from dit_accel.kernels.geometry.visibility import Relation
from dit_accel.kernels.geometry.windows import WHOLE, Window
from dit_accel.kernels.patterns.base import Rules, check_flag, parts_see


@dataclass(frozen=True)
class Disc(Rules):
    """Keeps a disc around each query.

    radius: {"tokens": r}, {"fraction": f} of the longer of height and width, or {"tiles": n} of the
        longer edge of a tile.
    frame_window: over frames, {"tokens" | "fraction" | "tiles": n}; -1 or a fraction of 1 is all.
    tile: "auto" or [t, h, w], as for sliding_tile. exact: mask tokens in partial blocks.
    """

    name: ClassVar[str] = "disc"

    radius: Any = field(default_factory=lambda: {"tokens": 16})
    frame_window: Any = field(default_factory=lambda: {"tokens": WHOLE})
    tile: Any = "auto"
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", Window.parse(self.radius, "radius", 1))
        object.__setattr__(self, "frame_window", Window.parse(self.frame_window, "frame_window", 1))
        object.__setattr__(self, "tile", parse_tile(self.tile))
        check_flag("exact", self.exact)

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
