"""FreeSwim's inward window: the receptive field of training, kept at a higher resolution.

Along h and w, with d = base // 2, query y sees the rows y - d .. y + d; where that sticks out of
the grid by e rows, the other side gets e more. So every query sees 2 d + 1 rows, or all. All frames
are seen.
Source: FreeSwim (arXiv 2511.14712). Its larger softmax scale, sqrt(log_1560(3120) / head_dim), is
the caller's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.compute import param, tile_param
from dit_accel.kernels.geometry.blocks import Rule
from dit_accel.kernels.geometry.tiling import Tiling, Triple
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns.base import EXACT_HELP, AxisRules, window_param


@dataclass(frozen=True)
class InwardWindow(AxisRules):
    """Keeps a spatial window as large as the picture that the model was trained on."""

    name: ClassVar[str] = "inward_window"

    base: Window = window_param(
        {"tokens": [30, 52]},
        "Height and width of the picture that the model was trained on; 480 x 832 pixels are "
        "30 x 52 tokens in most models.",
        axes=2,
    )
    tile: Triple | str = tile_param()
    exact: bool = param(False, help=EXACT_HELP)

    @property
    def per_tile(self) -> bool:
        """See Rules."""
        return self.base.unit == "tiles"

    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """See Rules."""
        params = [grid[0], grid[0], 1, 1, 0]
        for axis in (1, 2):
            length = grid[axis]
            window = self.base.tokens(axis - 1, length, tiling.tile[axis]) // 2 * 2 + 1
            params += [length, min(length, window), 1, 1, 0]
        return "neighborhood", tuple(params)
