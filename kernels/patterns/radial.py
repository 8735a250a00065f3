"""Radial attention: frames far away are seen through narrower bands, the farthest not all.

Frames i and j, d = |i - j|, S tokens a frame, positions a and b in them (raster order):
d <= 1: all pairs. d >= 2: with g = bit_length(d) and base = 2^bit_length(S) / 2^g, the pairs with
|a - b| <= max(128, decay base); where base < 128, only frames whose distance is a multiple of
128 / base. So the density halves with each doubling of d. `sink` shows the first frame to all.
Source: Radial Attention (arXiv 2506.19852). Its code then drops 128-token blocks that are hardly
covered; here every block that the rule touches is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.limits import runs_or_tiles
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.tiling import Tiling, Triple, fixed_tiling, raster_runs
from dit_accel.kernels.geometry.visibility import FrameBands, Relation
from dit_accel.kernels.patterns.base import EXACT_HELP, Rules

WIDTH = 128
LEVELS = range(2, 14)
# Of the token rule: width * PACK + split - 1 must fit an int32.
PACK = 4096
RUNS_HELP = (
    'Blocks of the video: "auto" cuts it in runs of 128 consecutive tokens, [t, h, w] in tiles of '
    "at most 128 tokens."
)


@dataclass(frozen=True)
class Radial(Rules):
    """Keeps bands that narrow with the distance of frames."""

    name: ClassVar[str] = "radial"

    decay: float = param(
        0.5,
        above=0,
        high=16,
        usual=(0.2, 0.95),
        help="Width of the bands over their base; the paper takes 0.2 (Wan 2.1) to 0.95 (Hunyuan).",
    )
    sink: bool = param(
        True, help="Whether all queries see the whole first frame, as the paper has it for Wan."
    )
    tile: Triple | str = tile_param(RUNS_HELP)
    exact: bool = param(False, help=EXACT_HELP)

    def levels(self, grid: Triple) -> list[tuple[int, int]]:
        """(width, split) of the frame distances from 2^(g - 1) on, for each g of LEVELS."""
        frame = grid[1] * grid[2]
        above = 1 << frame.bit_length()
        found = []
        for g in LEVELS:
            base = above / 2**g
            width = min(frame, math.floor(max(WIDTH, self.decay * base)))
            found.append((width, int(WIDTH / base) if base < WIDTH else 1))
        return found

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        levels = [width * PACK + min(split, PACK) - 1 for width, split in self.levels(grid)]
        return "radial", (grid[2], int(self.sink), *levels)

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Rules."""
        frame = np.arange(grid[0])
        apart = abs(frame[:, None] - frame)
        widths = np.where(apart <= 1, grid[1] * grid[2], -1)
        for g, (width, split) in zip(LEVELS, self.levels(grid), strict=True):
            level = (apart >= 2 ** (g - 1)) & (apart < 2**g) & (apart % split == 0)
            widths[level] = width
        if self.sink:
            widths[:, 0] = grid[1] * grid[2]
        return FrameBands(widths, grid[2])

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules. Not asked: the tiling is given or runs."""
        return np.ones((len(sizes), len(sizes)), bool)

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern: bands in raster order suit runs of raster tokens, if rows are long."""
        if isinstance(self.tile, str):
            return runs_or_tiles(raster_runs(grid))
        return fixed_tiling(grid, self.tile)
