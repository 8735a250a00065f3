"""Layouts and tiles that no plan should be made for: refused at once, or planned in little time."""

from __future__ import annotations

import itertools
import math
import re
import time

import pytest

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.limits import MAX_BOXES
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.selectors import SELECTORS
from dit_accel.layout import MAX_AXIS, TokenLayout

GRID = (21, 30, 52)
WHOLE = {"window": {"tiles": [-1, -1, -1]}}


@pytest.mark.parametrize(
    ("name", "parameters", "grid"),
    [
        ("sliding_tile", {"tile": [1, 1, 1], **WHOLE}, GRID),
        ("neighborhood", {"tile": [1, 1, 3]}, (21, 45, 80)),
        ("disc", {"tile": [3, 1, 1]}, (9, 100, 101)),
        ("radial", {"tile": [1, 2, 1]}, GRID),
        ("block_topk", {"tile": [1, 1, 2]}, GRID),
        ("union", {"union": [{"compute": "disc", "tile": [1, 1, 1]}]}, GRID),
    ],
)
def test_too_many_blocks_name_the_nearest_tile(name: str, parameters: dict, grid: tuple) -> None:
    begin = time.perf_counter()
    layout = TokenLayout(grid)
    with pytest.raises(DitAccelError, match="nearest legal tile is") as caught:
        if name in SELECTORS:
            from dit_accel.kernels.geometry.blocks import blocks_of

            rule = SELECTORS[name](**parameters)
            blocks_of(layout, rule.tiling(layout, "gather"), "cpu")
        else:
            plan_for(layout, pattern(name, **parameters), "cpu")
    assert time.perf_counter() - begin < 2 and len(str(caught.value)) < 1000
    named = re.findall(r"\[(\d+), (\d+), (\d+)\]", str(caught.value))
    given, near = ([int(size) for size in sizes] for sizes in named)

    def blocks(tile: list[int]) -> int:
        return math.prod(-(-size // edge) for size, edge in zip(grid, tile, strict=True))

    assert blocks(given) > MAX_BOXES >= blocks(near) and math.prod(near) <= 128
    # No smaller multiple by powers of two would do.
    for scale in itertools.product((1, 2, 4, 8, 16, 32, 64), repeat=3):
        other = [edge * times for edge, times in zip(given, scale, strict=True)]
        assert math.prod(other) >= math.prod(near) or blocks(other) > MAX_BOXES
    assert plan_for(layout, pattern("disc", tile=near), "cpu").blocks.video_blocks == blocks(near)


@pytest.mark.parametrize(
    ("name", "parameters", "grid"),
    [
        ("disc", {}, (1, 1, 8000)),
        ("radial", {"exact": True}, (1000, 97, 720)),
        ("sliding_tile", {}, (1000, 97, 720)),
        ("neighborhood", {}, (MAX_AXIS + 1, 1, 1)),
        ("temporal_band", {}, (3, 2, 9000)),
        ("union", {"union": ["disc", "radial"]}, (1, 1, 8000)),
    ],
)
def test_grids_that_are_too_large_say_so(name: str, parameters: dict, grid: tuple) -> None:
    begin = time.perf_counter()
    layout = TokenLayout(grid)
    with pytest.raises(DitAccelError, match=f"grid {grid[0]}x{grid[1]}x{grid[2]}: plans take"):
        plan_for(layout, pattern(name, **parameters), "cpu")
    assert layout.too_large is not None  # so that a pipeline's call runs dense, with this reason
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("name", "parameters", "grid"),
    [
        ("disc", {}, (1, 1, MAX_AXIS)),
        ("neighborhood", {"exact": True}, (1, 1, 1500)),
        ("spatial_band", {}, (300, 300, 2)),
        ("radial", {"exact": True}, (60, 90, 2)),
        ("sliding_tile", {}, (140, 45, 80)),
    ],
)
def test_what_is_legal_is_planned_soon(name: str, parameters: dict, grid: tuple) -> None:
    begin = time.process_time()
    plan = plan_for(TokenLayout(grid), pattern(name, **parameters), "cpu", layout_kind="gather")
    assert time.process_time() - begin < 6  # 2 on a machine that nobody else uses
    assert plan.blocks.video_blocks <= MAX_BOXES
