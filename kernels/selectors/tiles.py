"""Tiles whose blocks are chosen by their means: full, and as cubic as the grid allows.

A block of close tokens has keys that are alike, so its mean says more. Rows of a fixed density cost
the square of the slots beyond the tokens: both are weighed against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from dit_accel.kernels.geometry.tile_choice import LayoutKind, even_counts, power_boxes
from dit_accel.kernels.geometry.tiling import (
    BLOCK_SIZES,
    Tiling,
    Triple,
    even_tiling,
    fixed_tiling,
)

BLOCK = BLOCK_SIZES[-1]
# Slots over tokens beyond which blocks straddle tiles where they can.
WASTE = 1.15
# A latent frame is several frames of the video: tokens next to each other in time are less alike.
FRAME = 2


@lru_cache(maxsize=512)
def compact_tiling(grid: Triple, kind: LayoutKind) -> Tiling:
    """The grid in blocks of 128 slots: boxes of powers of two, else even tiles.

    Least is waste^2 x (mean edge of the tile / geometric mean), over the axes that are longer than
    1; a step in time counts as FRAME steps in space. Gathered blocks straddle tiles where tiles
    waste more than 15 %.
    """
    if kind == "boxes":
        return _best(fixed_tiling(grid, box) for box in power_boxes(grid, BLOCK))
    best = _best(even_tiling(grid, counts, BLOCK) for counts in even_counts(grid, BLOCK))
    fewest = -(-math.prod(grid) // BLOCK)
    if kind != "gather" or best.waste <= WASTE or best.blocks == fewest:
        return best
    tiles = (even_tiling(grid, counts, BLOCK) for counts in even_counts(grid, BLOCK))
    fullest = min(tiles, key=lambda tiling: (_spread(tiling) / math.prod(tiling.tile), tiling.tile))
    return Tiling(fullest.parts, BLOCK, straddles=True)


def _best(tilings: Iterable[Tiling]) -> Tiling:
    """Of equal ones that of the largest tile, then that whose tiles reach least far in time."""
    return min(
        tilings,
        key=lambda tiling: (
            round(tiling.waste**2 * _spread(tiling), 9), -math.prod(tiling.tile), tiling.tile
        ),
    )  # fmt: skip


def _spread(tiling: Tiling) -> float:
    """1 for a cubic tile, more for longer ones."""
    t, h, w = tiling.tile
    lengths = zip((FRAME * t, h, w), tiling.grid, strict=True)
    edges = [edge for edge, size in lengths if size > 1]
    return sum(edges) / len(edges) / math.prod(edges) ** (1 / len(edges)) if edges else 1.0
