"""Plans of a wanted density: random lists of blocks, and windows of a real pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from dit_accel.bench.cases import Case
from dit_accel.engine.route import plan_effort
from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.backends import BACKENDS, LAYOUT_KINDS
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.geometry.tiling import clipped_split
from dit_accel.kernels.geometry.windows import Window
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.patterns.base import LayoutKind, kind_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import BlockPlan, Visits, plan_of
from dit_accel.layout import TokenLayout

FRAMES = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
SIDES = tuple(round(0.04 * 1.15**n, 3) for n in range(23)) + (1.0,)
"""Widths of windows, as fractions of an axis, that are tried to meet a density."""
ASPECTS = (1.0, 1.3, 1 / 1.3)
NEAR = 0.08
"""Relative distance of a density that is near enough."""
SMALL_BLOCK = 0.7
"""How much nearer a plan of 64-token blocks must come."""


Build = Callable[[Case, float, torch.device, str, object], tuple[BlockPlan, str]]
"""(case, density, device, backend, tile) -> a plan, and what was made."""


@dataclass(frozen=True)
class PlanKind:
    """A way to make a plan of about a density for a case."""

    title: str
    build: Build
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
    blocks = Blocks(
        BlockTable(None, starts[0], q_lengths[None]),
        BlockTable(None, starts[1], k_lengths[None]),
        length,
        length,
        block_k=block_k,
    )
    first = torch.arange(count.numel(), dtype=torch.int32, device=device) * visits
    return plan_of(blocks, Visits(first.view(count.shape), whole, count, count, index.flatten()))


@dataclass(frozen=True)
class Made:
    """A pattern's plan: densities, block, and the backend's effort for a kept pair."""

    launched: float
    block: int
    effort: float


def sliding_tile(
    layout: TokenLayout,
    density: float,
    backend: str,
    device: torch.device,
    tile: object = "auto",
) -> tuple[SlidingTile, LayoutKind]:
    """The sliding tile pattern of about a launched density that wastes least, and its tiles' kind.

    Least effort of `backend` for a kept pair, among those that are near enough; the nearest where
    none is. Square windows first, then wide and high ones. Blocks of 128 slots, which every kernel
    takes, go before smaller ones that are not much nearer.
    """
    found: list[tuple[float, float, SlidingTile, LayoutKind]] = []
    for kind in layout_kinds_of(backend, device):
        for pattern, made in _windows(layout, density, kind, backend, device.type, tile).items():
            small = SMALL_BLOCK if kind != "lengths" and made.block < 128 else 0.0
            distance = max(abs(math.log(made.launched / density)) + small, NEAR)
            found.append((distance, made.effort, pattern, kind))
    return min(found, key=lambda one: one[:2])[2:]


def _windows(
    layout: TokenLayout, density: float, kind: LayoutKind, backend: str, device: str, tile: object
) -> dict[SlidingTile, Made]:
    """Patterns around a density."""

    def made(pattern: SlidingTile) -> Made:
        return _made(layout, pattern, kind, backend, device)

    tried: dict[SlidingTile, Made] = {}
    for aspect in ASPECTS:
        for frames in FRAMES if layout.grid[0] > 1 else (1.0,):
            tried |= _bisected(made, density, tile, frames, aspect)
        nearest = min(abs(math.log(one.launched / density)) for one in tried.values())
        if nearest < NEAR:
            break
    return tried


def _bisected(
    made: Callable[[SlidingTile], Made], density: float, tile: Any, frames: float, aspect: float
) -> dict[SlidingTile, Made]:
    """Patterns around a density: wider windows launch more."""
    tried: dict[SlidingTile, Made] = {}
    low, high = 0, len(SIDES) - 1
    while low <= high:
        middle = (low + high) // 2
        sides = [min(1.0, round(SIDES[middle] * by, 3)) for by in (aspect, 1 / aspect)]
        pattern = SlidingTile(Window("fraction", (frames, *sides)), tile)
        tried[pattern] = made(pattern)
        if tried[pattern].launched < density:
            low = middle + 1
        else:
            high = middle - 1
    return tried


@lru_cache(maxsize=4096)
def _made(
    layout: TokenLayout, pattern: SlidingTile, kind: LayoutKind, backend: str, device: str
) -> Made:
    plan = pattern.build(layout, torch.device("cpu"), layout_kind=kind)
    launched = plan.launched_density("torch" if kind == "lengths" else "triton")
    spent = plan_effort(backend, device, plan)
    return Made(launched, plan.shape.block_q, spent / plan.kept_density())


def layout_kinds_of(backend: str, device: torch.device) -> tuple[LayoutKind, ...]:
    """How a backend can read tiles, which decides how a grid is cut for it."""
    if device.type != "cpu":
        return LAYOUT_KINDS["hopper"] if backend == "hopper" else (kind_for(device),)
    return ("lengths",) if backend in ("torch", "reference") else ("gather",)


def _random(block_k: int = 128, *, per_head: bool = False) -> Build:
    """Of random lists."""

    def build(
        case: Case, density: float, device: torch.device, backend: str, tile: object
    ) -> tuple[BlockPlan, str]:
        heads = case.heads if per_head else 1
        return random_plan(case.layout.length, density, device, block_k=block_k, heads=heads), ""

    return build


def _sliding(
    case: Case, density: float, device: torch.device, backend: str, tile: object
) -> tuple[BlockPlan, str]:
    pattern, layout_kind = sliding_tile(case.layout, density, backend, device, tile)
    window = "/".join(f"{value:g}" for value in pattern.window.values)
    plan = plan_for(case.layout, pattern, device, layout_kind=layout_kind)
    moved = "moved" if BACKENDS[backend].moves(plan.shape) else "gathered"
    shape = plan.shape
    box = "x".join(map(str, shape.box)) + " boxes" if shape.box else f"{moved} tiles"
    return plan, f"window {window}, {box}"


PLAN_KINDS: dict[str, PlanKind] = {
    "random": PlanKind("random 128-key blocks, one list for all heads", _random()),
    "gather64": PlanKind("random 64-key blocks for 128 queries", _random(64)),
    "sliding_tile": PlanKind("sliding_tile, the best window near the density", _sliding, True),
    "per_head": PlanKind(
        "random 128-key blocks, lists of their own per head", _random(per_head=True)
    ),
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
