"""Cutting the video grid into blocks: tiles of at most 128 tokens, never padded in memory.

A tile shape is chosen for a grid *and* a window: among all splits whose tiles fit a block, the one
whose plan costs least at (at least) the asked window. On a GPU every tile occupies a whole block of
the kernel, so the cost counts slots; the CPU backend works on the tiles' own lengths, merges query
tiles that see the same keys and pays for gathering those keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_accel.errors import DitAccelError, unknown

BLOCK_SIZES = (64, 128)
# Relative speed of the portable kernel per launched pair, by block size.
BLOCK_EFFICIENCY: Mapping[int, float] = {64: 0.75, 128: 1.0}
# CPU: gathering a key and value, once per group of queries, costs about as much as this many of
# its scores (measured: two cores, float32, four heads of 64).
GATHER_ROWS = 110
MIN_CPU_TILE = 32
# Costs this close count as equal; the most cubic tile wins then.
TIE = 1.08

Triple = tuple[int, int, int]


def even_split(length: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` consecutive parts of `length`, differing by at most 1, larger ones first."""
    size, longer = divmod(length, parts)
    return (size + 1,) * longer + (size,) * (parts - longer)


def clipped_split(length: int, size: int) -> tuple[int, ...]:
    """Parts of exactly `size`, the last one clipped at the edge."""
    parts, rest = divmod(length, size)
    return (size,) * parts + ((rest,) if rest else ())


@dataclass(frozen=True)
class Tiling:
    """The grid cut along each axis; a tile is the product of one part per axis.

    parts: per axis, the sizes (tokens) of its consecutive parts.
    block: slots that the kernel spends on a tile (64 or 128).
    box: the tile, where each tile is this box clipped at the far edges, its edges are powers of two
        and its tokens are `block`: what hardware copies as one box. Else None.
    """

    parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    block: int
    box: Triple | None = None

    @property
    def counts(self) -> Triple:
        """Number of tiles per axis."""
        return len(self.parts[0]), len(self.parts[1]), len(self.parts[2])

    @property
    def tile(self) -> Triple:
        """The largest tile, (t, h, w) in tokens."""
        return max(self.parts[0]), max(self.parts[1]), max(self.parts[2])

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return math.prod(self.counts)


@dataclass(frozen=True)
class Window:
    """How far a query sees along (T, H, W): a number of tiles or tokens, or a fraction of the axis.

    On an axis of n tiles a window becomes an odd number of tiles k <= n, or n itself: the smallest
    odd number that is not below the asked share (`value` tiles, `value / length * n` for tokens,
    `value * n` for fractions). So the mean window is at least what was asked, every query sees
    exactly k tiles, and an even number of tiles k < n means k + 1, as sliding tile attention's own
    rule |centre - tile| <= k // 2 has it.
    """

    unit: str
    values: tuple[float, float, float]

    UNITS = ("tiles", "tokens", "fraction")

    @classmethod
    def parse(cls, window: object) -> Window:
        """A window from `{unit: [t, h, w]}`; DitAccelError if it is none."""
        if isinstance(window, Window):
            return window
        if not isinstance(window, Mapping) or len(window) != 1:
            raise DitAccelError(
                "window: expected one of {tiles = [t, h, w]}, {tokens = [t, h, w]}, "
                f"{{fraction = [t, h, w]}}, got {window!r}."
            )
        unit, values = next(iter(window.items()))
        if unit not in cls.UNITS:
            raise unknown("unit of window", str(unit), cls.UNITS)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 3:
            raise DitAccelError(f"window.{unit}: expected three values [t, h, w], got {values!r}.")
        for value in values:
            _check_window_value(unit, value)
        return cls(unit, (values[0], values[1], values[2]))

    def as_dict(self) -> dict[str, list[float]]:
        """The form that a profile file has."""
        return {self.unit: list(self.values)}

    def tiles(self, axis: int, length: int, parts: int) -> int:
        """Number of tiles that a query sees on an axis of `length` tokens in `parts` tiles."""
        value = self.values[axis]
        share = {"tiles": value, "tokens": value / length * parts, "fraction": value * parts}
        whole = max(1, math.ceil(share[self.unit] - 1e-6))
        return min(parts, whole + 1 - whole % 2)

    def tokens(self, axis: int, length: int) -> float:
        """The asked width in tokens (for a window in tiles, the whole axis)."""
        value = self.values[axis]
        asked = {"tiles": length, "tokens": value, "fraction": value * length}
        return min(length, asked[self.unit])


def _check_window_value(unit: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and math.isfinite(value)  # type: ignore[arg-type]
    if unit == "fraction":
        if not number or not 0 < value <= 1:  # type: ignore[operator]
            raise DitAccelError(
                f"window.fraction: expected 0 < value <= 1, got {value!r}; the nearest legal value "
                f"is {1.0 if number and value > 1 else 0.1}."  # type: ignore[operator]
            )
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        legal = max(1, round(value)) if number else 1  # type: ignore[call-overload]
        raise DitAccelError(
            f"window.{unit}: expected whole numbers >= 1, got {value!r}; "
            f"the nearest legal value is {legal}."
        )


def parse_tile(tile: object) -> str | Triple:
    """`"auto"` or a tile (t, h, w) of at most 128 tokens; DitAccelError if it is neither."""
    if tile == "auto":
        return "auto"
    sizes = tuple(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else ()
    if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes):
        raise DitAccelError(f'tile: expected "auto" or [t, h, w] with sizes >= 1, got {tile!r}.')
    if math.prod(sizes) > BLOCK_SIZES[-1]:
        raise DitAccelError(
            f"tile: expected at most {BLOCK_SIZES[-1]} tokens, got {list(sizes)} = "
            f"{math.prod(sizes)} tokens; a near legal value is {_shrunk(sizes)}."
        )
    return sizes[0], sizes[1], sizes[2]


def _shrunk(sizes: Sequence[int]) -> list[int]:
    shrunk = list(sizes)
    while math.prod(shrunk) > BLOCK_SIZES[-1]:
        largest = shrunk.index(max(shrunk))
        shrunk[largest] = (shrunk[largest] + 1) // 2
    return shrunk


def fixed_tiling(grid: Triple, tile: Triple) -> Tiling:
    """Tiles of exactly `tile`, clipped at the far edges of the grid."""
    parts = tuple(clipped_split(size, edge) for size, edge in zip(grid, tile, strict=True))
    slots = math.prod(tile)
    if slots in BLOCK_SIZES and all(edge & (edge - 1) == 0 for edge in tile):
        return Tiling((parts[0], parts[1], parts[2]), slots, tile)
    largest = math.prod(max(axis) for axis in parts)
    return Tiling((parts[0], parts[1], parts[2]), _block_for(largest))


@lru_cache(maxsize=512)
def choose_tiling(
    grid: Triple,
    window: Window,
    *,
    padded: bool,
    others: int = 0,
    efficiency: tuple[tuple[int, float], ...] = tuple(BLOCK_EFFICIENCY.items()),
    boxes: bool = False,
) -> Tiling:
    """The split of `grid` that makes `window` cheapest: even, or in clipped boxes.

    padded: a tile occupies a whole block of the kernel (GPU); else its own length (CPU).
    others: number of tokens outside the video, seen by and seeing everything.
    efficiency: pairs (block size, relative speed), for padded planning.
    boxes: tiles are boxes with powers of two as edges, clipped at the far edges (see Tiling.box).

    A split is only a candidate when every query, away from the border, sees at least half of the
    asked half-width to either side (a window of one tile would see nothing past a tile's edge).
    Costs within 8 % count as equal: the most cubic tile of them wins, then the larger one.
    """
    speed = dict(efficiency)
    if boxes:
        return _choose_box(grid, window, others, speed)
    candidates = [
        (counts, block)
        for block in speed
        for counts in _even_counts(grid, block)
        if _reaches(grid, counts, window)
    ]
    if padded:
        costs = [_slot_cost(grid, counts, window, b, others) / speed[b] for counts, b in candidates]
    else:
        large = [c for c in candidates if math.prod(grid) // math.prod(c[0]) >= MIN_CPU_TILE]
        candidates = large or candidates
        costs = [_gather_cost(grid, counts, window, others) for counts, _ in candidates]
    limit = min(costs) * TIE
    tied = [c for c, cost in zip(candidates, costs, strict=True) if cost <= limit]
    counts, block = min(tied, key=_preference(grid))
    parts = tuple(even_split(size, n) for size, n in zip(grid, counts, strict=True))
    largest = math.prod(max(axis) for axis in parts)
    return Tiling((parts[0], parts[1], parts[2]), block if padded else _block_for(largest))


def _choose_box(grid: Triple, window: Window, others: int, speed: Mapping[int, float]) -> Tiling:
    candidates = [box for block in speed for box in _boxes(grid, block)]
    costs: dict[Triple, float] = {}
    for near in (True, False):  # a grid smaller than any box may reach nowhere
        for box in candidates:
            counts = (-(-grid[0] // box[0]), -(-grid[1] // box[1]), -(-grid[2] // box[2]))
            block = math.prod(box)
            if not near or _reaches(grid, counts, window):
                costs[box] = _slot_cost(grid, counts, window, block, others) / speed[block]
        if costs:
            break
    limit = min(costs.values()) * TIE
    tied = [box for box, cost in costs.items() if cost <= limit]
    return fixed_tiling(
        grid, min(tied, key=lambda box: (max(box) / min(box), -math.prod(box), box))
    )


def _boxes(grid: Triple, block: int) -> list[Triple]:
    """Boxes of `block` tokens with powers of two as edges, none twice as long as its axis."""
    powers = [1 << n for n in range(block.bit_length())]
    found = [(t, h, block // (t * h)) for t in powers for h in powers if t * h <= block]
    return [
        box
        for box in found
        if all(edge < 2 * size or edge == 1 for edge, size in zip(box, grid, strict=True))
    ] or found


def _block_for(tokens: int) -> int:
    return next(size for size in BLOCK_SIZES if tokens <= size)


def _even_counts(grid: Triple, block: int) -> list[Triple]:
    """Tile counts of all even splits with tiles of at most `block` tokens, none dominated."""
    axes = [
        sorted({math.ceil(size / parts): parts for parts in range(size, 0, -1)}.items())
        for size in grid
    ]  # largest part -> fewest parts that give it
    return [
        (nt, nh, nw)
        for t, nt in axes[0]
        if t <= block
        for h, nh in axes[1]
        if t * h <= block
        for w, nw in axes[2]
        if t * h * w <= block
    ]


def _reaches(grid: Triple, counts: Triple, window: Window) -> bool:
    for axis, (length, parts) in enumerate(zip(grid, counts, strict=True)):
        seen = window.tiles(axis, length, parts)
        asked = window.tokens(axis, length)
        if window.unit != "tiles" and seen < parts:
            side = seen // 2 * (length / parts)
            if side < (asked - 1) / 4:
                return False
    return True


def _slot_cost(grid: Triple, counts: Triple, window: Window, block: int, others: int) -> float:
    queries = math.prod(counts)
    keys = math.prod(window.tiles(a, grid[a], counts[a]) for a in range(3))
    extra = math.ceil(others / BLOCK_SIZES[-1])
    wide = BLOCK_SIZES[-1]
    return block * block * queries * keys + extra * wide * (2 * queries * block + extra * wide)


def _gather_cost(grid: Triple, counts: Triple, window: Window, others: int) -> float:
    axes = [_axis_sums(grid[a], counts[a], window.tiles(a, grid[a], counts[a])) for a in range(3)]
    pairs = math.prod(axis[0] for axis in axes) + others * math.prod(grid)
    groups = math.prod(axis[2] for axis in axes)
    keys = math.prod(axis[1] for axis in axes) + others * groups
    return pairs + GATHER_ROWS * keys


@lru_cache(maxsize=4096)
def _axis_sums(length: int, parts: int, window: int) -> tuple[int, int, int]:
    """(sum of query x key lengths, sum of key lengths over distinct centres, distinct centres)."""
    sizes = even_split(length, parts)
    seen: dict[int, int] = {}
    pairs = 0
    for tile, size in enumerate(sizes):
        first, stop = visible_range(tile, window, parts)
        seen[first] = sum(sizes[first:stop])
        pairs += size * seen[first]
    return pairs, sum(seen.values()), len(seen)


def visible_range(tile: int, window: int, parts: int) -> tuple[int, int]:
    """[first, stop) of the tiles that tile number `tile` of `parts` sees.

    `window` is odd, or at least `parts`: the centre is moved inward at the borders, so that every
    tile sees exactly `window` tiles.
    """
    if window >= parts:
        return 0, parts
    half = window // 2
    centre = min(max(tile, half), parts - 1 - half)
    return centre - half, centre + half + 1


def _preference(grid: Triple) -> Callable[[tuple[Triple, int]], tuple[float, ...]]:
    def key(candidate: tuple[Triple, int]) -> tuple[float, ...]:
        counts, block = candidate
        tile = [math.ceil(size / n) for size, n in zip(grid, counts, strict=True)]
        return max(tile) / min(tile), -math.prod(tile), -block, *counts

    return key
