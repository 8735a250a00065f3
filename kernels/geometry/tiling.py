"""Cutting the video grid into blocks of at most 128 tokens, never padded in memory.

The grid is cut along each axis; a tile is the product of one part per axis. A block is a tile, or,
in a tiling that straddles, 128 consecutive tokens in tile order across tile borders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from dit_accel.errors import DitAccelError, shown

BLOCK_SIZES = (64, 128)

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
    block: slots that the kernel spends on a block (64 or 128).
    box: the tile, where each tile is this box clipped at the far edges, its edges are powers of two
        and its tokens are `block`: what hardware copies as one box. Else None.
    straddles: blocks are `block` consecutive tokens in tile order, else tiles.
    dilation: the axes are cut in another order: tokens of the same x mod dilation stand together,
        groups one after another. Parts, boxes and ranges then mean places in that order.
    """

    parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    block: int
    box: Triple | None = None
    straddles: bool = False
    dilation: Triple = (1, 1, 1)

    @property
    def grid(self) -> Triple:
        """The grid that is cut, in tokens."""
        return sum(self.parts[0]), sum(self.parts[1]), sum(self.parts[2])

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

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-math.prod(self.grid) // self.block) if self.straddles else self.tiles

    @property
    def segments(self) -> int:
        """Tiles that a block touches, at most."""
        if not self.straddles:
            return 1
        smallest = math.prod(map(min, self.parts))
        return min(self.block, (self.block - 2) // smallest + 2, self.tiles)

    @property
    def waste(self) -> float:
        """Slots of all blocks over tokens, where a block always takes `block` slots."""
        return self.blocks * self.block / math.prod(self.grid)

    @property
    def raster(self) -> bool:
        """Whether tile order is raster order."""
        if max(self.dilation) > 1:
            return False
        cut = [axis for axis, parts in enumerate(self.parts) if len(parts) > 1]
        return not cut or all(
            len(parts) == size
            for parts, size in zip(self.parts[: cut[-1]], self.grid[: cut[-1]], strict=True)
        )

    @property
    def words(self) -> str:
        """How the grid is cut, in words that follow a number of blocks."""
        if self.straddles and self.raster:
            return "runs of consecutive tokens"
        if self.straddles:
            return f"runs across tiles of {_sizes(self.tile)}"
        if max(self.dilation) > 1:
            return f"tiles of {_sizes(self.tile)}, {_sizes(self.dilation)} apart"
        return f"boxes of {_sizes(self.box)}" if self.box else f"tiles of {_sizes(self.tile)}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each block."""
        if self.straddles:
            return clipped_split(math.prod(self.grid), self.block)
        t, h, w = (np.array(axis) for axis in self.parts)
        return tuple((t[:, None, None] * h[:, None] * w).ravel().tolist())


def _sizes(sizes: Triple) -> str:
    return "x".join(map(str, sizes))


def fixed_tiling(grid: Triple, tile: Triple) -> Tiling:
    """Tiles of exactly `tile`, clipped at the far edges of the grid."""
    parts = tuple(clipped_split(size, edge) for size, edge in zip(grid, tile, strict=True))
    slots = math.prod(tile)
    if slots in BLOCK_SIZES and all(edge & (edge - 1) == 0 for edge in tile):
        return Tiling((parts[0], parts[1], parts[2]), slots, tile)
    return Tiling((parts[0], parts[1], parts[2]), block_for(math.prod(map(max, parts))))


def even_tiling(grid: Triple, counts: Triple, block: int | None = None) -> Tiling:
    """Each axis in even parts; blocks of `block` slots, else as few as hold a tile."""
    t, h, w = (even_split(size, n) for size, n in zip(grid, counts, strict=True))
    return Tiling((t, h, w), block or block_for(t[0] * h[0] * w[0]))


def raster_runs(grid: Triple) -> Tiling:
    """Runs of 128 consecutive raster tokens: nothing moves."""
    return Tiling(((1,) * grid[0], (1,) * grid[1], (grid[2],)), BLOCK_SIZES[-1], straddles=True)


def column_runs(grid: Triple) -> Tiling:
    """Runs of 128 consecutive tokens in the order (h, w, t): all frames of a place together."""
    return Tiling(((grid[0],), (1,) * grid[1], (1,) * grid[2]), BLOCK_SIZES[-1], straddles=True)


def block_for(tokens: int) -> int:
    """The smallest block that holds so many tokens."""
    return next(size for size in BLOCK_SIZES if tokens <= size)


def grouped(length: int, dilation: int) -> np.ndarray:
    """int64 [n]: the tokens of an axis, dilation groups one after another."""
    return np.argsort(np.arange(length) % dilation, kind="stable")


def parse_tile(tile: object) -> str | Triple:
    """`"auto"` or a tile (t, h, w) of at most 128 tokens; DitAccelError if it is neither."""
    if tile == "auto":
        return "auto"
    sizes = tuple(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else ()
    if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes):
        raise DitAccelError(
            f'tile: expected "auto" or [t, h, w] with sizes >= 1, got {shown(tile)}.'
        )
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


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the blocks of a tiling are: each a union of at most `segments` boxes of the grid.

    low, high: int32 [N * segments, 3], the boxes [low, high), block by block; a block with fewer
        boxes names its last one again.
    dilation: see Tiling; where it is above 1, boxes are of places.
    """

    low: np.ndarray
    high: np.ndarray
    segments: int
    dilation: Triple = (1, 1, 1)

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return len(self.low) // self.segments

    @cached_property
    def ranges(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Per axis: the distinct ranges [U, 2] and which of them each box has [N * segments]."""
        found = []
        for axis in range(3):
            span = int(self.high[:, axis].max()) + 1
            codes = self.low[:, axis].astype(np.int64) * span + self.high[:, axis]
            unique, place = np.unique(codes, return_inverse=True)
            found.append((np.stack([unique // span, unique % span], -1), place))
        return tuple(found)

    def rows(self, first: int, stop: int) -> Geometry:
        """Blocks `first` to `stop` alone."""
        some = slice(first * self.segments, stop * self.segments)
        return Geometry(self.low[some], self.high[some], self.segments, self.dilation)

    def pick(self, blocks: np.ndarray) -> Geometry:
        """Some blocks alone."""
        some = (blocks[:, None] * self.segments + np.arange(self.segments)).ravel()
        return Geometry(self.low[some], self.high[some], self.segments, self.dilation)


@lru_cache(maxsize=64)
def geometry(tiling: Tiling) -> Geometry:
    """The boxes of a tiling's blocks."""
    low, high = _tile_boxes(tiling)
    if tiling.straddles:
        return _straddling(tiling, low, high)
    return Geometry(low, high, 1, tiling.dilation)


def _tile_boxes(tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    stops = [np.cumsum(parts) for parts in tiling.parts]
    ends = np.meshgrid(*stops, indexing="ij")
    starts = np.meshgrid(
        *(stop - np.array(parts) for stop, parts in zip(stops, tiling.parts, strict=True)),
        indexing="ij",
    )
    low, high = (np.stack(axes, -1).reshape(-1, 3).astype(np.int32) for axes in (starts, ends))
    return low, high


def _straddling(tiling: Tiling, low: np.ndarray, high: np.ndarray) -> Geometry:
    """Each run of `block` positions as the boxes around its share of every tile that it touches."""
    stops = np.cumsum((high - low).prod(-1, dtype=np.int64))
    starts = np.concatenate([[0], stops[:-1]])
    begin = np.arange(tiling.blocks) * tiling.block
    end = np.minimum(begin + tiling.block, stops[-1])
    first = np.searchsorted(stops, begin, side="right")
    last = np.searchsorted(starts, end, side="left") - 1
    segments = int((last - first).max()) + 1
    tile = np.minimum(first[:, None] + np.arange(segments), last[:, None])
    a = np.maximum(begin[:, None] - starts[tile], 0).ravel()
    z = (np.minimum(end[:, None], stops[tile]) - starts[tile]).ravel() - 1
    tile = tile.ravel()
    return Geometry(*_share(low[tile], high[tile], a, z), segments, tiling.dilation)


def _share(
    low: np.ndarray, high: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes around places first..last (raster order within the tile) of tiles [low, high)."""
    size = high - low
    low, high = low.copy(), high.copy()
    alone = np.ones(len(low), bool)  # within one index of all axes before
    for axis, inner in ((0, size[:, 1] * size[:, 2]), (1, size[:, 2]), (2, 1)):
        begin, end = first // inner % size[:, axis], last // inner % size[:, axis]
        origin = low[:, axis].copy()
        low[alone, axis] = (origin + begin)[alone]
        high[alone, axis] = (origin + end + 1)[alone]
        alone &= begin == end
    return low, high
