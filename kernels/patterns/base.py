"""What every pattern is: a static rule that makes a plan from a layout.

A pattern says its rule twice: token by token (`token_rule`, a name and parameters in `token_rules`)
and in bounds over boxes of the grid (`relation`). With `exact` partial blocks are masked by the
token rule, so that exactly the rule's pairs count; else blocks are kept whole, which costs the same
blocks, no mask, and keeps more pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.blocks import Member, Rule, Union, build_plan
from dit_accel.kernels.geometry.tile_choice import (
    BLOCK_EFFICIENCY,
    LayoutKind,
    Speed,
    choose_tiling,
)
from dit_accel.kernels.geometry.tiling import Tiling, Triple, fixed_tiling
from dit_accel.kernels.geometry.visibility import Relation, Separable, axis_parts, range_codes
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.token_rules import TOKEN_RULES
from dit_accel.layout import TokenLayout

Efficiency = Mapping[int, float] | None


def kind_for(device: torch.device | str) -> LayoutKind:
    """What is planned for where the caller does not say: gathered slots on a GPU, else lengths."""
    return "lengths" if torch.device(device).type == "cpu" else "gather"


@dataclass(frozen=True)
class Pattern(ABC):
    """Parameters are the dataclass fields (and the keys of a profile's rule); hashable."""

    name: ClassVar[str]
    by_head: ClassVar[bool] = False

    def tiling(
        self, layout: TokenLayout, kind: LayoutKind, efficiency: Efficiency = None
    ) -> Tiling:
        """How the grid is cut for this pattern and kind of backend; chosen once and kept."""
        speed = tuple((efficiency or BLOCK_EFFICIENCY).items())
        return _tiling(self, layout.grid, kind, layout.before + layout.after, speed)

    @abstractmethod
    def choose(self, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
        """How a grid is cut, with so many `others` (tokens that are not video)."""

    @abstractmethod
    def members(
        self,
        layout: TokenLayout,
        kind: LayoutKind,
        efficiency: Efficiency = None,
        shared: Tiling | None = None,
    ) -> Union:
        """The rules that this pattern unites, each over tiles of its own.

        shared: the blocks, where they serve several patterns; a pattern that may choose its tiles
            takes these if they are tiles.
        """

    def build(
        self,
        layout: TokenLayout,
        device: torch.device | str,
        heads: int | None = None,
        *,
        block_efficiency: Efficiency = None,
        layout_kind: LayoutKind | None = None,
    ) -> BlockPlan:
        """The plan of this pattern for one layout, with its tensors on `device`.

        heads: number of query heads, for patterns that differ per head.
        block_efficiency: relative kernel speed by block size (64, 128), for GPU planning.
        layout_kind: what the backend reads; None is `kind_for(device)`.
        """
        how = layout, layout_kind or kind_for(device), block_efficiency
        tiling = self.tiling(*how)
        return build_plan(layout, tiling, [self.members(*how, tiling)], device)


@lru_cache(maxsize=512)
def _tiling(pattern: Pattern, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
    return pattern.choose(grid, kind, others, speed)


class Rules(Pattern):
    """A pattern of one rule, over tiles of its own."""

    exact: bool
    tile: Any

    @property
    def per_tile(self) -> bool:
        """Whether the window grows with the tile."""
        return False

    @abstractmethod
    def token_rule(self, grid: Triple, tiling: Tiling) -> Rule:
        """Name and parameters of the rule, where the pattern's tiles are those of `tiling`."""

    @abstractmethod
    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """The rule's bounds over boxes."""

    @abstractmethod
    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """bool [n, n]: which parts of an axis in these sizes see which, to choose tiles by."""

    def reaches(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> bool:
        """Whether an axis in these sizes does the window justice."""
        return True

    def choose(self, grid: Triple, kind: LayoutKind, others: int, speed: Speed) -> Tiling:
        """See Pattern."""
        if self.tile != "auto":
            return fixed_tiling(grid, self.tile)
        return choose_tiling(grid, self, kind=kind, others=others, speed=speed)

    def members(
        self,
        layout: TokenLayout,
        kind: LayoutKind,
        efficiency: Efficiency = None,
        shared: Tiling | None = None,
    ) -> Union:
        """See Pattern."""
        if shared is not None and not shared.straddles and self.tile == "auto":
            own = shared
        else:
            own = self.tiling(layout, kind, efficiency)
        rule = self.token_rule(layout.grid, own) if self.exact else None
        return (Member(self.relation(layout.grid, own), rule),)


class AxisRules(Rules):
    """A pattern whose rule is what each axis allows, and a token always sees itself."""

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """See Rules."""
        return Separable({a: self.axis(grid, tiling, a) for a in range(3) if grid[a] > 1 or a == 0})

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """See Rules."""
        return parts_see(self.axis(grid, cut_one(grid, axis, sizes), axis), sizes)

    def axis(self, grid: Triple, tiling: Tiling, axis: int) -> np.ndarray:
        """bool [n, n]: which positions of an axis see which."""
        return axis_relation(self.token_rule(grid, tiling), grid, axis)


def axis_relation(rule: Rule, grid: Triple, axis: int) -> np.ndarray:
    """bool [n, n]: what a token rule says along one axis, at position 0 of the others."""
    place = np.arange(grid[axis], dtype=np.int32)
    none = np.zeros(1, np.int32)
    query, key = [none] * 3, [none] * 3
    query[axis], key[axis] = place[:, None], place[None, :]
    return np.broadcast_to(TOKEN_RULES[rule[0]](*query, *key, rule[1]), (len(place), len(place)))


def parts_see(allowed: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """bool [n, n]: which parts of an axis see which, from its positions."""
    parts = axis_parts(sizes)
    return range_codes(allowed, parts, parts) > 0


def check_flag(name: str, value: object) -> None:
    """DitAccelError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise DitAccelError(f"{name}: expected true or false, got {value!r}.")


def check_count(name: str, value: object, least: int = 0) -> None:
    """DitAccelError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        legal = max(least, round(value)) if number and abs(value) < 1e9 else least  # type: ignore[arg-type, call-overload]
        raise DitAccelError(
            f"{name}: expected a whole number >= {least}, got {value!r}; "
            f"the nearest legal value is {legal}."
        )


def cut_one(grid: Triple, axis: int, sizes: tuple[int, ...]) -> Tiling:
    """The grid cut along one axis alone."""
    t, h, w = (sizes if a == axis else (size,) for a, size in enumerate(grid))
    return Tiling((t, h, w), 128)
