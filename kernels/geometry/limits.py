"""How many blocks a plan may have: lists are made by looking at all pairs of them."""

from __future__ import annotations

import itertools
import math

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.tiling import BLOCK_SIZES, Tiling, Triple, fixed_tiling

MAX_BOXES = 4608
"""Boxes that are compared with each other, the blocks' own or their parts: with every block visited
they take about two seconds and a gigabyte."""


def affordable(tiling: Tiling) -> bool:
    """Whether a plan may be cut so where all parts of blocks are compared."""
    return tiling.blocks * tiling.segments <= MAX_BOXES


def check_blocks(tiling: Tiling) -> None:
    """DitAccelError, with the nearest tile that will do, where a plan may not be cut so."""
    if tiling.blocks <= MAX_BOXES:
        return
    grid, tile = tiling.grid, tiling.tile
    raise DitAccelError(
        f"tile: expected at most {MAX_BOXES:,} blocks, and {list(tile)} cuts the grid "
        f"{'x'.join(map(str, grid))} into {tiling.blocks:,}; the nearest legal tile is "
        f"{list(nearest_tile(grid, tile))}."
    )


def nearest_tile(grid: Triple, tile: Triple) -> Triple:
    """The smallest tile of powers of two times the edges of `tile` that makes few enough blocks,
    the most cubic of these; else the one of powers of two that makes the fewest."""
    powers = [1 << n for n in range(BLOCK_SIZES[-1].bit_length())]
    scaled, plain = (
        [
            each
            for a, b, c in itertools.product(powers, repeat=3)
            if math.prod(each := (a * start[0], b * start[1], c * start[2])) <= BLOCK_SIZES[-1]
        ]
        for start in (tile, (1, 1, 1))
    )
    able = [each for each in scaled if affordable(fixed_tiling(grid, each))]
    if able:
        return min(able, key=lambda each: (math.prod(each), max(each) / min(each)))
    return min(plain, key=lambda each: (fixed_tiling(grid, each).tiles, max(each) / min(each)))


def runs_or_tiles(runs: Tiling) -> Tiling:
    """Runs of tokens; where rows are so short that these touch too many of them, tiles."""
    return runs if affordable(runs) else fixed_tiling(runs.grid, nearest_tile(runs.grid, (1, 1, 1)))
