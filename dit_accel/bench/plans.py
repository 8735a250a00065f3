"""Plans of a wanted density: random lists of blocks, and windows of a real pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from dit_accel.bench.cases import Case
from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.patterns.base import LayoutKind, kind_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import BlockPlan, BlockTable
from dit_accel.kernels.tiling import Tiling, Window, clipped_split, visible_range
from dit_accel.layout import TokenLayout

FRAMES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
SIDES = (0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Widths of windows, as fractions of an axis, that are tried to meet a density."""
LAYOUT_KINDS: dict[str, LayoutKind] = {"hopper": "boxes"}
"""Backends that read tiles in another way than their device's default."""


@dataclass(frozen=True)
class PlanKind:
    """A way to make a plan of about a density for a case; `note` says what was made."""

    title: str
    build: Callable[[Case, float, torch.device, LayoutKind, object], tuple[BlockPlan, str]]
    needs_grid: bool = False


def random_plan(
    length: int,
    density: float,
    device: torch.device,
    *,
    block_k: int = 128,
    heads: int = 1,
    seed: int = 0,
) -> BlockPlan:
    """Consecutive blocks of 128 queries, each with the same number of random key blocks.

    Lists are ascending and differ per head where `heads` is above 1. The last block is short where
    the length is no multiple.
    """
    q_lengths, k_lengths = (
        torch.tensor(clipped_split(length, size), dtype=torch.int32, device=device)
        for size in (128, block_k)
    )
    queries, keys = len(q_lengths), len(k_lengths)
    visits = max(1, round(density * keys))
    generator = torch.Generator(device=device).manual_seed(seed)
    score = torch.rand((1, heads, queries, keys), generator=generator, device=device)
    index = score.topk(visits, dim=-1).indices.sort(-1).values.int()
    count = torch.full(index.shape[:3], visits, dtype=torch.int32, device=device)
    whole = (k_lengths == block_k)[index.long()].sum(-1, dtype=torch.int32)
    starts = [(lengths.cumsum(0) - lengths).int() for lengths in (q_lengths, k_lengths)]
    return BlockPlan(
        q_blocks=BlockTable(None, starts[0], q_lengths[None]),
        k_blocks=BlockTable(None, starts[1], k_lengths[None]),
        full_count=count,
        full_index=index,
        q_length=length,
        k_length=length,
        block_q=128,
        block_k=block_k,
        unmasked_count=whole,
    )


def sliding_tile(
    layout: TokenLayout,
    density: float,
    device: torch.device,
    layout_kind: LayoutKind,
    tile: object = "auto",
) -> SlidingTile:
    """The sliding tile pattern whose launched density is nearest to the one asked."""
    tried = _windows(layout, str(device), layout_kind, tile)
    return min(tried, key=lambda entry: abs(math.log(entry[1] / density)))[0]


@lru_cache(maxsize=32)
def _windows(
    layout: TokenLayout, device: str, layout_kind: LayoutKind, tile: object
) -> list[tuple[SlidingTile, float]]:
    """Patterns and the launched density of their plans, worked out without making them."""
    frames = FRAMES if layout.grid[0] > 1 else (1.0,)
    tried = []
    for t in frames:
        for side in SIDES:
            pattern = SlidingTile(window={"fraction": [t, side, side]}, tile=tile)
            tiling = pattern.tiling(layout, device, layout_kind=layout_kind)
            pairs = _pairs if layout_kind == "lengths" else _slots
            tried.append((pattern, pairs(layout, tiling, pattern.window) / layout.length**2))
    return tried


def _slots(layout: TokenLayout, tiling: Tiling, window: Window) -> int:
    """Slots launched where each visit takes a whole block.

    Each tile sees the same number of tiles; what is not video sees, and is seen by, everything.
    """
    seen = math.prod(
        window.tiles(axis, layout.grid[axis], tiling.counts[axis]) for axis in range(3)
    )
    others = sum(math.ceil(n / tiling.block) for n in (layout.before, layout.after))
    visits = tiling.tiles * (seen + others) + others * (tiling.tiles + others)
    return visits * tiling.block**2


def _pairs(layout: TokenLayout, tiling: Tiling, window: Window) -> int:
    """Token pairs visited where tiles take their own lengths."""
    pairs = 1
    for axis, parts in enumerate(tiling.parts):
        width = window.tiles(axis, layout.grid[axis], len(parts))
        ranges = [visible_range(number, width, len(parts)) for number in range(len(parts))]
        pairs *= sum(size * sum(parts[a:b]) for size, (a, b) in zip(parts, ranges, strict=True))
    others = layout.before + layout.after
    return pairs + others * (2 * layout.video_length + others)


def layout_kind_of(backend: str, device: torch.device) -> LayoutKind:
    """How a backend reads tiles, which decides how a grid is cut for it."""
    if device.type != "cpu":
        return LAYOUT_KINDS.get(backend, kind_for(device))
    return "lengths" if backend in ("torch", "reference") else "gather"


def _random(
    case: Case, density: float, device: torch.device, layout_kind: LayoutKind, tile: object
) -> tuple[BlockPlan, str]:
    return random_plan(case.layout.length, density, device), ""


def _gather(
    case: Case, density: float, device: torch.device, layout_kind: LayoutKind, tile: object
) -> tuple[BlockPlan, str]:
    return random_plan(case.layout.length, density, device, block_k=64), ""


def _per_head(
    case: Case, density: float, device: torch.device, layout_kind: LayoutKind, tile: object
) -> tuple[BlockPlan, str]:
    return random_plan(case.layout.length, density, device, heads=case.heads), ""


def _sliding(
    case: Case, density: float, device: torch.device, layout_kind: LayoutKind, tile: object
) -> tuple[BlockPlan, str]:
    pattern = sliding_tile(case.layout, density, device, layout_kind, tile)
    tiling = pattern.tiling(case.layout, device, layout_kind=layout_kind)
    shape = "x".join(map(str, tiling.tile))
    window = "/".join(f"{value:g}" for value in pattern.window.values)
    plan = plan_for(case.layout, pattern, device, layout_kind=layout_kind)
    return plan, f"tile {shape}, window {window}"


PLAN_KINDS: dict[str, PlanKind] = {
    "random": PlanKind("random 128-key blocks, one list for all heads", _random),
    "gather64": PlanKind("random 64-key blocks for 128 queries", _gather),
    "sliding_tile": PlanKind("sliding_tile, window nearest to the density", _sliding, True),
    "per_head": PlanKind("random 128-key blocks, lists of their own per head", _per_head),
}
QUICK_KINDS = ("random", "gather64", "sliding_tile")


def pick_kinds(names: tuple[str, ...], quick: bool) -> tuple[str, ...]:
    """The plan kinds that these names mean; DitAccelError for an unknown one."""
    for name in names:
        if name not in PLAN_KINDS:
            raise unknown("plan kind", name, PLAN_KINDS)
    return names or (QUICK_KINDS if quick else tuple(PLAN_KINDS))


def parse_tile(text: str) -> object:
    """`--tile`: "auto", or the sizes of a tile such as "2,8,8"."""
    if text == "auto":
        return text
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise DitAccelError(f"--tile: expected auto or three sizes such as 2,8,8, got {text!r}.")
    return tuple(int(part) for part in parts)
