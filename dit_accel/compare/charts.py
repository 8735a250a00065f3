"""The geometry of the report's drawings: where things go, in the units of an SVG's view box.

No markup here: the page's template draws these. y grows downwards, as in SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from dit_accel.compare.results import Spread

GLYPH = 6.9
"""Average width of a character of a label."""


@dataclass(frozen=True)
class Sample:
    """What a scatter plot is given of one profile; `quality` may be `inf`."""

    name: str
    kind: str
    time: Spread
    quality: Spread


@dataclass(frozen=True)
class Point:
    """One profile on the plot: its place, its bars, its label and its text for readers."""

    sample: Sample
    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]
    label_x: float
    label_y: float
    anchor: str
    on_front: bool


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place and its number."""

    at: float
    value: float


@dataclass(frozen=True)
class Frame:
    """A drawing's size and the box of its plot area."""

    width: float = 640
    height: float = 380
    left: float = 58
    right: float = 622
    top: float = 20
    bottom: float = 326


@dataclass(frozen=True)
class Scatter:
    """Time (x) against quality (y, better is up).

    `infinite_y` is the line of profiles whose quality has no finite value, None where there is
    none; `front` joins the points that no other point beats in both, as an SVG path.
    """

    frame: Frame
    points: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    infinite_y: float | None
    front: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def pareto(samples: Sequence[Sample], better: Literal["higher", "lower"]) -> set[str]:
    """Names of the samples that no other one beats: faster at equal or better quality."""
    sign = 1 if better == "higher" else -1
    best, names = -math.inf, set()
    for sample in sorted(samples, key=lambda s: (s.time.median, -sign * s.quality.median)):
        if sign * sample.quality.median > best:
            best = sign * sample.quality.median
            names.add(sample.name)
    return names


def scatter(samples: Sequence[Sample], better: Literal["higher", "lower"]) -> Scatter:
    """Lay out a plot of at least one sample."""
    infinite = any(math.isinf(v) for s in samples for v in (s.quality.low, s.quality.high))
    frame = Frame(top=52) if infinite else Frame()
    infinite_y = 24.0 if infinite else None
    x_high = max(s.time.high for s in samples) * 1.06 or 1.0
    y_low, y_high = _quality_range(samples)

    def place_x(value: float) -> float:
        return frame.left + value / x_high * (frame.right - frame.left)

    def place_y(value: float) -> float:
        if math.isinf(value):
            return 24.0
        share = (value - y_low) / (y_high - y_low)
        share = share if better == "higher" else 1 - share
        return frame.bottom - share * (frame.bottom - frame.top)

    front = pareto(samples, better)
    places = {s.name: (place_x(s.time.median), place_y(s.quality.median)) for s in samples}
    labels = _labels(samples, places, frame)
    points = []
    for sample in samples:
        x, y = places[sample.name]
        label_x, label_y, anchor = labels[sample.name]
        x_bar = (place_x(sample.time.low), place_x(sample.time.high))
        y_bar = (place_y(sample.quality.low), place_y(sample.quality.high))
        on_front = sample.name in front
        points.append(Point(sample, x, y, x_bar, y_bar, label_x, label_y, anchor, on_front))
    return Scatter(
        frame,
        points,
        [Tick(place_x(value), value) for value in ticks(0, x_high)],
        [Tick(place_y(value), value) for value in ticks(y_low, y_high)],
        infinite_y,
        _staircase([places[name] for name in front]),
    )


def _quality_range(samples: Sequence[Sample]) -> tuple[float, float]:
    values = [v for s in samples for v in (s.quality.low, s.quality.high) if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    # Nothing that is never negative gets a negative axis.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _staircase(places: Sequence[tuple[float, float]]) -> str:
    """At each time the best quality that is to be had in it."""
    ordered = sorted(places)
    path = [f"M{ordered[0][0]:.1f} {ordered[0][1]:.1f}"]
    path += [f"H{x:.1f}V{y:.1f}" for x, y in ordered[1:]]
    return "".join(path)


Label = tuple[float, float, str]


def _labels(
    samples: Sequence[Sample], places: dict[str, tuple[float, float]], frame: Frame
) -> dict[str, Label]:
    """Beside each point the first place where the label covers no point, label or edge."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places.values()]
    chosen: dict[str, Label] = {}
    for sample in samples:
        x, y = places[sample.name]
        width = len(sample.name) * GLYPH
        options: list[Label] = [
            (x + 12, y - 8, "start"),
            (x - 12, y - 8, "end"),
            (x + 12, y + 16, "start"),
            (x - 12, y + 16, "end"),
            *((x, y + offset, "middle") for offset in (-14, 24, -28, 38, -42, 52)),
        ]
        boxes = [_label_box(option, width) for option in options]
        costs = [
            sum(_overlap(box, other) for other in taken) + 1e3 * _outside(box, frame)
            for box in boxes
        ]
        best = costs.index(min(costs))
        chosen[sample.name] = options[best]
        taken.append(boxes[best])
    return chosen


Box = tuple[float, float, float, float]


def _label_box(label: Label, width: float) -> Box:
    x, y, anchor = label
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    return left, y - 11, left + width, y + 4


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Box, frame: Frame) -> float:
    over = (frame.left - box[0], box[2] - frame.right, 4 - box[1], box[3] - frame.bottom)
    return sum(max(each, 0.0) for each in over)


Map = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Run:
    """Neighbouring cells of one row with one value, drawn as one box."""

    x: float
    y: float
    width: float
    level: float | None


@dataclass(frozen=True)
class HeatMap:
    """A layers x steps map; `level` of a run is its value over `top`, in [0, 1].

    `cells` are the values, rounded: what a reader sees when pointing at a cell. `lowest` and
    `highest` are (value, row, column).
    """

    rows: int
    columns: int
    width: float
    height: float
    left: float
    cell_width: float
    cell_height: float
    runs: list[Run]
    row_labels: list[Tick]
    column_labels: list[Tick]
    cells: list[list[float | None]]
    mean: float
    lowest: tuple[float, int, int]
    highest: tuple[float, int, int]


def mean_map(maps: Sequence[Map]) -> list[list[float | None]]:
    """The mean of maps of one shape, cell by cell, over the cells that are there.

    Clips whose runs had another shape than the first one are left out.
    """
    filled = [each for each in maps if each and each[0]]
    if not filled:
        return []
    shape = [len(row) for row in filled[0]]
    same = [each for each in filled if [len(row) for row in each] == shape]
    return [
        [_mean(each[row][column] for each in same) for column in range(length)]
        for row, length in enumerate(shape)
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def heat_map(values: Map, top: float, width: float = 420) -> HeatMap | None:
    """Lay out a map whose colours end at `top`; None where no cell has a value."""
    filled = [
        (value, row, column)
        for row, line in enumerate(values)
        for column, value in enumerate(line)
        if value is not None
    ]
    if not filled:
        return None
    rows, columns, left = len(values), max(len(line) for line in values), 34.0
    cell_width = (width - left - 8) / columns
    cell_height = min(max(200 / rows, 5.0), 24.0)
    runs = []
    for row, line in enumerate(values):
        column = 0
        for value, group in itertools.groupby(line, key=_rounded):
            length = len(list(group))
            level = None if value is None else min(value / top, 1.0) if top else 0.0
            place = left + column * cell_width
            runs.append(Run(place, row * cell_height, length * cell_width, level))
            column += length
    return HeatMap(
        rows,
        columns,
        width,
        rows * cell_height + 22,
        left,
        cell_width,
        cell_height,
        runs,
        [Tick((row + 0.5) * cell_height, row) for row in range(0, rows, _stride(12 / cell_height))],
        [
            Tick(left + (step - 0.5) * cell_width, step)
            for step in _numbers(columns, 26 / cell_width)
        ],
        [[_rounded(value) for value in line] for line in values],
        fmean(value for value, _, _ in filled),
        min(filled),
        max(filled),
    )


def _rounded(value: float | None) -> float | None:
    """Four figures: enough to read, and equal neighbours become one box."""
    return None if value is None else float(f"{value:.4g}")


def _stride(room: float) -> int:
    """How many cells lie between labels; `room` is what a label needs, in cells."""
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s >= room)


def _numbers(count: int, room: float) -> range:
    """The labelled ones of 1 ... count: round numbers, far enough apart."""
    stride = _stride(room)
    return range(stride, count + 1, stride)
