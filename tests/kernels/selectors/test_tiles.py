"""The tiles that selectors choose by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_accel.kernels.selectors import selector
from dit_accel.kernels.selectors.lists import block_numbers
from dit_accel.kernels.selectors.tiles import compact_tiling
from dit_accel.layout import TokenLayout

GRIDS = [
    (21, 45, 80), (33, 45, 80), (13, 30, 45), (1, 64, 64), (21, 30, 52), (28, 30, 53),
    (1, 1, 1), (1, 3, 5), (3, 9, 9), (9, 12, 12), (1, 1, 300), (31, 17, 30),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["boxes", "gather", "lengths"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_128_slots(grid: tuple[int, int, int], kind: str) -> None:
    tiling = compact_tiling(grid, kind)  # type: ignore[arg-type]
    assert tiling.grid == grid and tiling.block == 128
    assert math.prod(tiling.tile) <= 128
    assert (tiling.box is not None) == (kind == "boxes")
    if kind == "gather":
        assert tiling.waste <= 1.15 or tiling.blocks == -(-math.prod(grid) // 128)
    assert tiling.straddles <= (kind == "gather")


def test_tiles_are_compact() -> None:
    """Full and nearly cubic, a step in time counting twice."""
    assert compact_tiling((21, 45, 80), "boxes").tile == (2, 8, 8)
    assert compact_tiling((21, 45, 80), "gather").tile == (3, 5, 8)
    assert compact_tiling((33, 45, 80), "gather").tile == (3, 5, 8)
    assert compact_tiling((1, 64, 64), "gather").tile == (1, 8, 16)


def test_a_tile_that_is_given() -> None:
    layout = TokenLayout((21, 45, 80))
    tiling = selector("block_topk", tile=[4, 4, 4]).tiling(layout, "gather")
    assert tiling.tile == (4, 4, 4) and tiling.block == 64


@pytest.mark.parametrize("grid", GRIDS[4:], ids=str)
def test_numbers_of_blocks(grid: tuple[int, int, int]) -> None:
    for kind in ("boxes", "gather"):
        tiling = compact_tiling(grid, kind)  # type: ignore[arg-type]
        counts = np.bincount(block_numbers(tiling).ravel())
        assert tuple(counts.tolist()) == tiling.lengths
