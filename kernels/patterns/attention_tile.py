"""Efficient-vDiT's attention tile: each frame sees itself and some reference frames.

Of T latent frames, k are references; frames i and j see each other if i = j or one of them is a
reference. That drops (T - k)(T - k - 1) of T^2 frame pairs: cost grows linearly with T.
Source: Efficient-vDiT (arXiv 2502.06155). It does not say which frames are references: here they
are spread evenly, frame m T // k for m < k, or are the first k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dit_accel.errors import whole_number
from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tile_choice import LayoutKind, cheapest
from dit_accel.kernels.geometry.tiling import Tiling, Triple, raster_runs
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns.base import AxisRules

PLACES = ("uniform", "first")


def _references(value: object, name: str) -> int | Window:
    if isinstance(value, (Mapping, Window)):
        return Window.parse(value, name, 1)
    return whole_number(name, value, 1)


@dataclass(frozen=True)
class AttentionTile(AxisRules):
    """Keeps the query's own frame and all pairs with a reference frame."""

    name: ClassVar[str] = "attention_tile"

    references: int | Window = param(
        2,
        low=1,
        unit="frames",
        help="Number of reference frames (latent ones), or a fraction of all of them.",
        form="n | {tiles | tokens | fraction = n}",
        parse=_references,
    )
    place: str = param(
        "uniform",
        choices=PLACES,
        help='Which frames are references: "uniform" spreads them evenly, "first" takes the first '
        "ones.",
    )
    tile: Triple | str = tile_param()
    exact: bool = param(False, help="Whether tokens are masked in blocks on the border of a frame.")

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        frames = grid[0]
        if isinstance(self.references, Window):
            count = self.references.tokens(0, frames, tiling.tile[0])
        else:
            count = min(frames, self.references)
        return "frames", (count, frames, 0) if self.place == "uniform" else (1, frames, count)

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern: tiles that respect frames, or runs that need no gathering."""
        tiles = super().choose(grid, kind, others)
        if not isinstance(self.tile, str):
            return tiles
        return cheapest(
            [raster_runs(grid), tiles],
            lambda tiling: [(self.relation(grid, tiling), 1.0)],
            kind=kind,
            others=others,
        )
