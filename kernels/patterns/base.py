"""What every pattern is: a static rule that makes a plan from a layout.

A pattern says its rule twice: token by token (`token_rule`, a name and parameters in `token_rules`)
and in bounds over boxes of the grid (`relation`). With `exact` partial blocks are masked by the
token rule, so that exactly the rule's pairs count; else blocks are kept whole, which costs the same
blocks, no mask, and keeps more pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.compute import Compute, param
from dit_accel.kernels.geometry.blocks import (
    MAX_RULES,
    Member,
    Rule,
    Union,
    build_plan,
    token_rules,
)
from dit_accel.kernels.geometry.tile_choice import LayoutKind, choose_tiling
from dit_accel.kernels.geometry.tiling import Tiling, Triple, fixed_tiling
from dit_accel.kernels.geometry.visibility import Relation, Separable, axis_parts, range_codes
from dit_accel.kernels.geometry.windows import AXES, Window
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.token_rules import TOKEN_RULES
from dit_accel.layout import TokenLayout

EXACT_HELP = (
    "Whether partial blocks are masked token by token, so that exactly the pattern's pairs count; "
    "else they are kept whole."
)

PATTERNS: dict[str, type[Pattern]] = {}
"""Every pattern by name, listed in `patterns`; here for patterns that are made of others."""


def kind_for(device: torch.device | str) -> LayoutKind:
    """What is planned for where the caller does not say: gathered slots on a GPU, else lengths."""
    return "lengths" if torch.device(device).type == "cpu" else "gather"


def window_param(default: dict[str, Any] | None, help: str, axes: int = 3) -> Any:
    """A parameter that is a `Window` over so many axes."""
    return param(
        default, unit="tiles, tokens or fraction of the axis", help=help,
        form=f"{{tiles | tokens | fraction = {AXES[axes]}}}",
        parse=partial(Window.parse, axes=axes),
    )  # fmt: skip


@dataclass(frozen=True)
class Pattern(Compute):
    """A static rule: its plan depends on the layout alone."""

    def tiling(self, layout: TokenLayout, kind: LayoutKind) -> Tiling:
        """How the grid is cut for this pattern and kind of backend.

        Raises DitAccelError where no plan can be made for the layout.
        """
        layout.check()
        return self.choose(layout.grid, kind, layout.before + layout.after)

    @abstractmethod
    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """How a grid is cut, with so many `others` (tokens that are not video)."""

    @abstractmethod
    def members(self, layout: TokenLayout, kind: LayoutKind, shared: Tiling | None = None) -> Union:
        """The rules that this pattern unites, each over tiles of its own.

        shared: the blocks, where they serve several patterns; a pattern that may choose its tiles
            takes these if they are tiles.
        """

    def for_heads(
        self, layout: TokenLayout, kind: LayoutKind, heads: int | None
    ) -> tuple[Tiling, list[Union], Sequence[int] | None]:
        """The blocks, the unions in use, and which of them each of `heads` query heads follows.

        None instead of the last where all heads follow the only one.
        """
        tiling = self.tiling(layout, kind)
        return tiling, [self.members(layout, kind, tiling)], None

    def check(
        self,
        layout: TokenLayout | None = None,
        kind: LayoutKind = "gather",
        heads: int | None = None,
    ) -> None:
        """DitAccelError where no plan of this pattern can be made: on this layout, or on any."""
        exact = self.exact_parts()
        if len(exact) > MAX_RULES:
            raise DitAccelError(
                f"exact: one call can mask the tokens of at most {MAX_RULES} rules, not of "
                f"{len(exact)} ({', '.join(each.name for each in exact)}): set exact = false on "
                f"all but {MAX_RULES} of them."
            )
        if layout is not None:
            _, unions, _ = self.for_heads(layout, kind, heads)
            token_rules(unions)

    def exact_parts(self) -> tuple[Pattern, ...]:
        """The different patterns in it that mask tokens."""
        return (self,) if getattr(self, "exact", False) else ()

    def build(
        self,
        layout: TokenLayout,
        device: torch.device | str,
        heads: int | None = None,
        *,
        layout_kind: LayoutKind | None = None,
    ) -> BlockPlan:
        """The plan of this pattern for one layout, with its tensors on `device`.

        heads: number of query heads, for patterns that differ per head.
        layout_kind: what the backend reads; None is `kind_for(device)`.
        """
        if (reason := self.obstacle(layout)) is not None:
            raise DitAccelError(f"spans: {reason}.")
        tiling, unions, follows = self.for_heads(layout, layout_kind or kind_for(device), heads)
        return build_plan(layout, tiling, unions, device, follows)


class Rules(Pattern):
    """A pattern of one rule, over tiles of its own."""

    tile: Triple | str
    exact: bool

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

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern."""
        if not isinstance(self.tile, str):
            return fixed_tiling(grid, self.tile)
        return choose_tiling(grid, self, kind=kind, others=others)

    def members(self, layout: TokenLayout, kind: LayoutKind, shared: Tiling | None = None) -> Union:
        """See Pattern."""
        if shared is not None and not shared.straddles and self.tile == "auto":
            own = shared
        else:
            own = self.tiling(layout, kind)
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


def cut_one(grid: Triple, axis: int, sizes: tuple[int, ...]) -> Tiling:
    """The grid cut along one axis alone."""
    t, h, w = (sizes if a == axis else (size,) for a, size in enumerate(grid))
    return Tiling((t, h, w), 128)
