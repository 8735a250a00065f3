"""Power-strided attention: tiles near, and tiles a power of two away along one axis.

Tiles i and j with offsets (dt, dh, dw) see each other if every offset is local (|d| <= half of the
window) but at most one, whose size is a power of two. So density grows with log n / n, and after l
layers a token reaches about 2^l places. All queries also see the first `sink` tiles along t.
Source: PowerAttention (arXiv 2503.03588), a causal rule over blocks of text; this is its form over
tiles of a video, both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tiling import Tiling, Triple
from dit_accel.kernels.geometry.visibility import AnyOf, Relation, Separable
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns.base import Rules, axis_relation, window_param
from dit_accel.kernels.patterns.sliding_tile import part_sizes


@dataclass(frozen=True)
class PowerStrided(Rules):
    """Keeps local tiles, and tiles a power of two away along one axis."""

    name: ClassVar[str] = "power_strided"

    window: Window = window_param(
        {"tiles": [3, 3, 3]},
        "Width of what is local along each axis; -1 or a fraction of 1 is the whole axis.",
    )
    sink: int = param(
        0, low=0, unit="tiles", help="How many of the first tiles along t all queries see."
    )
    tile: Triple | str = tile_param()
    exact: bool = param(False, help="Whether tokens are masked where blocks straddle tiles.")

    @property
    def per_tile(self) -> bool:
        """See Rules."""
        return self.window.unit == "tiles"

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        params: list[int] = []
        for axis, sizes in enumerate(tiling.parts):
            params += [*part_sizes(sizes), self._half(grid, axis, len(sizes))]
        return "power_strided", (*params, self.sink)

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Rules: far along one axis and local on the others, for each axis; and the sink."""
        rule = self.token_rule(grid, tiling)[0], (*self.token_rule(grid, tiling)[1][:-1], 0)
        local, far = [], []
        for axis, sizes in enumerate(tiling.parts):
            tile = np.repeat(np.arange(len(sizes)), sizes)
            half = self._half(grid, axis, len(sizes))
            local.append(abs(tile[:, None] - tile) <= half)
            far.append(axis_relation(rule, grid, axis))
        found: list[Relation] = [
            Separable({a: far[a] if a == away else local[a] for a in range(3)}) for away in range(3)
        ]
        if self.sink:
            first = np.repeat(np.arange(tiling.counts[0]), tiling.parts[0]) < self.sink
            found.append(Separable({0: np.broadcast_to(first, (grid[0], grid[0]))}))
        return AnyOf(tuple(found))

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules: the local tiles, of which the far ones are a few times as many."""
        tiles = np.arange(len(sizes))
        return abs(tiles[:, None] - tiles) <= self._half(grid, axis, len(sizes))

    def _half(self, grid: Triple, axis: int, parts: int) -> int:
        return self.window.tiles_aside(axis, grid[axis], parts)
