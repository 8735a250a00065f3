"""Mochi 1: known to the planner by its sizes alone; its attention is not attached yet."""

from __future__ import annotations

from dit_accel.pipelines.preset import Preset, Size

MOCHI = Preset(
    "mochi", "Mochi 1", "mochi", 24, 128, {"num_layers": 48}, 12288, False, Size(480, 848, 163),
    text=(0, 256), scales=(6, 16),
)  # fmt: skip
