"""Plans from relations: block tables of a token layout, and lists in O(kept blocks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.geometry.limits import check_blocks
from dit_accel.kernels.geometry.spans import side_blocks, side_order, valid_lengths
from dit_accel.kernels.geometry.tiling import Geometry, Tiling, geometry, grouped
from dit_accel.kernels.geometry.visibility import EVERY, NONE, Relation
from dit_accel.kernels.plan import BlockPlan, Rule, TokenMask, Visits, plan_of
from dit_accel.layout import TokenLayout

# Pairs of boxes that are looked at in one go.
CHUNK = 1 << 23
MAX_RULES = 2
"""Token rules of a call: kernels evaluate all of them on every pair of a partial block."""


@dataclass(frozen=True, eq=False)
class Member:
    """One rule of a union: its bounds, and its token rule where partial blocks are masked.

    rule: name and parameters in `token_rules`; None keeps partial blocks whole.
    """

    relation: Relation
    rule: Rule | None = None


Union = tuple[Member, ...]


def blocks_of(layout: TokenLayout, tiling: Tiling, device: torch.device | str) -> Blocks:
    """How a call over `layout` is cut: the video by `tiling`, other spans in runs of whole blocks.

    Every query token is in a block, padded ones too (the stock call computes them and drops them
    later); key blocks are cut to each sample's valid prefix.

    Raises DitAccelError for too many blocks.
    """
    check_blocks(tiling)
    device = torch.device(device)
    before, after = side_blocks(layout, tiling.block)
    sizes = np.array([*before, *tiling.lengths, *after], np.int64)
    starts = sizes.cumsum() - sizes
    keys = valid_lengths(layout, sizes, starts)
    order = tile_order(layout, tiling, device)
    origins = _origins(layout, tiling, starts, len(before))
    starts_there, sizes_there, keys_there, *origins_there = (
        torch.from_numpy(np.ascontiguousarray(part, np.int32)).to(device)
        for part in (starts, sizes[None], keys, *([] if origins is None else [origins]))
    )
    where = origins_there[0] if origins_there else None
    return Blocks(
        BlockTable(order, starts_there, sizes_there, where),
        BlockTable(order, starts_there, keys_there, where),
        layout.length,
        layout.length,
        tiling.block,
        tiling.block,
        box=None if layout.permuted else tiling.box,
        grid=layout.grid,
        video_start=layout.video_start,
        first_video=len(before),
        video_blocks=tiling.blocks,
        tiling=tiling,
        covers=True,
    )


def build_plan(
    layout: TokenLayout,
    tiling: Tiling,
    unions: Sequence[Union],
    device: torch.device | str,
    heads: Sequence[int] | None = None,
) -> BlockPlan:
    """A plan in which video sees video by rules, and other tokens see and are seen by every token.

    unions: the rules; a pair counts where a member of the union keeps it.
    heads: for each query head, which union it follows; None where there is only one. Heads that
        follow the same one share its lists.

    Key blocks where nothing is valid leave the lists. Raises DitAccelError where partial blocks
    would need more than MAX_RULES token rules, or not the same ones for all heads.
    """
    rules = token_rules(unions)
    blocks = blocks_of(layout, tiling, device)
    made = [_lists(geometry(tiling), union, blocks) for union in unions]
    visits = made[0] if heads is None else _by_head(made, heads)
    plan = plan_of(blocks, visits)
    if not plan.shape.kinds.partial:
        return plan
    mask = _token_mask(layout, rules, blocks.device)
    shape = replace(plan.shape, rules=tuple(name for name, _ in mask.rules))
    return replace(plan, mask=mask, shape=shape)


def tile_order(layout: TokenLayout, tiling: Tiling, device: torch.device) -> Tensor | None:
    """int32 [L]: raster tokens sorted by tile, in raster order within; None if nothing moves.

    Beside the video valid tokens come first in a span whose mask is no prefix.
    """
    if tiling.raster and not layout.permuted:
        return None
    tile = torch.zeros((), dtype=torch.int32, device=device)
    token = torch.zeros((), dtype=torch.int64, device=device)
    for axis, parts in enumerate(tiling.parts):
        part = torch.from_numpy(np.repeat(np.arange(len(parts), dtype=np.int32), parts)).to(device)
        place = torch.from_numpy(grouped(sum(parts), tiling.dilation[axis])).to(device)
        shape = [1, 1, 1]
        shape[axis] = -1
        tile = tile * len(parts) + part.view(shape)
        token = token * sum(parts) + place.view(shape)
    video = token.reshape(-1)[tile.reshape(-1).argsort(stable=True)] + layout.video_start
    tokens = side_order(layout, device)
    stop = layout.video_start + layout.video_length
    return torch.cat([tokens[: layout.video_start], video, tokens[stop:]]).int()


def token_coordinates(layout: TokenLayout, device: torch.device) -> Tensor:
    """int32 [L, 3]: (t, h, w) of video tokens in raster order, zeros for the others."""
    video = torch.cartesian_prod(
        *(torch.arange(size, dtype=torch.int32, device=device) for size in layout.grid)
    )
    coords = video.new_zeros(layout.length, 3)
    coords[layout.video_start : layout.video_start + layout.video_length] = video
    return coords


def _token_mask(layout: TokenLayout, rules: Sequence[Rule], device: torch.device) -> TokenMask:
    coords = token_coordinates(layout, device)
    (name, params), *others = rules
    return TokenMask(name, params, coords, coords, *others)


def token_rules(unions: Sequence[Union]) -> tuple[Rule, ...]:
    """The token rules of partial blocks: those of every union that has any."""
    found = [tuple(dict.fromkeys(m.rule for m in union if m.rule is not None)) for union in unions]
    masked = [rules for rules in found if rules]
    if len({frozenset(rules) for rules in masked}) > 1:
        names = ", ".join(sorted({name for rules in masked for name, _ in rules}))
        raise DitAccelError(
            f"exact: one call masks the tokens of all its heads by the same rules, and here heads "
            f"differ ({names}): set exact = false for the heads of all but one of them."
        )
    rules = masked[0] if masked else ()
    if len(rules) > MAX_RULES:
        names = ", ".join(sorted(name for name, _ in rules))
        raise DitAccelError(
            f"exact: one call can mask the tokens of at most {MAX_RULES} rules, not of "
            f"{len(rules)} ({names}): set exact = false on all but {MAX_RULES} of them."
        )
    return rules


def _lists(where: Geometry, union: Union, blocks: Blocks) -> Visits:
    """The lists of one union for all heads, [Bp, 1, NQ]: one after another, without gaps."""
    keys = blocks.k.lengths
    rows, columns, kinds = _entries(where, union, blocks.first_video, keys, blocks.block_k)
    lists = rows * 3 + kinds
    if bool((lists[1:] < lists[:-1]).any()):  # one sample with one kind is in order
        lists, by_list = lists.sort(stable=True)
        columns = columns[by_list]
    count = torch.zeros(keys.numel() * 3, dtype=torch.int32, device=keys.device)
    count.index_add_(0, lists, torch.ones_like(lists))
    count = count.view(len(keys), 1, -1, 3).cumsum(-1, dtype=torch.int32)
    whole, full, every = count.permute(3, 0, 1, 2).contiguous()
    start = every.flatten().cumsum(0, dtype=torch.int32).view(every.shape) - every
    return Visits(start, whole, full, every, columns)


def _entries(
    where: Geometry, union: Union, first: int, keys: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Visits, row by row: list row (sample, query block), key block, kind.

    Kinds: 0 a whole block, 1 a full one that is short, 2 a partial one.
    """
    samples, blocks = keys.shape
    video, device = where.blocks, keys.device
    parts_too = any(member.relation.by_parts for member in union)
    step = max(1, CHUNK // (video * (where.segments**2 if parts_too else 1)))
    parts = []
    edges = [0, *range(first, first + video, step), first + video, blocks]
    for low, high in zip(edges, edges[1:], strict=False):
        if low == high:
            continue
        kind = (keys > 0).to(torch.uint8) + (keys > 0) * (keys != block)  # +1, 0 for no visit
        kind = kind.to(torch.uint8)[:, None].expand(-1, high - low, -1)
        if first <= low < first + video:
            seen = _combined(where.rows(low - first, high - first), where, union, device)
            kind = kind.clone()
            inner = kind[:, :, first : first + video]
            inner[:] = torch.where(seen == EVERY, inner, (seen > NONE).to(torch.uint8) * 3)
        kind = kind.reshape(-1)
        at = kind.nonzero()[:, 0]
        row, column = at // blocks, (at % blocks).int()
        row = row // (high - low) * blocks + row % (high - low) + low
        parts.append((row.int(), column, kind[at].int() - 1))
    rows, columns, kinds = (torch.cat(column) for column in zip(*parts, strict=True))
    return rows, columns, kinds


def _combined(rows: Geometry, where: Geometry, union: Union, device: torch.device) -> Tensor:
    """uint8 [rows, N]: EVERY for full, else SOME for partial entries."""
    seen = None
    for member in union:
        codes = member.relation.codes(rows, where, device)
        if member.rule is None:
            codes = (codes > NONE).to(torch.uint8) * EVERY
        seen = codes if seen is None else torch.maximum(seen, codes)
    assert seen is not None
    return seen


def _by_head(made: Sequence[Visits], heads: Sequence[int]) -> Visits:
    """For each head the lists of the union that it follows; entries are not copied."""
    which = torch.tensor(heads, device=made[0].count.device)
    before = [0, *accumulate(len(lists.index) for lists in made)]
    starts = [lists.start + first for lists, first in zip(made, before, strict=False)]
    return Visits(
        torch.cat(starts, 1)[:, which],
        torch.cat([lists.whole for lists in made], 1)[:, which],
        torch.cat([lists.full for lists in made], 1)[:, which],
        torch.cat([lists.count for lists in made], 1)[:, which],
        torch.cat([lists.index for lists in made]),
    )


def _origins(
    layout: TokenLayout, tiling: Tiling, starts: np.ndarray, first: int
) -> np.ndarray | None:
    """[N, 3]; the video's blocks are rows `first` and on. None where runs are not consecutive."""
    if layout.permuted or max(tiling.dilation) > 1 or (tiling.straddles and not tiling.raster):
        return None
    origins = np.stack([np.full_like(starts, -1), starts, np.zeros_like(starts)], -1)
    if not tiling.straddles:
        origins[first : first + tiling.tiles] = geometry(tiling).low
    return origins
