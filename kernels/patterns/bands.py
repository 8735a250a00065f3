"""Sparse VideoGen's two kinds of heads: a band over frames, or over time at each place.

spatial_band: |i - j| <= width for places i, j in frame-major order (raster). temporal_band: the
same in token-major order, where all frames of a place stand together. With `sink` all queries see
the first S keys of that order, S being the tokens of a frame: the first frame in a spatial band,
the first S / T places in a temporal one.
A density d means width = L (1 - sqrt(1 - d)) for L video tokens, so that the bare band's area is d,
rounded up to whole blocks of 128.
Source: Sparse VideoGen (arXiv 2502.01776) and its code for Wan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tile_choice import LayoutKind, Speed
from dit_accel.kernels.geometry.tiling import (
    BLOCK_SIZES,
    Tiling,
    Triple,
    column_runs,
    parse_tile,
    raster_runs,
)
from dit_accel.kernels.geometry.visibility import Band, Relation
from dit_accel.kernels.geometry.windows import WHOLE, Window
from dit_accel.kernels.patterns.base import Rules, check_flag, parts_see

BLOCK = BLOCK_SIZES[-1]
DENSITY = 0.3


@dataclass(frozen=True)
class _Bands(Rules):
    """Parameters of both bands.

    density: share of the video's pairs that the bare band keeps, in (0, 1); 0.3 unless `reach` is
        given.
    reach: instead of it, the band's width to either side: {"tokens": n}, {"fraction": f} of the
        video's tokens, or {"tiles": n} blocks of 128.
    sink: all queries see the first keys, as many as a frame has.
    tile: "auto" cuts the video in runs of 128 tokens in the band's order where the backend can read
        them; [t, h, w] as for sliding_tile. exact: mask tokens in partial blocks.
    """

    order: ClassVar[Triple]

    density: Any = None
    reach: Any = None
    sink: bool = True
    tile: Any = "auto"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.reach is not None:
            if self.density is not None:
                raise DitAccelError("reach, density: expected one of them, got both.")
            object.__setattr__(self, "reach", Window.parse(self.reach, "reach", 1))
        elif self.density is None:
            object.__setattr__(self, "density", DENSITY)
        if self.density is not None:
            number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
            if not number or not 0 < self.density < 1:
                raise DitAccelError(
                    f"density: expected a number between 0 and 1, got {self.density!r}; "
                    f"a legal value is {DENSITY}."
                )
        object.__setattr__(self, "tile", parse_tile(self.tile))
        check_flag("sink", self.sink)
        check_flag("exact", self.exact)

    def band(self, grid: Triple) -> Band:
        """The band over a grid: its order, its width in tokens and its sink."""
        tokens = math.prod(grid)
        if self.reach is None:
            width = tokens * (1 - math.sqrt(1 - self.density))
            width = math.ceil(width / BLOCK - 1e-9) * BLOCK
        elif self.reach.values[0] == WHOLE:
            width = tokens
        else:
            width = self.reach.tokens(0, tokens, BLOCK)
        return Band(grid, self.order, width, grid[1] * grid[2] if self.sink else 0)

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        band = self.band(grid)
        return "band", (*band.strides, band.width, band.sink)

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Rules."""
        return self.band(grid)

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules: how far the band reaches along this axis alone, all of it where it wraps."""
        band = self.band(grid)
        outer = [a for a in self.order[: self.order.index(axis)] if grid[a] > 1]
        reach = band.width // band.strides[axis] + 1
        if outer and band.width >= band.strides[outer[-1]] // 2:
            reach = grid[axis]
        place = np.arange(grid[axis])
        return parts_see(abs(place[:, None] - place) <= reach, sizes)


@dataclass(frozen=True)
class SpatialBand(_Bands):
    """Keeps a band in raster order: whole frames around the query's."""

    name: ClassVar[str] = "spatial_band"
    order: ClassVar[Triple] = (0, 1, 2)

    def choose(self, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
        """See Pattern."""
        if self.tile == "auto":
            return raster_runs(grid)
        return super().choose(grid, kind, others, speed)


@dataclass(frozen=True)
class TemporalBand(_Bands):
    """Keeps a band in token-major order: all frames at the query's place and near it."""

    name: ClassVar[str] = "temporal_band"
    order: ClassVar[Triple] = (1, 2, 0)

    def choose(self, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
        """See Pattern."""
        if self.tile == "auto" and kind != "boxes":
            return column_runs(grid)
        return super().choose(grid, kind, others, speed)
