"""Patterns made of patterns: their union, and one for each group of heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dit_accel.errors import DitAccelError, shown
from dit_accel.kernels.compute import from_table, make, param
from dit_accel.kernels.geometry.blocks import Member
from dit_accel.kernels.geometry.limits import affordable
from dit_accel.kernels.geometry.tile_choice import LayoutKind, cheapest
from dit_accel.kernels.geometry.tiling import Tiling, Triple, even_tiling, fixed_tiling
from dit_accel.kernels.patterns.base import PATTERNS, Pattern
from dit_accel.kernels.patterns.full import Full
from dit_accel.layout import TokenLayout

# What patterns of different tastes may agree on.
MAX_HEADS_TEXT = 1000
_SHARES = r"\d{0,9}\.?\d{1,9}-\d{0,9}\.?\d{1,9}"
USUAL_TILES: tuple[Triple, ...] = ((1, 8, 16), (2, 8, 8), (4, 4, 8))


def _parts(value: Any, name: str) -> tuple[Pattern, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DitAccelError(
            f'{name}: expected a list of patterns such as [{{compute = "radial", decay = 0.2}}], '
            f"got {shown(value)}."
        )
    parts = tuple(parse_pattern(part, f"{name}[{i}]") for i, part in enumerate(value))
    if any(part.by_head for part in parts):
        raise DitAccelError(f"{name}: expected patterns that are the same for all heads.")
    return parts


@dataclass(frozen=True)
class Union(Pattern):
    """Keeps the pairs that any of several patterns keeps.

    Each rules over tiles of its own; blocks are those of the pattern that makes the whole cheapest.
    """

    name: ClassVar[str] = "union"

    union: tuple[Pattern, ...] = param(
        [{"compute": "sliding_tile"}],
        help='The patterns: tables such as {compute = "radial", decay = 0.2}, or names such as '
        '"full".',
        form="[{compute = name, ...} | name, ...]",
        parse=_parts,
    )

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern."""
        return _shared_tiling([(part, 1) for part in self.union], grid, kind, others)

    def exact_parts(self) -> tuple[Pattern, ...]:
        """See Pattern."""
        return tuple(dict.fromkeys(p for part in self.union for p in part.exact_parts()))

    def members(
        self, layout: TokenLayout, kind: LayoutKind, shared: Tiling | None = None
    ) -> tuple[Member, ...]:
        """See Pattern."""
        blocks = shared or self.tiling(layout, kind)
        return tuple(member for part in self.union for member in part.members(layout, kind, blocks))


@dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern for each group of query heads.

    groups: pairs (heads, pattern): heads are numbers and ranges "0-7,-1", or fractions "0.0-0.5" of
        all heads; a later group overrides an earlier one.
    rest: the pattern of heads that no group names.
    """

    name: ClassVar[str] = "per_head"
    by_head: ClassVar[bool] = True

    groups: tuple[tuple[str, Pattern], ...]
    rest: Pattern = Full()

    def over(self, heads: str, pattern: Pattern) -> PerHead:
        """This with another pattern for some heads."""
        return PerHead((*self.groups, (heads, pattern)), self.rest)

    def exact_parts(self) -> tuple[Pattern, ...]:
        """See Pattern. Raises DitAccelError where groups mask tokens by different rules."""
        parts = [self.rest, *(pattern for _, pattern in self.groups)]
        exact = list(dict.fromkeys(filter(None, (part.exact_parts() for part in parts))))
        if len({frozenset(each) for each in exact}) > 1:
            names = ", ".join(sorted({part.name for each in exact for part in each}))
            raise DitAccelError(
                "exact: one call masks the tokens of all its heads by the same rules, and here "
                f"heads differ ({names}): set exact = false for the heads of all but one of them."
            )
        return exact[0] if exact else ()

    def assigned(self, heads: int) -> tuple[list[Pattern], list[int]]:
        """The patterns in use, and for each of `heads` heads which of them it follows."""
        own: list[Pattern] = [self.rest] * heads
        for text, pattern in self.groups:
            for head in select_heads(text, heads):
                own[head] = pattern
        used = list(dict.fromkeys(own))
        return used, [used.index(pattern) for pattern in own]

    def choose(self, grid: Triple, kind: LayoutKind, others: int) -> Tiling:
        """See Pattern. Weighs the patterns alike; `for_heads` knows how many heads each has."""
        parts = [self.rest, *(pattern for _, pattern in self.groups)]
        return _shared_tiling([(part, 1) for part in parts], grid, kind, others)

    def members(
        self, layout: TokenLayout, kind: LayoutKind, shared: Tiling | None = None
    ) -> tuple[Member, ...]:
        """Not one union for all heads: DitAccelError."""
        raise DitAccelError("heads: patterns that differ per head cannot be part of another one.")

    def for_heads(
        self, layout: TokenLayout, kind: LayoutKind, heads: int | None
    ) -> tuple[Tiling, list[tuple[Member, ...]], Sequence[int]]:
        """See Pattern. Raises DitAccelError without `heads`, or for heads that do not exist."""
        if heads is None:
            raise DitAccelError("heads: expected the number of query heads for a plan per head.")
        layout.check()
        used, follows = self.assigned(heads)
        parts = [(pattern, follows.count(i)) for i, pattern in enumerate(used)]
        tiling = _shared_tiling(parts, layout.grid, kind, layout.before + layout.after)
        return tiling, [part.members(layout, kind, tiling) for part in used], follows


def parse_pattern(value: object, where: str) -> Pattern:
    """A pattern from itself, a table {compute = name, ...} or its bare name; "dense" is "full"."""
    return value if isinstance(value, Pattern) else from_table(value, where, _pattern)


def _pattern(name: str, /, **params: Any) -> Pattern:
    made: Pattern = make("pattern", PATTERNS, name, params)
    return made


def check_heads(text: object) -> str:
    """`text` if it says heads; DitAccelError else."""
    parts = text.split(",") if isinstance(text, str) and len(text) <= MAX_HEADS_TEXT else [""]
    for part in (p.strip() for p in parts):
        if part == "all" or re.fullmatch(r"-?\d{1,9}(--?\d{1,9})?|" + _SHARES, part, re.ASCII):
            continue
        raise DitAccelError(
            "heads: expected 'all', numbers and ranges such as '0-7,-1', or fractions such as "
            f"'0.0-0.5', got {shown(text)}."
        )
    return str(text)


def select_heads(text: str, heads: int) -> list[int]:
    """The heads that `text` names of `heads`; DitAccelError where it names one that is none."""
    found: set[int] = set()
    for part in (p.strip() for p in text.split(",")):
        if part == "all":
            found.update(range(heads))
        elif match := re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part):
            first, last = (
                int(n) + (heads if n[0] == "-" else 0) for n in (match[1], match[2] or match[1])
            )
            if not 0 <= first <= last < heads:
                raise DitAccelError(
                    f"heads: {part!r} is not within the {heads} heads of this model; the last "
                    f"one is {heads - 1}."
                )
            found.update(range(first, last + 1))
        else:
            low, high = (float(n) for n in part.split("-"))
            found.update(head for head in range(heads) if low <= head / heads < high)
    return sorted(found)


def _shared_tiling(
    parts: Sequence[tuple[Pattern, float]],
    grid: Triple,
    kind: LayoutKind,
    others: int,
) -> Tiling:
    """The tiling that suits all patterns best, of their own ones and some usual tiles."""
    layout = TokenLayout(grid, others)
    tilings = [part.tiling(layout, kind) for part, _ in parts]
    own = list(dict.fromkeys(replace(tiling, dilation=(1, 1, 1)) for tiling in tilings))
    own = [tiling for tiling in own if affordable(tiling)] or own
    if len(own) > 1:
        own += [_usual(grid, tile, kind) for tile in USUAL_TILES]
    return cheapest(
        own,
        lambda tiling: [
            (member.relation, weight)
            for part, weight in parts
            for member in part.members(layout, kind, tiling)
        ],
        kind=kind,
        others=others,
    )


def _usual(grid: Triple, tile: Triple, kind: LayoutKind) -> Tiling:
    if kind == "boxes":
        return fixed_tiling(grid, tile)
    t, h, w = (-(-size // edge) for size, edge in zip(grid, tile, strict=True))
    return even_tiling(grid, (t, h, w))
