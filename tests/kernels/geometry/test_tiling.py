"""Tiles and windows: splits, legal values, and what the chooser minimises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.blocks import Member, build_plan
from dit_accel.kernels.geometry.tile_choice import choose_tiling
from dit_accel.kernels.geometry.tiling import (
    Tiling,
    Triple,
    clipped_split,
    even_split,
    fixed_tiling,
    parse_tile,
)
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.patterns.neighborhood import Neighborhood
from dit_accel.kernels.patterns.sliding_tile import SlidingTile, tiles_see
from dit_accel.layout import TokenLayout

FRACTIONS = [[1.0, 0.5, 0.5], [0.6, 0.5, 0.5], [0.6, 0.35, 0.35]]
GRIDS = [(9, 24, 24), (9, 32, 32), (21, 45, 80), (21, 30, 52), (13, 30, 45), (1, 64, 64)]


@pytest.mark.parametrize("length", [1, 2, 7, 45, 128, 129])
def test_splits_cover_the_axis(length: int) -> None:
    for parts in range(1, length + 1):
        sizes = even_split(length, parts)
        assert (len(sizes), sum(sizes)) == (parts, length) and max(sizes) - min(sizes) <= 1
        clipped = clipped_split(length, parts)
        assert sum(clipped) == length and set(clipped[:-1]) <= {parts} and clipped[-1] <= parts


@pytest.mark.parametrize(
    ("window", "n", "expected"),
    [
        ({"tiles": [1, 1, 1]}, 6, 1),
        ({"tiles": [2, 1, 1]}, 6, 3),
        ({"tiles": [3, 1, 1]}, 6, 3),
        ({"tiles": [5, 1, 1]}, 6, 5),
        ({"tiles": [6, 1, 1]}, 6, 6),
        ({"tiles": [9, 1, 1]}, 6, 6),
        ({"tiles": [4, 1, 1]}, 5, 5),
        ({"tokens": [1, 1, 1]}, 6, 1),
        ({"tokens": [4, 1, 1]}, 6, 1),
        ({"tokens": [5, 1, 1]}, 6, 3),
        ({"tokens": [99, 1, 1]}, 6, 6),
        ({"fraction": [0.5, 1, 1]}, 6, 3),
        ({"fraction": [0.51, 1, 1]}, 6, 5),
        ({"fraction": [1.0, 1, 1]}, 6, 6),
    ],
)
def test_windows_are_odd_or_whole(window: dict, n: int, expected: int) -> None:
    assert Window.parse(window).tiles(0, 24, n) == expected


def test_visible_ranges_follow_the_paper() -> None:
    for n, k in itertools.product(range(1, 10), range(1, 10)):
        if k % 2 == 0 and k < n:
            continue
        for query in range(n):
            centre = max(k // 2, min(query, n - 1 - k // 2))
            tiles = [t for t in range(n) if k >= n or abs(centre - t) <= k // 2]
            assert tiles_see(n, k)[query].nonzero()[0].tolist() == tiles
            assert len(tiles) == min(k, n)


@pytest.mark.parametrize("kind", ["lengths", "gather", "boxes"])
@pytest.mark.parametrize("grid", [*GRIDS, (7, 11, 13), (1, 1, 9), (33, 45, 80)])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_chosen_tiles_fit_and_cover(
    grid: tuple[int, int, int], fraction: list[float], kind: str
) -> None:
    window = Window.parse({"fraction": fraction})
    tiling = choose_tiling(grid, SlidingTile(window), kind=kind)
    assert tuple(sum(axis) for axis in tiling.parts) == grid
    assert math.prod(tiling.tile) <= tiling.block <= 128
    assert (tiling.box is not None) == (kind == "boxes")
    for axis in range(3):
        parts = tiling.counts[axis]
        seen = window.tiles(axis, grid[axis], parts)
        assert seen >= fraction[axis] * parts - 1e-6
        assert seen == parts or seen >= 3
    if kind == "lengths" and math.prod(grid) >= 128:
        assert math.prod(grid) / tiling.tiles >= 32


WINDOWS = [*({"fraction": f} for f in FRACTIONS), {"tiles": [3, 3, 3]}, {"tokens": [9, 16, 24]}]


@pytest.mark.parametrize("grid", [(7, 11, 13), (5, 17, 19), (23, 29, 31), (3, 7, 9), (9, 24, 24)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_other_grids_waste_little_or_straddle(grid: Triple, window: dict) -> None:
    tiling = SlidingTile(window).tiling(TokenLayout(grid), "gather")
    assert tiling.straddles or tiling.waste <= 1.15
    assert tiling.blocks == -(-math.prod(grid) // 128) or not tiling.straddles


def launched(rule: SlidingTile, tiling: Tiling, grid: Triple) -> float:
    """Launched slots over a tiling, by the plan; those of a 64 block cost a third more."""
    layout = TokenLayout(grid)
    plan = build_plan(layout, tiling, [(Member(rule.relation(grid, tiling)),)], "cpu")
    return plan.launched_density("triton") / {64: 0.75, 128: 1.0}[plan.shape.block_q]


@pytest.mark.parametrize("grid", [*GRIDS, (7, 11, 13)])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_gpu_choice_beats_the_usual_tiles(grid: Triple, fraction: list[float]) -> None:
    """Tiles that waste as little and see as far do not cost less, beyond what counts as a tie."""
    rule = SlidingTile({"fraction": fraction})
    chosen = launched(rule, rule.tiling(TokenLayout(grid), "gather"), grid)
    for tile in [(2, 8, 8), (3, 5, 8), (1, 8, 16), (3, 4, 4), (3, 6, 6), (4, 4, 4)]:
        usual = fixed_tiling(grid, tile)
        reach = all(rule.reaches(grid, axis, sizes) for axis, sizes in enumerate(usual.parts))
        if reach and usual.waste <= 1.08:
            assert chosen <= launched(rule, usual, grid) * 1.09


@pytest.mark.parametrize("dilation", [(1, 5, 8), (1, 1, 5), (3, 3, 4)])
def test_dilated_windows_launch_little_more_than_they_keep(dilation: Triple) -> None:
    """Tiles hold tokens of one dilation group: else every block sees all groups."""
    grid = (21, 45, 80)
    window = {"tokens": [7, 9, 10]}
    rule = Neighborhood(window, dilation=dilation)
    tiling = rule.tiling(TokenLayout(grid), "gather")
    assert tiling.dilation == dilation and not tiling.raster
    plan = plan_for(TokenLayout(grid), rule, "cpu", layout_kind="gather").validate()
    kept = 7 * 9 * 10 / math.prod(grid)
    naive = Neighborhood(window, dilation=dilation, tile=[3, 5, 8])
    loose = plan_for(TokenLayout(grid), naive, "cpu", layout_kind="gather").launched_density()
    assert kept < plan.launched_density() < min(8 * kept, 0.5 * loose)
    assert rule.tiling(TokenLayout(grid), "boxes").dilation == (1, 1, 1)


def test_windows_in_tiles_choose_no_slab() -> None:
    """Where the window grows with the tile, thin tiles would make it thin: they are not cheaper."""
    for grid in [(21, 45, 80), (33, 45, 80), (18, 48, 80), (1, 64, 64)]:
        tile = SlidingTile({"tiles": [3, 3, 3]}).tiling(TokenLayout(grid), "gather").tile
        edges = [edge for edge, size in zip(tile, grid, strict=True) if size > 1]
        assert max(edges) / min(edges) <= 3


@pytest.mark.parametrize("grid", [(9, 24, 24), (9, 32, 32)])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_demo_grids_launch_little_on_a_cpu(grid: tuple, fraction: list[float]) -> None:
    plan = plan_for(TokenLayout(grid), SlidingTile({"fraction": fraction}), "cpu")
    wanted = math.prod(fraction)
    assert wanted * 0.95 <= plan.launched_density("torch") <= 0.35
    assert plan.kept_density() == plan.launched_density("torch")


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ({"tile": [1, 2, 3]}, "tiles"),
        ({"tiles": [1, 2]}, "three"),
        ({"tiles": [1, 2, 0]}, "nearest legal value is 1"),
        ({"tokens": [1, 2, 2.6]}, "nearest legal value is 3"),
        ({"fraction": [1, 2, 0.5]}, "nearest legal value is 1.0"),
        ({"fraction": [1, "x", 0.5]}, "fraction"),
        ({"fraction": [1.0, 3, 3]}, r"got 3; .* 1\.0 \(.*whole numbers in \{tiles = \[t, h, w\]\}"),
        ({"fraction": [1.0, 3.5, 3]}, r"got 3\.5; the nearest legal value is 1\.0\.$"),
        ({"fraction": [math.inf, 1, 1]}, r"got inf; the nearest legal value is 1\.0\."),
        ({"fraction": [math.nan, 1, 1]}, r"got nan; the nearest legal value is 0\.1\."),
        ({"fraction": [10**400, 1, 1]}, r"legal value is 1\.0"),
        ({"tiles": [10**400, 1, 1]}, "at most 2147483647, .* nearest legal value is 2147483647"),
        ({"tokens": [1, 2**31, 1]}, "got 2147483648; the nearest legal value is 2147483647"),
        ({"tokens": [math.inf, 1, 1]}, "got inf; the nearest legal value is 2147483647"),
        ({"tokens": [math.nan, 1, 1]}, "got nan; the nearest legal value is 1"),
        ({"tokens": [True, 1, 1]}, "got True; the nearest legal value is 1"),
        ({"fraction": [1, 1, 1], "tiles": [1, 1, 1]}, "one of"),
        (3, "one of"),
    ],
)
def test_bad_windows(window: object, words: str) -> None:
    with pytest.raises(DitAccelError, match=words):
        Window.parse(window)


def test_numbers_of_numpy_are_numbers() -> None:
    for window, same in (
        ({"tiles": [np.int64(3), np.int32(-1), 5]}, {"tiles": [3, -1, 5]}),
        ({"tokens": [2**31 - 1, np.uint8(7), 5]}, {"tokens": [2**31 - 1, 7, 5]}),
        ({"fraction": [np.int64(1), np.float32(0.5), 0.25]}, {"fraction": [1, 0.5, 0.25]}),
    ):
        found = Window.parse(window)
        assert found == Window.parse(same)
        assert {type(value) for value in found.values} <= {int, float}
    assert Window.parse({"tokens": np.int64(4)}, axes=1).values == (4,)


@pytest.mark.parametrize("tile", [[1, 2], [8, 8, 8], [0, 8, 8], "big", 7, [1, 2, 2.0]])
def test_bad_tiles(tile: object) -> None:
    with pytest.raises(DitAccelError, match="tile"):
        parse_tile(tile)
