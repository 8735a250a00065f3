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
from typing import ClassVar

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.tiling import (
    BLOCK_SIZES,
    Tiling,
    Triple,
    column_runs,
    raster_runs,
)
from dit_accel.kernels.geometry.visibility import Band, Relation
from dit_accel.kernels.geometry.windows import WHOLE, Window
from dit_accel.kernels.patterns.base import EXACT_HELP, Rules, parts_see, window_param

BLOCK = BLOCK_SIZES[-1]
DENSITY = 0.3
RUNS_HELP = (
    'Blocks of the video: "auto" cuts it in runs of 128 tokens in the band\'s order where the '
    "backend can read them, [t, h, w] in tiles of at most 128 tokens."
)


@dataclass(frozen=True)
class _Bands(Rules):
    """Parameters of both bands."""

    order: ClassVar[Triple]

    density: float | None = param(
        None,
        kind=float,
        above=0,
        below=1,
        help="Share of the video's pairs that the bare band keeps; without it and reach, "
        f"{DENSITY}.",
    )
    reach: Window | None = window_param(
        None,
        "Instead of density, the band's width to either side; a fraction is of the video's tokens, "
        "tiles are blocks of 128.",
        axes=1,
    )
    sink: bool = param(
        True, help="Whether all queries see the first keys of the band's order, a frame's worth."
    )
    tile: Triple | str = tile_param(RUNS_HELP)
    exact: bool = param(False, help=EXACT_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach is not None and self.density is not None:
            raise DitAccelError("reach, density: expected one of them, got both.")
        if self.reach is None and self.density is None:
            object.__setattr__(self, "density", DENSITY)

    def band(self, grid: Triple) -> Band:
        """The band over a grid: its order, its width in tokens and its sink."""
        tokens = math.prod(grid)
        if self.reach is None:
            assert self.density is not None
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

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern."""
        if self.tile == "auto":
            return raster_runs(grid)
        return super().choose(grid, kind, others)


@dataclass(frozen=True)
class TemporalBand(_Bands):
    """Keeps a band in token-major order: all frames at the query's place and near it."""

    name: ClassVar[str] = "temporal_band"
    order: ClassVar[Triple] = (1, 2, 0)

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern."""
        if self.tile == "auto" and kind != "boxes":
            return column_runs(grid)
        return super().choose(grid, kind, others)
