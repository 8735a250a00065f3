"""Shared by the selector tests: calls whose scores are exact, and the rule by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.geometry.tiling import Tiling
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.selectors import Context, Selector
from dit_accel.layout import TokenLayout

GARBAGE = -1234567


@pytest.fixture(autouse=True)
def garbage(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised integers are numbers that no list may show."""
    allocate = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor if tensor.is_floating_point() else tensor.fill_(GARBAGE)

    monkeypatch.setattr(torch, "empty", empty)
    yield


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Selection in torch, and in Triton (in its interpreter where there is no GPU)."""
    from dit_accel.kernels.selectors import select

    monkeypatch.setattr(select, "runs_triton", lambda x: request.param == "triton")
    return str(request.param)


@dataclass
class Members:
    """Blocks by enumeration: the raster tokens of each, of the video or not, its place on t."""

    tokens: list[list[int]]
    video: list[bool]
    valid: list[list[int]]  # per sample, tokens of each block that are valid


def members_of(layout: TokenLayout, tiling: Tiling) -> Members:
    """The blocks of a layout, from the definition of tiles alone."""
    t, h, w = layout.grid
    places = [
        [tile for tile, size in enumerate(parts) for _ in range(size)] for parts in tiling.parts
    ]
    tiles: dict[tuple[int, ...], list[int]] = {}
    for token, (a, b, c) in enumerate(itertools.product(range(t), range(h), range(w))):
        tiles.setdefault((places[0][a], places[1][b], places[2][c]), []).append(token)
    blocks = [tiles[place] for place in sorted(tiles)]
    if tiling.straddles:
        blocks = runs([token for block in blocks for token in block], tiling.block)
    start, stop = layout.before, layout.before + layout.video_length
    before = runs(list(range(start)), tiling.block)
    after = runs(list(range(stop, layout.length)), tiling.block)
    video = [[token + start for token in block] for block in blocks]
    tokens = before + video + after
    samples = layout.valid or ((layout.before, layout.after),)
    valid = [
        [sum(x < b or start <= x < stop or stop <= x < stop + a for x in block) for block in tokens]
        for b, a in samples
    ]
    kinds = [False] * len(before) + [True] * len(video) + [False] * len(after)
    return Members(tokens, kinds, valid)


def runs(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[low : low + size] for low in range(0, len(tokens), size)]


def forced_by_rule(
    layout: TokenLayout, tiling: Tiling, sinks: int, neighbours: bool
) -> list[set[int]]:
    """For each video block those that it keeps in any case, token by token."""
    members = members_of(TokenLayout(layout.grid), tiling).tokens
    _, h, w = layout.grid
    frames = sum(tiling.parts[0][:sinks])
    place = {x: (x // (h * w), x // w % h, x % w) for block in members for x in block}
    found = []
    for i, own in enumerate(members):
        kept = {i}
        for j, other in enumerate(members):
            sink = any(place[x][0] < frames for x in other)
            near = neighbours and any(
                sum(abs(a - b) for a, b in zip(place[x], place[y], strict=True)) == 1
                for x in own
                for y in other
            )
            if sink or near:
                kept.add(j)
        found.append(kept)
    return found


@pytest.fixture
def call(device: torch.device) -> Callable[..., tuple[Context, Members]]:
    """Makes a call whose blocks are of equal tokens with small integers: means and scores are
    exact, and many are equal."""

    def make(
        selector: Selector,
        layout: TokenLayout,
        kind: str = "boxes",
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        dim: int = 32,
        scale: float = 0.125,
        exact: bool = True,
        seed: int = 0,
    ) -> tuple[Context, Members]:
        tiling = selector.tiling(layout, kind)
        members = members_of(layout, tiling)
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for count in (heads, kv_heads or heads, kv_heads or heads):
            if exact:
                shape = (batch, len(members.tokens), count, dim)
                rows = torch.randint(-1, 2, shape, generator=generator).float()
                x = torch.empty(batch, layout.length, count, dim)
                for block, tokens in enumerate(members.tokens):
                    x[:, tokens] = rows[:, block, None]
            else:
                x = torch.randn(batch, layout.length, count, dim, generator=generator)
            tensors.append(x.to(device))
        tally = torch.zeros(2, dtype=torch.int64, device=device)
        blocks = blocks_of(layout, tiling, device)
        return Context(*tensors, blocks, scale, heads, tally), members

    return make


def scores_by_rule(context: Context, members: Members, sample: int, heads: list[int]) -> Any:
    """float64 [NV][NV]: scores of the video's blocks, summed over heads."""
    q, k = (x[sample].double().cpu() for x in (context.q, context.k))
    group = q.shape[1] // k.shape[1]
    video = [i for i, kind in enumerate(members.video) if kind]
    total = torch.zeros(len(video), len(video), dtype=torch.float64)
    for head in heads:
        queries = torch.stack([q[members.tokens[i], head].mean(0) for i in video])
        keys = torch.stack([k[members.tokens[i], head // group].mean(0) for i in video])
        total += queries @ keys.T
    return (total * context.scale / math.sqrt(len(heads))).tolist()


def ordered(kept: set[int], members: Members, sample: int, block: int) -> list[int]:
    """A list of key blocks: whole ones, then short ones, ascending; those without tokens out."""
    valid = members.valid[sample % len(members.valid)]
    there = sorted(j for j in kept if valid[j])
    return [j for j in there if valid[j] == block] + [j for j in there if valid[j] < block]


def lists_of(plan: BlockPlan) -> list[list[list[list[int]]]]:
    """[Bl][Hl][NQ] of lists."""
    visits = plan.to("cpu").visits
    start, count = visits.start.tolist(), visits.count.tolist()
    index = visits.index.tolist()
    return [
        [
            [index[s : s + n] for s, n in zip(*rows, strict=True)]
            for rows in zip(*heads, strict=True)
        ]
        for heads in zip(start, count, strict=True)
    ]


@pytest.fixture
def rules() -> SimpleNamespace:
    """The rules by enumeration."""
    return SimpleNamespace(
        members=members_of, forced=forced_by_rule, scores=scores_by_rule, ordered=ordered,
        lists=lists_of,
    )  # fmt: skip
