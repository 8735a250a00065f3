"""Block tables of a token layout, and plans in which everything but video is dense."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.plan import BlockPlan, BlockTable, lists_from_mask
from dit_accel.kernels.tiling import BLOCK_SIZES, Tiling, clipped_split
from dit_accel.layout import TokenLayout


def span_runs(length: int, block: int) -> tuple[int, ...]:
    """Sizes of the runs that a span is split in: whole blocks, then the rest."""
    return clipped_split(length, block)


def runs_tiling(layout: TokenLayout) -> Tiling:
    """The video as one row of consecutive raster tokens, in runs of 128."""
    return Tiling(((1,), (1,), span_runs(layout.video_length, BLOCK_SIZES[-1])), BLOCK_SIZES[-1])


def video_plan(
    layout: TokenLayout,
    tiling: Tiling,
    visible: Tensor,
    device: torch.device | str,
) -> BlockPlan:
    """A plan from the visible tile pairs; other tokens see, and are seen by, every valid token.

    tiling: how the video is cut (of `layout.grid`, or `runs_tiling`).
    visible: bool [N, N] or [Hp, N, N] over the tiles in (T, H, W) order, queries first.

    Every query token is computed, padded ones too (the stock call does so and drops them later);
    key blocks are cut to each sample's valid prefix and leave the lists where nothing is left.
    """
    device = torch.device(device)
    order = tile_order(layout, tiling, device)
    sizes = _tile_sizes(tiling, device)
    before, after = (
        torch.tensor(span_runs(n, tiling.block), dtype=torch.int32, device=device)
        for n in (layout.before, layout.after)
    )
    lengths = torch.cat([before, sizes, after])
    starts = (lengths.cumsum(0) - lengths).int()
    key_lengths = _valid_lengths(layout, lengths, starts)
    origins = _origins(layout, tiling, starts, len(before))
    q_blocks = BlockTable(order, starts, lengths[None], origins)
    k_blocks = BlockTable(order, starts, key_lengths, origins)

    first, tiles = len(before), tiling.tiles
    pairs = visible.to(device).view(-1, tiles, tiles)
    mask = torch.ones(len(pairs), len(lengths), len(lengths), dtype=torch.bool, device=device)
    mask[:, first : first + tiles, first : first + tiles] = pairs
    mask = mask[None] & (key_lengths > 0)[:, None, None, :]
    count, index, unmasked = lists_from_mask(mask, key_lengths == tiling.block)
    return BlockPlan(
        q_blocks,
        k_blocks,
        count,
        index,
        layout.length,
        layout.length,
        tiling.block,
        tiling.block,
        unmasked,
        box=tiling.box,
        grid=layout.grid,
        video_start=layout.video_start,
    )


def tile_order(layout: TokenLayout, tiling: Tiling, device: torch.device) -> Tensor | None:
    """int32 [L]: raster tokens sorted by tile, in raster order within; None if nothing moves."""
    if tiling.parts[:2] == ((1,), (1,)) or tiling.tiles == 1:
        return None
    tile = torch.zeros((), dtype=torch.int64, device=device)
    for axis, parts in enumerate(tiling.parts):
        part = torch.arange(len(parts), device=device).repeat_interleave(
            torch.tensor(parts, device=device), output_size=sum(parts)
        )
        shape = [1, 1, 1]
        shape[axis] = -1
        tile = tile * len(parts) + part.view(shape)
    video = tile.reshape(-1).argsort(stable=True) + layout.video_start
    tokens = torch.arange(layout.length, device=device)
    stop = layout.video_start + layout.video_length
    return torch.cat([tokens[: layout.video_start], video, tokens[stop:]]).int()


def _tile_sizes(tiling: Tiling, device: torch.device) -> Tensor:
    t, h, w = (torch.tensor(parts, dtype=torch.int32, device=device) for parts in tiling.parts)
    return (t[:, None, None] * h[:, None] * w).reshape(-1)


def _origins(layout: TokenLayout, tiling: Tiling, starts: Tensor, first: int) -> Tensor:
    """int32 [N, 3]; the video's blocks are rows `first` and on, in tile order."""
    zeros = torch.zeros_like(starts)
    origins = torch.stack([zeros - 1, starts, zeros], -1)
    if tuple(map(sum, tiling.parts)) == layout.grid:
        corners = [
            torch.tensor([sum(parts[:i]) for i in range(len(parts))], device=starts.device)
            for parts in tiling.parts
        ]
        origins[first : first + tiling.tiles] = torch.cartesian_prod(*corners).int()
    return origins


def _valid_lengths(layout: TokenLayout, lengths: Tensor, starts: Tensor) -> Tensor:
    if layout.valid is None:
        return lengths[None]
    samples = layout.valid[:1] if len(set(layout.valid)) == 1 else layout.valid
    valid = torch.tensor(samples, dtype=torch.int32, device=lengths.device)
    after = layout.video_start + layout.video_length
    stops = torch.where(
        starts < layout.video_start,
        valid[:, :1],
        torch.where(starts >= after, valid[:, 1:] + after, after),
    )
    return torch.minimum(lengths, (stops - starts).clamp_min(0)).int()
