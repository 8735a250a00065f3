"""Every static pattern with one free parameter x in (0, 1], for measure_patterns.py.

What x sets is a window's fraction of an axis, a density or a number of frames. At equal launched
density an exact pattern keeps fewer pairs than a blockwise one, so it is a family of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_accel.kernels.patterns import Pattern, pattern
from dit_accel.kernels.patterns.composite import PerHead

ONLY = {"tokens": 1}


@dataclass(frozen=True)
class Family:
    """A pattern's name in tables, and the pattern for a value of its free parameter."""

    name: str
    make: Callable[[float], Pattern]


def window(kind: str, t: float | None, space: float | None, **more: Any) -> Callable[..., Pattern]:
    """A pattern with a window in fractions of the axes; None is the free parameter."""

    def make(x: float) -> Pattern:
        h = x if space is None else space
        return pattern(kind, window={"fraction": [x if t is None else t, h, h]}, **more)

    return make


def blocked(x: float) -> Pattern:
    edges = {"fraction": [x, x, x]}
    return pattern("neighborhood", window=edges, stride=edges)


def dilated(x: float) -> Pattern:
    """Every second row and column; the window over frames is free, up to 16."""
    frames = max(1, round(16 * x))
    return pattern("neighborhood", window={"tokens": [frames, -1, -1]}, dilation=(1, 2, 2))


def banded(kind: str, **more: Any) -> Callable[[float], Pattern]:
    return lambda x: pattern(kind, density=min(x, 0.999), **more)


def disc(frames: int | None, **more: Any) -> Callable[[float], Pattern]:
    """A circle; over so many frames, or the free parameter's share of them."""

    def make(x: float) -> Pattern:
        over = {"fraction": x} if frames is None else {"tokens": frames}
        return pattern("disc", radius={"fraction": x}, frame_window=over, **more)

    return make


def references(place: str) -> Callable[[float], Pattern]:
    return lambda x: pattern("attention_tile", references={"fraction": x}, place=place)


def heads(
    first: Callable[[float], Pattern], last: Callable[[float], Pattern]
) -> Callable[[float], Pattern]:
    """The first half of the heads follows one pattern, the others the other one."""
    return lambda x: PerHead((("0.0-0.5", first(x)), ("0.5-1.0", last(x))))


def united(*parts: Callable[[float], Pattern]) -> Callable[[float], Pattern]:
    return lambda x: pattern("union", union=[part(x) for part in parts])


def first_frame(x: float) -> Pattern:
    """All queries see the first frame, and hardly more."""
    return pattern("spatial_band", reach=ONLY)


def own_frame(x: float) -> Pattern:
    return pattern("neighborhood", window={"tokens": [1, -1, -1]})


def own_place(x: float) -> Pattern:
    """All frames, at the query's place."""
    return pattern("temporal_band", reach=ONLY, sink=False)


def one_reference(x: float) -> Pattern:
    return pattern("attention_tile", references=1, place="first")


CUBE = window("sliding_tile", None, None)
NEAR_CUBE = window("neighborhood", None, None)
SPATIAL_ONLY = banded("spatial_band", sink=False)
SPATIAL, TEMPORAL = banded("spatial_band"), banded("temporal_band")

FAMILIES: dict[str, Family] = {
    name: Family(name, make)
    for name, make in {
        "sliding_tile, all frames": window("sliding_tile", 1.0, None),
        "sliding_tile, 0.6 of frames": window("sliding_tile", 0.6, None),
        "sliding_tile, cube": CUBE,
        "sliding_tile, whole frames": window("sliding_tile", None, 1.0),
        "neighborhood, all frames": window("neighborhood", 1.0, None),
        "neighborhood, all frames, exact": window("neighborhood", 1.0, None, exact=True),
        "neighborhood, cube": NEAR_CUBE,
        "neighborhood, cube, exact": window("neighborhood", None, None, exact=True),
        "neighborhood, whole frames": window("neighborhood", None, 1.0),
        "neighborhood, blocked": blocked,
        "neighborhood, dilated": dilated,
        "attention_tile, uniform": references("uniform"),
        "attention_tile, first": references("first"),
        "radial": lambda x: pattern("radial", decay=4 * x),
        "radial, no first frame": lambda x: pattern("radial", decay=4 * x, sink=False),
        "disc, 4 frames each way": disc(9),
        "disc, 4 frames each way, exact": disc(9, exact=True),
        "disc, fewer frames": disc(None),
        "inward_window": lambda x: pattern("inward_window", base={"fraction": [x, x]}),
        "power_strided": window("power_strided", None, None),
        "power_strided, first tiles": window("power_strided", None, None, sink=1),
        "spatial_band": SPATIAL,
        "spatial_band, no first frame": SPATIAL_ONLY,
        "temporal_band": TEMPORAL,
        "temporal_band, no first places": banded("temporal_band", sink=False),
        "heads: spatial, temporal": heads(SPATIAL, TEMPORAL),
        "heads: temporal, spatial": heads(TEMPORAL, SPATIAL),
        "heads: cube, temporal": heads(CUBE, TEMPORAL),
        "union: neighborhood + first frame": united(NEAR_CUBE, first_frame),
        "union: neighborhood + own frame": united(NEAR_CUBE, own_frame),
        "union: neighborhood + own place": united(NEAR_CUBE, own_place),
        "union: neighborhood + reference": united(NEAR_CUBE, one_reference),
        "union: spatial + own place": united(SPATIAL_ONLY, own_place),
    }.items()
}
