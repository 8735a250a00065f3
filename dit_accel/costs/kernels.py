"""Prices that the kernels read: how work is dealt, how a grid is cut, when pooled keys go apart.

All are those of this machine's GPU where its table has them, else those of an H200.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from dit_accel.costs.files import constant, reference

BLOCKS = (64, 128)
"""Slots that a block of the portable kernel may have."""


class DealWeights(NamedTuple):
    """What an item takes, in tenths of a tile without a mask: each of its tiles, those whose scores
    are masked by length or by a token rule as well, and its beginning and end."""

    tile: int
    short: int
    masked: int
    item: int


class TilePrices(NamedTuple):
    """What the choice of a tile weighs.

    speed: pairs (block size, relative speed of the portable kernel per launched pair).
    clipped: time of a box that an edge of the grid clips over a whole one's, where boxes are read
        where they are; it takes the kernel's masked step.
    gather_rows: scores that cost as much as gathering a key and value once, on a CPU.
    """

    speed: tuple[tuple[int, float], ...]
    clipped: float
    gather_rows: int


@lru_cache(maxsize=1)
def deal_weights() -> DealWeights:
    """Of the Hopper kernel's items."""
    return DealWeights(*(int(_own("hopper", f"deal_{part}")) for part in DealWeights._fields))


@lru_cache(maxsize=1)
def tile_prices() -> TilePrices:
    """Of all kinds of tiles: the same on every machine, as plans are made apart from the GPU."""
    return TilePrices(
        tuple((block, _there(reference("cuda", "triton", f"speed_{block}"))) for block in BLOCKS),
        _there(reference("cuda", "hopper", "clipped")),
        int(_there(reference("cpu", "torch", "gather_rows"))),
    )


MERGING = 3
"""Passes: two results in, one out."""
MOVING = 8
"""Passes: q, k, v and the output in another order, in and out."""
MARGIN = 2.0
"""How many times the passes must be saved: launches and the host's part are not counted."""


def split_pays(head_dim: int, visits: float, block_k: int, *, gathered: bool, moved: bool) -> bool:
    """Whether a plan with pooled keys is worth two kernels: pooled keys on the portable one, the
    blocks on Hopper's.

    The portable kernel takes both in one launch. It computes the pooled keys in either case, so
    that the split saves time on every visit of a block, and spends it on passes over the results.

    Args:
        visits: key blocks of a list on average, of `block_k` slots.
        gathered: whether the portable kernel gathers its keys.
        moved: whether the Hopper kernel has tokens moved for it.
    """
    portable = "triton gathered" if gathered else "triton"
    saved = _own(portable, "split_visit", head_dim) - _own("hopper", "split_visit", head_dim)
    passes = MERGING + (MOVING if moved else 0)
    spent = passes * _own("hopper", "split_pass") * head_dim
    return saved * visits * block_k / 128 > MARGIN * spent


@lru_cache(maxsize=32)
def _own(backend: str, name: str, head_dim: int = 0) -> float:
    """Of this machine's GPU."""
    return _there(constant("cuda", backend, name, head_dim))


def _there(value: float | None) -> float:
    assert value is not None, "the reference tables have every constant"
    return value
