"""Plans from relations: block tables of a token layout, and lists in O(kept blocks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.spans import side_blocks, side_order, valid_lengths
from dit_accel.kernels.geometry.tiling import Geometry, Tiling, geometry, grouped
from dit_accel.kernels.geometry.visibility import EVERY, NONE, Relation
from dit_accel.kernels.plan import BlockPlan, BlockTable, ListKinds, Rule, TokenMask
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


def build_plan(
    layout: TokenLayout,
    tiling: Tiling,
    unions: Sequence[Union],
    device: torch.device | str,
    heads: Sequence[int] | None = None,
) -> BlockPlan:
    """A plan in which video sees video by rules, and other tokens see and are seen by every token.

    unions: the rules; a pair counts where a member of the union keeps it.
    heads: for each query head, which union it follows; None where there is only one.

    Every query token is computed, padded ones too (the stock call does so and drops them later);
    key blocks are cut to each sample's valid prefix and leave the lists where nothing is left.
    Raises DitAccelError where partial blocks would need more than MAX_RULES token rules, or not the
    same ones for all heads.
    """
    device = torch.device(device)
    rules = _token_rules(unions)
    before, after = side_blocks(layout, tiling.block)
    sizes = np.array([*before, *tiling.lengths, *after], np.int64)
    starts = sizes.cumsum() - sizes
    key_lengths = valid_lengths(layout, sizes, starts)
    order = tile_order(layout, tiling, device)
    origins = _origins(layout, tiling, starts, len(before))
    starts_there, sizes_there, keys_there, *origins_there = (
        torch.from_numpy(np.ascontiguousarray(part, np.int32)).to(device)
        for part in (starts, sizes[None], key_lengths, *([] if origins is None else [origins]))
    )
    where = origins_there[0] if origins_there else None
    made = [
        _lists(geometry(tiling), union, len(before), keys_there, tiling.block) for union in unions
    ]
    full, whole, masked = _by_head(made, heads)
    has_partial = bool(rules) and masked.width > 0
    kinds = torch.stack([whole.sum(), full.count.sum()]).tolist()
    return BlockPlan(
        BlockTable(order, starts_there, sizes_there, where),
        BlockTable(order, starts_there, keys_there, where),
        full.count,
        full.index,
        layout.length,
        layout.length,
        tiling.block,
        tiling.block,
        whole,
        masked.count if has_partial else None,
        masked.index if has_partial else None,
        _token_mask(layout, rules, device) if has_partial else None,
        kinds=ListKinds(kinds[0] > 0, kinds[1] > kinds[0], has_partial),
        covers=True,
        box=None if layout.permuted else tiling.box,
        grid=layout.grid,
        video_start=layout.video_start,
    )


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


def _token_rules(unions: Sequence[Union]) -> tuple[Rule, ...]:
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


@dataclass(frozen=True, eq=False)
class _List:
    """count int32 [Bp, Hp, N] and index int32 [Bp, Hp, N, M]; the longest list has `width`."""

    count: Tensor
    index: Tensor
    width: int

    def padded(self, width: int) -> _List:
        missing = width - self.index.shape[-1]
        return _List(self.count, torch.nn.functional.pad(self.index, (0, missing)), self.width)


Lists = tuple[_List, Tensor, _List]


def _lists(where: Geometry, union: Union, first: int, keys: Tensor, block: int) -> Lists:
    """Full lists, their counts of whole blocks, and partial lists; whole blocks come first.

    first: blocks before the video. keys: int32 [Bp, N], valid tokens of each key block.
    """
    rows, columns, kinds = _entries(where, union, first, keys, block)
    samples, blocks = keys.shape
    lists = (rows * 3 + kinds).to(torch.int32)
    lists, by_list = lists.sort(stable=True)
    columns = columns[by_list].int()
    count = torch.zeros(samples * blocks * 3, dtype=torch.int32, device=keys.device)
    count.index_add_(0, lists, torch.ones_like(lists))
    begin = count.cumsum(0, dtype=torch.int32) - count
    place = torch.arange(len(lists), device=keys.device, dtype=torch.int32) - begin[lists]
    whole, short, partial = count.view(-1, 3).mT.contiguous()
    full_width, partial_width = torch.stack([(whole + short).max(), partial.max()]).tolist()
    row = lists // 3
    place = place + torch.where(lists % 3 == 1, whole[row], 0)
    found = []
    for chosen, width in ((lists % 3 < 2, full_width), (lists % 3 == 2, partial_width)):
        # One slot past the end takes what is not chosen.
        index = columns.new_zeros(samples * blocks * max(1, width) + 1)
        at = torch.where(chosen, row.long() * max(1, width) + place, len(index) - 1)
        index[at] = columns
        found.append(index[:-1].view(samples, 1, blocks, max(1, width)).contiguous())
    shape = (samples, 1, blocks)
    return (
        _List((whole + short).view(shape), found[0], full_width),
        whole.view(shape),
        _List(partial.view(shape), found[1], partial_width),
    )


def _entries(
    where: Geometry, union: Union, first: int, keys: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Visits, row by row: list row (sample, query block), key block, kind.

    Kinds: 0 a whole block, 1 a full one that is short, 2 a partial one.
    """
    samples, blocks = keys.shape
    video, device = where.blocks, keys.device
    step = max(1, CHUNK // (video * where.segments**2))
    parts = []
    edges = [0, *range(first, first + video, step), first + video, blocks]
    for low, high in zip(edges, edges[1:], strict=False):
        if low == high:
            continue
        kind = torch.where(keys == block, 1, 2).to(torch.uint8)  # +1, and 0 for no visit
        kind = (kind * (keys > 0))[:, None].expand(-1, high - low, -1)
        if first <= low < first + video:
            seen = _combined(where.rows(low - first, high - first), where, union, device)
            kind = kind.clone()
            inner = kind[:, :, first : first + video]
            inner[:] = torch.where(seen == EVERY, inner, (seen > NONE) * 3)
        sample, row, column = kind.nonzero().unbind(-1)
        parts.append((sample * blocks + row + low, column, kind[sample, row, column] - 1))
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


def _by_head(made: Sequence[Lists], heads: Sequence[int] | None) -> Lists:
    if heads is None:
        return made[0]
    which = torch.tensor(heads, device=made[0][1].device)

    def spread(lists: Sequence[_List]) -> _List:
        width = max(each.index.shape[-1] for each in lists)
        wide = [each.padded(width) for each in lists]
        return _List(
            torch.cat([each.count for each in wide], 1)[:, which],
            torch.cat([each.index for each in wide], 1)[:, which],
            max(each.width for each in lists),
        )

    full, whole, partial = zip(*made, strict=True)
    return spread(full), torch.cat(whole, 1)[:, which], spread(partial)


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
