"""Generalized neighborhood attention: windows of tokens with stride, dilation and causal axes.

On an axis of N tokens with window w, stride s and dilation d, token x is number x // d of its
dilation group x mod d, which has n = ceil((N - x mod d) / d) tokens; only tokens of one group see
each other. With left = w // 2 and right = w // 2 - 1 + w mod 2, a query q of the group looks from
    leader = min(q // s * s + s // 2, n - 1), centre = clamp(leader, left, n - 1 - right)
and sees the keys centre - left .. centre + right: w of them, moved inward at the borders. On a
causal axis leader = min(q // s * s + s - 1, n - 1), and key k is seen if k <= q and
leader - k < w. Axes are independent.

s = 1 slides, s = w is blocked, d = N / w is sparse and global; w = k tiles with s = a tile is
sliding tile attention where the tile divides the grid and k is odd.
Sources: Neighborhood Attention (arXiv 2204.07143), dilated (2209.15001), generalized (2504.16922).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from dit_accel.errors import DitAccelError, shown
from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tile_choice import LayoutKind, choose_tiling
from dit_accel.kernels.geometry.tiling import Tiling, Triple, grouped
from dit_accel.kernels.geometry.visibility import Relation, Separable
from dit_accel.kernels.geometry.windows import WHOLE, Window
from dit_accel.kernels.patterns.base import EXACT_HELP, AxisRules, cut_one, parts_see, window_param

AXES = "thw"


def _stride(value: Any, name: str) -> Window:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"tokens": list(value)}
    return Window.parse(value, name)


def _dilation(value: Any, name: str) -> Triple:
    steps = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(steps) != 3 or any(type(step) is not int or step < 1 for step in steps):
        raise DitAccelError(
            f"{name}: expected [t, h, w] of whole numbers >= 1, got {shown(value)}; no dilation is "
            "[1, 1, 1]."
        )
    return steps[0], steps[1], steps[2]


def _causal(value: Any, name: str) -> tuple[bool, bool, bool]:
    flags = (value,) * 3 if isinstance(value, bool) else value
    flags = tuple(flags) if isinstance(flags, Sequence) and not isinstance(flags, str) else ()
    if len(flags) != 3 or any(type(flag) is not bool for flag in flags):
        raise DitAccelError(f"{name}: expected [t, h, w] of true or false, got {shown(value)}.")
    return flags[0], flags[1], flags[2]


@dataclass(frozen=True)
class Neighborhood(AxisRules):
    """Keeps a window of tokens around each query.

    Chosen tiles hold tokens of one dilation group where the backend gathers tokens.
    """

    name: ClassVar[str] = "neighborhood"

    window: Window = window_param(
        {"fraction": [0.5, 0.5, 0.5]},
        "Width of the window along each axis; wider than the axis means all of it.",
    )
    stride: Window = param(
        [1, 1, 1],
        unit="tokens, or a table as for window",
        help="Queries of a group of so many along each axis share a window.",
        form="[t, h, w] | {tiles | tokens | fraction = [t, h, w]}",
        parse=_stride,
    )
    dilation: Triple = param(
        [1, 1, 1],
        unit="tokens",
        help="How far apart the window's tokens are along each axis.",
        form="[t, h, w]",
        parse=_dilation,
    )
    causal: tuple[bool, bool, bool] = param(
        [False, False, False],
        help="Axes along which a query sees nothing after itself.",
        form="true | false | [t, h, w]",
        parse=_causal,
    )
    tile: Triple | str = tile_param()
    exact: bool = param(
        None,
        kind=bool,
        help=f"{EXACT_HELP} Not given, it is true where an axis is causal: whole blocks would show "
        "tokens that come after the query.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact is None:
            object.__setattr__(self, "exact", any(self.causal))
        if self.window.unit == self.stride.unit:
            self._check_strides()

    @property
    def per_tile(self) -> bool:
        """See Rules."""
        return self.window.unit == "tiles"

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules. Raises DitAccelError where dilation x window is longer than an axis."""
        params: list[int] = []
        for axis, (length, tile) in enumerate(zip(grid, tiling.tile, strict=True)):
            dilation = self.dilation[axis]
            asked = 1 if self.window.whole(axis) else self.window.tokens(axis, length, tile)
            if asked * dilation > length:
                raise DitAccelError(
                    f"dilation: expected dilation x window <= {length} tokens along "
                    f"{AXES[axis]}, got {dilation} x {asked}; the nearest legal dilation is "
                    f"{max(1, length // asked)}."
                )
            # A whole axis is all of a dilation group, of which some are one token longer.
            window = -(-length // dilation) if self.window.whole(axis) else asked
            stride = min(window, self.stride.tokens(axis, length, tile))
            params += [length, window, stride, dilation, int(self.causal[axis])]
        return "neighborhood", tuple(params)

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern: tiles of one dilation group where the backend can gather them."""
        if max(self.dilation) == 1 or kind == "boxes" or self.tile != "auto":
            return super().choose(grid, kind, others)
        self.token_rule(grid, Tiling(((grid[0],), (grid[1],), (grid[2],)), 128))
        found = choose_tiling(grid, _Grouped(self), kind=kind, others=others)
        return replace(found, dilation=self.dilation)

    def _check_strides(self) -> None:
        for axis, (window, stride) in enumerate(
            zip(self.window.values, self.stride.values, strict=True)
        ):
            if window != WHOLE and (stride > window or stride == WHOLE):
                raise DitAccelError(
                    f"stride: expected stride <= window along {AXES[axis]}, got {stride} > "
                    f"{window} {self.window.unit}; the nearest legal value is {window}."
                )


@dataclass(frozen=True)
class _Grouped:
    """A neighborhood with its axes in the order of dilation groups, to choose tiles by."""

    rule: Neighborhood

    @property
    def per_tile(self) -> bool:
        """See Sight."""
        return self.rule.per_tile

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Sight."""
        return parts_see(self._axis(grid, cut_one(grid, axis, sizes), axis), sizes)

    def reaches(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> bool:
        """See Sight."""
        return True

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Sight."""
        return Separable({axis: self._axis(grid, tiling, axis) for axis in range(3)})

    def _axis(self, grid: Triple, tiling: Tiling, axis: int) -> np.ndarray:
        place = grouped(grid[axis], self.rule.dilation[axis])
        return self.rule.axis(grid, tiling, axis)[place][:, place]
