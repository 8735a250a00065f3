"""The calls that measure_planner.py times: round ones, and pairs of model and pattern."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.kernels.backends import LAYOUT_KINDS
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns import Pattern, pattern
from dit_accel.layout import TokenLayout
from dit_accel.planner.models import Subject, at_grid, subject

HEAD_DIMS = (64, 128)
RAGGED = 72
"""Tokens that ragged dense calls are shorter."""
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_tile", {"window": {"fraction": [0.6, 0.5, 0.5]}}),
    ("sliding_tile", {"window": {"fraction": [1.0, 0.3, 0.3]}}),
    ("neighborhood", {"window": {"fraction": [0.5, 0.5, 0.5]}, "exact": True}),
    ("disc", {"radius": {"fraction": 0.25}, "exact": True}),
    ("radial", {"decay": 0.4, "exact": True}),
    ("attention_tile", {"references": 2, "exact": True}),
    ("temporal_band", {"exact": True}),
)
MODELS = ("wan-1.3b", "wan-14b", "hunyuan", "cogvideox-5b", "ltx", "flux")
CHECKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_tile", {"window": {"fraction": [0.6, 0.4, 0.4]}}),
    ("sliding_tile", {"window": {"fraction": [1.0, 0.5, 0.5]}}),
    ("sliding_tile", {"window": {"tiles": [3, 3, 3]}}),
    ("neighborhood", {"window": {"fraction": [0.4, 0.4, 0.4]}}),
    ("neighborhood", {"window": {"fraction": [0.4, 0.4, 0.4]}, "exact": True}),
    ("radial", {"decay": 0.2}),
    ("spatial_band", {"density": 0.25}),
    ("temporal_band", {"density": 0.25}),
    ("attention_tile", {"references": 4}),
    ("disc", {"radius": {"fraction": 0.3}, "exact": True}),
)
PATTERNS_EACH = 2
"""Each model takes every second of these patterns, in turn from the first and from the second."""
TINY_GRID = (3, 7, 9)
"""What the pairs' grids are cut to, to try the script on a CPU."""


def name_of(call: Job | Subject) -> str:
    """What the time of a sparse or a dense call is kept under."""
    return call.name if isinstance(call, Job) else f"{called(call)} dense"


@dataclass(frozen=True)
class Sizes:
    """How large the round calls are.

    lengths: tokens and heads of calls without a grid. grids: with their text tokens; boxes and
    tiles do not divide them all, so that short blocks are there. heads: of calls with a grid.
    """

    lengths: tuple[tuple[int, int], ...]
    grids: tuple[tuple[tuple[int, int, int], int], ...]
    heads: int


FULL = Sizes(
    ((4096, 4), (4096, 16), (8192, 4), (8192, 16), (16384, 16), (32768, 16), (65536, 16)),
    (
        ((12, 32, 40), 0), ((16, 45, 53), 0), ((5, 30, 44), 0), ((5, 64, 96), 256),
        ((3, 40, 45), 226), ((13, 34, 46), 200), ((21, 46, 62), 320),
    ),
    16,
)  # fmt: skip
TINY = Sizes(((128, 1), (128, 2), (192, 2)), (((3, 6, 9), 0), ((4, 5, 11), 7)), 2)


@dataclass(frozen=True)
class Job:
    """A call, the pattern that makes its plan, who runs it, and how that one reads blocks."""

    call: Subject
    rule: Pattern
    backend: str
    kind: LayoutKind

    @property
    def name(self) -> str:
        """What its time is kept under: with its blocks, which depend on how tiles are chosen."""
        tiling = self.rule.tiling(self.call.layout, self.kind)
        rule = f"{self.rule.name} {self.rule.describe()}"
        return f"{called(self.call)} {rule} {self.backend} {tiling.words} of {tiling.block}"


def called(call: Subject) -> str:
    """A call's sizes."""
    layout = call.layout
    grid = "x".join(map(str, layout.grid))
    return f"{grid} +{layout.before} +{layout.after} H{call.heads} D{call.head_dim}"


def round_call(size: tuple[int, int], dim: int, shorter: int = 0) -> Subject:
    """A call without a grid, of so many tokens and heads."""
    length, heads = size
    return at_grid((1, 1, length - shorter), heads, dim)


def round_jobs(sizes: Sizes, backends: Sequence[str]) -> list[Job]:
    """Whole blocks alone, then patterns with short and masked blocks."""
    found = []
    for dim in HEAD_DIMS:
        calls = [(round_call(size, dim), pattern("full")) for size in sizes.lengths]
        for grid, text in sizes.grids:
            call = at_grid(grid, sizes.heads, dim)
            call = dataclasses.replace(call, layout=TokenLayout(grid, after=text))
            calls += [(call, pattern(name, **kw)) for name, kw in RULES]
        found += [Job(*call, name, LAYOUT_KINDS[name][0]) for name in backends for call in calls]
    return found


def dense_calls(sizes: Sizes) -> list[Subject]:
    """Dense calls of round lengths, and of some that no kernel's blocks divide."""
    return [
        round_call(size, dim, shorter)
        for dim in HEAD_DIMS
        for shorter in (0, RAGGED)
        for size in sizes.lengths
    ]


def check_jobs(backends: Sequence[str], tiny: bool) -> list[Job]:
    """Pairs of model and pattern, on every backend and way of reading blocks."""
    found = []
    for number, name in enumerate(MODELS):
        call = shrunk(subject(name)) if tiny else subject(name)
        own = CHECKS[number % PATTERNS_EACH :: PATTERNS_EACH]
        rules = [pattern(rule, **parameters) for rule, parameters in own]
        found += [
            Job(call, rule, backend, kind)
            for rule in rules
            for backend in backends
            for kind in LAYOUT_KINDS[backend]
        ]
    return found


def spread(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in an order in which those that share a kernel are apart, so that few compile it."""
    seen: Counter[tuple[str, int]] = Counter()
    turns = []
    for job in jobs:
        kernel = job.rule.name, job.call.head_dim
        turns.append(seen[kernel])
        seen[kernel] += 1
    return [job for _, job in sorted(zip(turns, jobs, strict=True), key=lambda pair: pair[0])]


def shrunk(call: Subject) -> Subject:
    """The same kind of call, small enough for a CPU."""
    t, h, w = (min(n, most) for n, most in zip(call.layout.grid, TINY_GRID, strict=True))
    before, after = min(call.layout.before, 13), min(call.layout.after, 13)
    return dataclasses.replace(call, layout=TokenLayout((t, h, w), before, after), heads=1)
