"""Which tiling makes a pattern cheapest on a grid.

On a GPU every block takes whole slots of the kernel, so the cost counts slots; the CPU backend
works on the tiles' own lengths, merges query tiles that see the same keys and pays for gathering
those keys.

A window that is given in tiles grows with the tile: then the cost is per token pair seen, so that
tilings are compared at equal windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch

from dit_accel.costs.kernels import tile_prices
from dit_accel.kernels.geometry.limits import MAX_BOXES, affordable
from dit_accel.kernels.geometry.tiling import (
    BLOCK_SIZES,
    Tiling,
    Triple,
    clipped_split,
    even_split,
    even_tiling,
    fixed_tiling,
    geometry,
)
from dit_accel.kernels.geometry.visibility import NONE, Relation

LayoutKind = Literal["boxes", "gather", "lengths"]
"""How a backend reads blocks: power-of-two boxes of the grid, gathered into whole blocks of slots,
or tiles at their own lengths."""

PRICES = tile_prices()
# Relative speed of the portable kernel per launched pair, by block size.
SPEED = dict(PRICES.speed)
MIN_CPU_TILE = 32
# Costs this close count as equal; the most cubic tile wins then. A window in tiles has the shape of
# the tile: there a cubic one is worth more.
TIE = 1.08
TIE_PER_TILE = 1.2
# Boxes must have powers of two as edges, and few of them fit a grid: those that waste little are
# taken only where they cost about as little as the cheapest.
TIE_BOXES = 1.03
# Slots over tokens that tiles may take, tried in turn; beyond the last one blocks straddle tiles.
WASTE = (1.08, 1.10, 1.15)
# A limit may cost this much against none: tiles that waste little may round a window up by more.
# Beyond that, blocks that straddle the cheapest tiles are tried.
THRIFT = 1.2
# Tilings that are tried with straddling blocks.
STRADDLING = 4
# Query blocks whose lists are counted to estimate those of all.
SAMPLE = 12
# On axes longer than these only some of all edges are tried: what an axis sees takes its length
# squared, for each of them.
LONG = ((1024, (1, 2, 4, 8, 16, 32, 64, 128)),
        (640, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)))  # fmt: skip


class Sight(Protocol):
    """What the choice needs to know of a pattern; hashable."""

    @property
    def per_tile(self) -> bool:
        """Whether the window grows with the tile."""

    def sees(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
        """bool [n, n]: which parts of an axis, cut in these sizes, see which."""

    def reaches(self, grid: Triple, axis: int, sizes: tuple[int, ...]) -> bool:
        """Whether an axis in these sizes does the window justice."""

    def relation(self, grid: Triple, tiling: Tiling) -> Relation:
        """The pattern's bounds, where its tiles are those of `tiling`."""


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Ways to cut a grid, and what they cost; a row of every array is one of them.

    made_from: edges of boxes or numbers of parts, [n, 3]. block: slots of a tile. tiles: how many.
    tile: the largest tile, [n, 3]. visits: visiting pairs of tiles. bare: of boxes, those to boxes
    that no edge clips. pairs: of tokens. lists: how many tiles have a list of their own; keys:
    tokens in all those lists. reaches: whether the tiles do the window justice.
    """

    made_from: np.ndarray
    block: np.ndarray
    tiles: np.ndarray
    tile: np.ndarray
    visits: np.ndarray
    bare: np.ndarray
    pairs: np.ndarray
    keys: np.ndarray
    lists: np.ndarray
    reaches: np.ndarray

    def only(self, chosen: np.ndarray) -> _Candidates:
        """Some of them; all where none is chosen."""
        if not chosen.any():
            return self
        return _Candidates(*(getattr(self, f.name)[chosen] for f in fields(self)))


Cost = Callable[[_Candidates], np.ndarray]


@lru_cache(maxsize=512)
def choose_tiling(
    grid: Triple,
    sight: Any,
    *,
    kind: LayoutKind,
    others: int = 0,
) -> Tiling:
    """The tiling of `grid` that makes `sight` cheapest.

    others: number of tokens outside the video, seen by and seeing everything.

    Slots beyond the tokens are held within WASTE where that is affordable. Where tiles waste more,
    blocks straddle them; boxes cannot, and waste more where those within cost 3 % more. Costs
    within 8 % count as equal: the most cubic tile wins then, then the larger one.
    """

    def slots(some: _Candidates) -> np.ndarray:
        rate = np.vectorize(SPEED.get)(some.block)
        cost = _slots(some.visits, some.tiles, some.block, others) / rate
        return cost / some.pairs if sight.per_tile else cost

    def boxed(some: _Candidates) -> np.ndarray:
        visits = some.bare + PRICES.clipped * (some.visits - some.bare)
        cost = _slots(visits, some.tiles, some.block, others)
        return cost / some.pairs if sight.per_tile else cost

    def gathered(some: _Candidates) -> np.ndarray:
        keys = some.keys + others * some.lists
        cost = some.pairs + others * math.prod(grid) + PRICES.gather_rows * keys
        return cost / some.pairs if sight.per_tile else cost

    if kind == "boxes":
        boxes = power_boxes(grid, BLOCK_SIZES[-1])  # what the kernel that reads boxes takes
        found = _candidates(grid, sight, boxes, [math.prod(box) for box in boxes], clipped_split)
        found = found.only(found.tiles <= MAX_BOXES)
        return fixed_tiling(grid, _cheapest_boxes(found.only(found.reaches), grid, sight, boxed))
    blocks = BLOCK_SIZES[-1:] if kind == "lengths" else tuple(SPEED)
    counts = [(each, block) for block in blocks for each in even_counts(grid, block)]
    made_from, sizes = [each for each, _ in counts], [block for _, block in counts]
    found = _candidates(grid, sight, made_from, sizes, even_split)
    found = found.only(found.tiles <= MAX_BOXES)
    if kind == "lengths":
        large = math.prod(grid) // found.tiles >= MIN_CPU_TILE
        return even_tiling(grid, _best(found.only(large), sight, gathered)[0])
    return _thrifty(found, grid, sight, slots, others)


def cheapest(
    tilings: Iterable[Tiling],
    relations: Callable[[Tiling], Sequence[tuple[Relation, float]]],
    *,
    kind: LayoutKind,
    others: int = 0,
) -> Tiling:
    """The cheapest of some tilings by the lists of a few of its blocks.

    relations: for a tiling, the relations that share it and the weight of each.
    """

    def cost(tiling: Tiling) -> float:
        total = 0.0
        for relation, weight in relations(tiling):
            total += weight * sampled_cost(relation, tiling, kind, others)
        return total

    options = list(dict.fromkeys(tilings))
    return options[0] if len(options) == 1 else min(options, key=cost)


def sampled_cost(
    relation: Relation,
    tiling: Tiling,
    kind: LayoutKind,
    others: int = 0,
) -> float:
    """Estimated cost of a relation on a tiling, from SAMPLE query blocks."""
    where = geometry(tiling)
    some = np.unique(np.linspace(0, where.blocks - 1, SAMPLE).round().astype(int))
    seen = relation.codes(where.pick(some), where, torch.device("cpu")).numpy() > NONE
    if kind == "lengths":
        lengths = np.array(tiling.lengths)
        keys = seen @ lengths + others
        pairs = float(((lengths[some] + PRICES.gather_rows) * keys).mean()) * where.blocks
        return pairs + others * (math.prod(tiling.grid) + others)
    visits = seen.sum() / len(some) * where.blocks
    return _slots(visits, where.blocks, tiling.block, others) / SPEED[tiling.block]


def _thrifty(
    candidates: _Candidates,
    grid: Triple,
    sight: Sight,
    cost: Cost,
    others: int,
) -> Tiling:
    """The cheapest tiling that wastes little, or blocks that straddle the cheapest tiles."""
    able = candidates.only(candidates.reaches)
    costs = cost(able)
    found: list[Tiling] = []
    for limit in WASTE:
        within = able.tiles * able.block <= limit * math.prod(grid)
        if within.any():
            counts, block, price = _best(able.only(within), sight, cost)
            found = [even_tiling(grid, counts, block)]
            if price <= THRIFT * costs.min():
                return found[0]
            break
    straddling = [
        Tiling(even_tiling(grid, _triple(counts)).parts, BLOCK_SIZES[-1], straddles=True)
        for counts in able.made_from[costs.argsort(kind="stable")[:STRADDLING]]
    ]
    if found:
        straddling = [tiling for tiling in straddling if affordable(tiling)]
    return cheapest(
        [*straddling, *found],
        lambda tiling: [(sight.relation(grid, tiling), 1.0)],
        kind="gather",
        others=others,
    )


def _cheapest_boxes(able: _Candidates, grid: Triple, sight: Sight, cost: Cost) -> Triple:
    """Of the cheapest boxes those that waste little, of these the most cubic.

    A window in tiles has the shape of the box, which is worth more than a little waste.
    """
    costs = cost(able)
    near = able.only(costs <= costs.min() * (TIE_PER_TILE if sight.per_tile else TIE_BOXES))
    slots = near.tiles * near.block
    for limit in WASTE[-1:] if sight.per_tile else WASTE:
        within = slots <= limit * math.prod(grid)
        if within.any():
            return _most_cubic(near.only(within))
    return _most_cubic(near)


def _best(candidates: _Candidates, sight: Sight, cost: Cost) -> tuple[Triple, int, float]:
    """What the best candidate is made from, its block and its cost."""
    able = candidates.only(candidates.reaches)
    costs = cost(able)
    tie = TIE_PER_TILE if sight.per_tile else TIE
    tied = np.flatnonzero(costs <= costs.min() * tie).tolist()
    row = min(tied, key=lambda row: _shape(able, row))
    return _triple(able.made_from[row]), int(able.block[row]), float(costs[row])


def _most_cubic(some: _Candidates) -> Triple:
    row = min(range(len(some.tiles)), key=lambda row: _shape(some, row))
    return _triple(some.made_from[row])


def _shape(some: _Candidates, row: int) -> tuple[float, ...]:
    """Less for more cubic tiles, then for larger ones."""
    tile = some.tile[row].tolist()
    size = -math.prod(tile), -int(some.block[row])
    return max(tile) / min(tile), *size, *some.made_from[row].tolist()


def _triple(numbers: np.ndarray) -> Triple:
    t, h, w = numbers.tolist()
    return t, h, w


def _slots(visits: Any, blocks: Any, block: Any, others: int) -> Any:
    """Launched slots: the video's visits, and the other tokens' rows and columns."""
    wide = BLOCK_SIZES[-1]
    extra = math.ceil(others / wide)
    return block * block * visits + extra * wide * (2 * blocks * block + extra * wide)


def _candidates(
    grid: Triple,
    sight: Sight,
    made_from: Sequence[Triple],
    blocks: Sequence[int],
    split: Callable[[int, int], tuple[int, ...]],
) -> _Candidates:
    """Every distinct cut of an axis is looked at once; a candidate is a product of three."""
    numbers = np.array(made_from)
    columns = []
    for axis in range(3):
        distinct, which = np.unique(numbers[:, axis], return_inverse=True)
        cuts = [
            _cut(grid, sight, axis, split(grid[axis], number), number)
            for number in distinct.tolist()
        ]
        columns.append(np.array(cuts)[which])
    tile = np.stack([column[:, 1] for column in columns], -1)
    parts, _, visits, bare, pairs, keys, lists, reaches = np.prod(columns, axis=0).T
    return _Candidates(
        numbers, np.array(blocks), parts, tile, visits, bare, pairs, keys, lists, reaches > 0
    )


def _cut(
    grid: Triple, sight: Sight, axis: int, sizes: tuple[int, ...], edge: int
) -> tuple[int, ...]:
    """Of one axis alone: parts, largest part, visits, those to parts as long as `edge`, pairs,
    keys, lists and reach (0 or 1)."""
    seen = sight.sees(grid, axis, sizes)
    tokens = np.array(sizes)
    keys = seen @ tokens
    lists = dict(zip(map(bytes, np.packbits(seen, axis=1)), keys.tolist(), strict=True))
    reach = int(sight.reaches(grid, axis, sizes))
    return (
        len(sizes), max(sizes), int(seen.sum()), int(seen[:, tokens == edge].sum()),
        int(tokens @ keys),
        sum(lists.values()), len(lists), reach,
    )  # fmt: skip


def even_counts(grid: Triple, block: int) -> list[Triple]:
    """Tile counts of all even splits with tiles of at most `block` tokens, none dominated."""
    axes = [_edges(size) for size in grid]
    return [
        (nt, nh, nw)
        for t, nt in axes[0]
        if t <= block
        for h, nh in axes[1]
        if t * h <= block
        for w, nw in axes[2]
        if t * h * w <= block
    ]


def _edges(size: int) -> list[tuple[int, int]]:
    """(largest part, fewest parts that give it) of the ways to cut an axis evenly."""
    found = {math.ceil(size / parts): parts for parts in range(size, 0, -1)}
    for longest, tried in LONG:
        if size > longest:
            found = {edge: found[edge] for edge in sorted(found) if edge in tried}
            break
    return sorted(found.items())


def power_boxes(grid: Triple, block: int) -> list[Triple]:
    """Boxes of `block` tokens with powers of two as edges, none twice as long as its axis."""
    powers = [1 << n for n in range(block.bit_length())]
    found = [(t, h, block // (t * h)) for t in powers for h in powers if t * h <= block]
    snug = [
        box
        for box in found
        if all(edge < 2 * size or edge == 1 for edge, size in zip(box, grid, strict=True))
    ]
    return snug or found
