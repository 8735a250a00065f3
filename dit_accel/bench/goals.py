"""What the kernels are meant to reach on a Hopper GPU, and what a run reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_accel.bench.records import OK, Row

LIBRARIES = ("fa4", "flex", "torch", "reference")
"""Backends that are not the project's own kernels: they reach no goal for them."""
OVER_FA3 = "useful FLOP/s over FA3 dense"


@dataclass(frozen=True)
class Goal:
    """One goal: a bound for the worst of the cells that it speaks of.

    A cell is a case and a density; the best of the project's own backends stands for it, or, where
    `each`, every one of them has a cell of its own.
    least: the bound is from below, else from above.
    """

    title: str
    unit: str
    bound: float
    chosen: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    least: bool = True
    each: bool = False


@dataclass(frozen=True)
class Reached:
    """A goal and the value of its worst cell, which `where` names."""

    goal: Goal
    value: float
    where: str

    @property
    def met(self) -> bool:
        bound = self.goal.bound
        return self.value >= bound if self.goal.least else self.value <= bound


def _cells(
    plan: str, cases: Sequence[str], densities: Sequence[float], backends: Sequence[str] = ()
) -> Callable[[Row], bool]:
    def chosen(row: Row) -> bool:
        return (
            row.what == "sparse"
            and row.plan == plan
            and row.case in cases
            and row.density in densities
            and (row.kernel in backends if backends else row.kernel not in LIBRARIES)
        )

    return chosen


def _own(what: str) -> Callable[[Row], bool]:
    return lambda row: row.what == what and row.kernel not in LIBRARIES


def _over_fa3(row: Row) -> float | None:
    return row.over_fa3


_D128 = ("l32768", "l75776")
GOALS: tuple[Goal, ...] = (
    Goal("D128, 128-key blocks, density 0.5 and 0.2", OVER_FA3, 0.92,
         _cells("random", _D128, (0.5, 0.2)), _over_fa3),
    Goal("D128, 128-key blocks, density 0.1", OVER_FA3, 0.85,
         _cells("random", _D128, (0.1,)), _over_fa3),
    Goal("the same blocks", "over FA4 block-sparse", 1.0,
         _cells("random", _D128, (0.5, 0.2, 0.1)), lambda row: row.over_fa4),
    Goal("sliding_tile on 21x45x80", OVER_FA3, 0.80,
         _cells("sliding_tile", ("21x45x80",), (0.5, 0.2, 0.1)), _over_fa3),
    Goal("D128, 64-key gather, density 0.2", OVER_FA3, 0.85,
         _cells("gather64", _D128, (0.2,)), _over_fa3),
    Goal("D64, 128-key blocks, density 0.5", OVER_FA3, 0.88,
         _cells("random", ("l17664",), (0.5,)), _over_fa3),
    Goal("D64, 128-key blocks, density 0.2", OVER_FA3, 0.82,
         _cells("random", ("l17664",), (0.2,)), _over_fa3),
    Goal("D64, 128-key blocks, density 0.1", OVER_FA3, 0.75,
         _cells("random", ("l17664",), (0.1,)), _over_fa3),
    Goal("portable path, D128, density 0.2", OVER_FA3, 0.70,
         _cells("random", _D128, (0.2,), ("triton",)), _over_fa3),
    Goal("whole call, 21x45x80, density 0.1", "times faster than FA3 dense", 7.5,
         _own("whole call"), _over_fa3),
    Goal("plan from the cache", "of the whole call", 0.005,
         _own("whole call"), lambda row: row.lookup_share, least=False, each=True),
    Goal("permutation, 21x45x80", "times a copy of as many bytes", 1.15,
         lambda row: row.what == "permutation", lambda row: row.over_copy, least=False),
    Goal("first call, compilation included", "s", 20.0,
         _own("sparse"), lambda row: row.first_call_s, least=False, each=True),
    Goal("next call", "s", 0.1,
         _own("sparse"), lambda row: row.next_call_s, least=False, each=True),
)  # fmt: skip


def reached(rows: Sequence[Row]) -> list[Reached]:
    """The goals that these rows say something about."""
    found = []
    for goal in GOALS:
        cells: dict[tuple[str, float | None, str], tuple[float, str]] = {}
        for row in rows:
            value = goal.value(row) if row.status == OK and goal.chosen(row) else None
            if value is None:
                continue
            cell = (row.case, row.density, row.kernel if goal.each else "")
            if cell not in cells or _better(value, cells[cell][0], goal.least):
                density = "" if row.density is None else f", density {row.density:g}"
                cells[cell] = value, f"{row.kernel} on {row.case}{density}"
        if cells:
            worst = min if goal.least else max
            found.append(Reached(goal, *worst(cells.values(), key=lambda cell: cell[0])))
    return found


def _better(value: float, other: float, least: bool) -> bool:
    return value > other if least else value < other
