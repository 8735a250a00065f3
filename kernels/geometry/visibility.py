"""Which blocks a rule can see at all, and which it sees whole, from the boxes of the blocks.

A relation bounds a token rule over boxes of the grid. Axes are at most some hundred tokens long, so
what one axis says is worked out on the host over its distinct ranges; only the combination over
pairs of blocks runs on the plan's device. Nothing here grows with tokens squared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dit_accel.kernels.geometry.tiling import Geometry, Triple, grouped

NONE, SOME, EVERY = 0, 1, 2


class Relation(ABC):
    """Bounds of a token rule over pairs of blocks.

    by_parts: whether blocks of several boxes are looked at box by box.
    """

    by_parts: ClassVar[bool] = False

    @abstractmethod
    def codes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """uint8 [Nq, Nk]: NONE where no token pair counts, EVERY only where all do, else SOME."""


class BoxRelation(Relation):
    """A relation that bounds pairs of boxes; a block is the union of its boxes."""

    by_parts: ClassVar[bool] = True

    def codes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        codes = self.boxes(queries, keys, device)
        if queries.segments == keys.segments == 1:
            return codes
        pairs = codes.view(queries.blocks, queries.segments, keys.blocks, keys.segments)
        some, every = pairs.amax((1, 3)) > NONE, pairs.amin((1, 3)) == EVERY
        return some.to(torch.uint8) + every

    @abstractmethod
    def boxes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """Codes of all pairs of boxes, [Nq * segments, Nk * segments]."""


@dataclass(frozen=True, eq=False)
class Whole(Relation):
    """Every pair counts."""

    def codes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        shape = queries.blocks, keys.blocks
        return torch.full(shape, EVERY, dtype=torch.uint8, device=device)


@dataclass(frozen=True, eq=False)
class Separable(BoxRelation):
    """Pairs that every axis allows: bool [n, n] over the tokens of an axis, by axis.

    The one relation that also bounds boxes of dilated tilings.
    """

    axes: Mapping[int, np.ndarray]

    def boxes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        found = []
        for axis, allowed in self.axes.items():
            if queries.dilation[axis] > 1:
                place = grouped(len(allowed), queries.dilation[axis])
                allowed = allowed[place][:, place]
            seen = range_codes(allowed, queries.ranges[axis][0], keys.ranges[axis][0])
            found.append(_spread(seen, queries, keys, axis, device))
        return reduce(torch.minimum, found)


@dataclass(frozen=True, eq=False)
class AnyOf(Relation):
    """Pairs that at least one relation allows; EVERY where one of them alone allows all."""

    by_parts: ClassVar[bool] = True

    relations: tuple[Relation, ...]

    def codes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        return reduce(torch.maximum, (r.codes(queries, keys, device) for r in self.relations))


@dataclass(frozen=True, eq=False)
class DiscRelation(BoxRelation):
    """Pairs of allowed frames ([T, T]) whose squared spatial distance is below `limit`."""

    frames: np.ndarray
    limit: int

    def boxes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        codes = Separable({0: self.frames}).boxes(queries, keys, device)
        (h0, h1), (w0, w1) = (
            _distances(queries.ranges[axis][0], keys.ranges[axis][0]) for axis in (1, 2)
        )
        near, far = (
            _spread(h**2, queries, keys, 1, device) + _spread(w**2, queries, keys, 2, device)
            for h, w in ((h0, w0), (h1, w1))
        )
        return torch.minimum(codes, _two_steps(near < self.limit, far < self.limit))


@dataclass(frozen=True, eq=False)
class FrameBands(BoxRelation):
    """Pairs whose raster places in their frames are at most widths[t, t'] apart; -1 allows none.

    row: tokens of a row of a frame.
    """

    widths: np.ndarray
    row: int

    def boxes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        frames = queries.ranges[0][0], keys.ranges[0][0]
        widest, narrowest = (
            _spread(_over_ranges(self.widths, *frames, pick), queries, keys, 0, device)
            for pick in (np.maximum, np.minimum)
        )
        (h0, h1), (w0, w1) = (_differences(queries, keys, axis, device) for axis in (1, 2))
        near = _nearest_in_rows(0, self.row, (h0, h1), (w0, w1))
        far = torch.maximum(h1 * self.row + w1, -(h0 * self.row + w0))
        return _two_steps(near <= widest, far <= narrowest)


@dataclass(frozen=True, eq=False)
class Band(BoxRelation):
    """Pairs whose places along an order of the axes are at most `width` apart, and early keys.

    order: the axes, slowest first. grid: their lengths. Keys before `sink` are always seen.
    """

    grid: Triple
    order: Triple
    width: int
    sink: int
    by_parts: ClassVar[bool] = False

    @property
    def strides(self) -> Triple:
        """Places between neighbours along (t, h, w)."""
        strides, step = [0, 0, 0], 1
        for axis in reversed(self.order):
            strides[axis], step = step, step * self.grid[axis]
        return strides[0], strides[1], strides[2]

    def codes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation. Blocks of several boxes count as all places from their first to last."""
        if queries.segments == keys.segments == 1:
            return self.boxes(queries, keys, device)
        (q0, q1), (k0, k1) = (self._places(side, device) for side in (queries, keys))
        first, last = q0[:, None] - k1, q1[:, None] - k0
        near = torch.maximum(first, -last)
        return self._banded(near, torch.maximum(last, -first), k0, k1)

    def boxes(self, queries: Geometry, keys: Geometry, device: torch.device) -> Tensor:
        """See Relation."""
        slow, middle, fast = self.order
        apart = [_differences(queries, keys, axis, device) for axis in range(3)]
        step, row, _ = sorted(self.strides, reverse=True)
        low, high = apart[slow]
        near = torch.stack(
            [
                _nearest_in_rows(
                    torch.minimum(torch.maximum(torch.full_like(low, turn), low), high) * step,
                    row,
                    apart[middle],
                    apart[fast],
                )
                for turn in (-1, 0, 1)
            ]
        ).amin(0)
        first, last = (
            apart[slow][end] * step + apart[middle][end] * row + apart[fast][end] for end in (0, 1)
        )
        k0, k1 = self._places(keys, device)
        return self._banded(near, torch.maximum(last, -first), k0, k1)

    def _banded(self, near: Tensor, far: Tensor, first: Tensor, last: Tensor) -> Tensor:
        some = (near <= self.width) | (first < self.sink)
        return _two_steps(some, (far <= self.width) | (last < self.sink))

    def _places(self, side: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
        strides = np.array(self.strides)
        first = (side.low * strides).sum(-1).reshape(-1, side.segments).min(-1)
        last = ((side.high - 1) * strides).sum(-1).reshape(-1, side.segments).max(-1)
        return _send(first, device), _send(last, device)


def range_codes(allowed: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """uint8 [Uq, Uk]: codes of a bool [n, n] axis over ranges [Uq, 2] and [Uk, 2]."""
    sums = np.zeros((allowed.shape[0] + 1, allowed.shape[1] + 1), np.int64)
    sums[1:, 1:] = allowed.cumsum(0).cumsum(1)
    (q0, q1), (k0, k1) = queries.T, keys.T
    counts = sums[q1][:, k1] - sums[q0][:, k1] - sums[q1][:, k0] + sums[q0][:, k0]
    area = (q1 - q0)[:, None] * (k1 - k0)
    return (counts > 0).astype(np.uint8) + (counts == area)


def _over_ranges(
    values: np.ndarray, queries: np.ndarray, keys: np.ndarray, pick: np.ufunc
) -> np.ndarray:
    """[Uq, Uk]: the largest or smallest of values [n, n] over ranges."""
    rows = np.stack([pick.reduce(values[low:high], axis=0) for low, high in queries])
    return np.stack([pick.reduce(rows[:, low:high], axis=1) for low, high in keys], -1)


def _distances(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest |q - k| over ranges [Uq, 2] and [Uk, 2]."""
    first, last = _apart(queries, keys)
    return np.maximum(np.maximum(first, -last), 0), np.maximum(last, -first)


def _apart(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest q - k over ranges."""
    (q0, q1), (k0, k1) = queries.T, keys.T
    return q0[:, None] - k1 + 1, q1[:, None] - 1 - k0


def _differences(
    queries: Geometry, keys: Geometry, axis: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Smallest and largest q - k along an axis, int32 [Nq, Nk] each."""
    first, last = _apart(queries.ranges[axis][0], keys.ranges[axis][0])
    return (
        _spread(first, queries, keys, axis, device),
        _spread(last, queries, keys, axis, device),
    )


def _nearest_in_rows(
    start: Tensor | int, row: int, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Smallest |start + row * i + j| over i in `rows` and j in `columns` (ends included)."""
    turn = torch.div(-columns[1] - start, row, rounding_mode="floor")
    found = []
    for i in (turn, turn + 1):  # the distance is convex in i
        at = torch.minimum(torch.maximum(i, rows[0]), rows[1]) * row + start
        found.append(torch.maximum(at + columns[0], -(at + columns[1])))
    return torch.minimum(*found).clamp_min(0)


def _two_steps(some: Tensor, every: Tensor) -> Tensor:
    return some.to(torch.uint8) + (some & every)


def _spread(
    table: np.ndarray, queries: Geometry, keys: Geometry, axis: int, device: torch.device
) -> Tensor:
    """Values over the distinct ranges of an axis, for all pairs of boxes."""
    kind = table if table.dtype == np.uint8 else table.astype(np.int32)
    places = (_send(side.ranges[axis][1], device) for side in (queries, keys))
    rows, columns = places
    return torch.from_numpy(kind).to(device).index_select(0, rows).index_select(1, columns)


def _send(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32)).to(device)


def axis_parts(sizes: Sequence[int]) -> np.ndarray:
    """Ranges [n, 2] of consecutive parts of these sizes."""
    stops = np.cumsum(sizes)
    return np.stack([stops - np.array(sizes), stops], -1)
