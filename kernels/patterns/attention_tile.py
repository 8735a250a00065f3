"""Efficient-vDiT's attention tile: each frame sees itself and some reference frames.

Of T latent frames, k are references; frames i and j see each other if i = j or one of them is a
reference. That drops (T - k)(T - k - 1) of T^2 frame pairs: cost grows linearly with T.
Source: Efficient-vDiT (arXiv 2502.06155). It does not say which frames are references: here they
are spread evenly, frame m T // k for m < k, or are the first k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.errors import unknown
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tile_choice import LayoutKind, Speed, cheapest
from dit_accel.kernels.geometry.tiling import Tiling, Triple, parse_tile, raster_runs
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns.base import AxisRules, check_count, check_flag

PLACES = ("uniform", "first")


@dataclass(frozen=True)
class AttentionTile(AxisRules):
    """Keeps the query's own frame and all pairs with a reference frame.

    references: number of reference frames (latent ones), or {"fraction": f} of all frames.
    place: "uniform" spreads them evenly, "first" takes the first ones.
    tile: "auto" or [t, h, w], as for sliding_tile. exact: mask tokens in blocks on a frame border.
    """

    name: ClassVar[str] = "attention_tile"

    references: Any = 2
    place: str = "uniform"
    tile: Any = "auto"
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.references, (Mapping, Window)):
            object.__setattr__(self, "references", Window.parse(self.references, "references", 1))
        else:
            check_count("references", self.references, 1)
        if self.place not in PLACES:
            raise unknown("place of attention_tile", str(self.place), PLACES)
        object.__setattr__(self, "tile", parse_tile(self.tile))
        check_flag("exact", self.exact)

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        frames = grid[0]
        if isinstance(self.references, Window):
            count = self.references.tokens(0, frames, tiling.tile[0])
        else:
            count = min(frames, self.references)
        return "frames", (count, frames, 0) if self.place == "uniform" else (1, frames, count)

    def choose(self, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
        """See Pattern: tiles that respect frames, or runs that need no gathering."""
        tiles = super().choose(grid, kind, others, speed)
        if self.tile != "auto":
            return tiles
        return cheapest(
            [raster_runs(grid), tiles],
            lambda tiling: [(self.relation(grid, tiling), 1.0)],
            kind=kind,
            others=others,
            speed=speed,
        )
