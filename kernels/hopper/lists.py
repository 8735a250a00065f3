"""A plan as the Hopper kernel's work lists: its key blocks as codes, its query blocks in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.costs.kernels import deal_weights
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.hopper.deal import first_free
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, Shape, Visits

RUN = 1 << 30
NOTHING = -1
MAX_COORDINATE = 1023
PARTIAL = 256
# The columns of an item.
SAMPLE, HEAD, START, CODE, LENGTH, TILES, BARE, LIST = range(8)


@dataclass(frozen=True)
class WorkLists:
    """A plan in the kernel's form (see `forward`); all int32.

    items [n, 8]: a query block each: sample, head, where its list starts in `codes`, code, tokens,
        tiles, tiles without a mask, number of its list among [Bl, Hl, NQ]. Those of one program
        stand together, in its order.
    work [P, 2]: each program's first item, and its tiles of 128 keys.
    codes, metas [C]: where the key blocks are, and how many tokens each has, plus PARTIAL where the
        token rule applies. A list is a run of both.
    """

    items: Tensor
    work: Tensor
    codes: Tensor
    metas: Tensor


def block_codes(table: BlockTable, boxes: bool) -> Tensor:
    """int32 [N]: where each block starts. boxes: whether the plan's video blocks are read as boxes;
    else tiles are runs of the raster (whole rows, or whole frames), whatever their origins."""
    runs = table.starts | RUN
    if not boxes or table.origins is None:
        return runs
    t, h, w = table.origins.unbind(-1)
    return torch.where(t < 0, h | RUN, t << 20 | h << 10 | w)


def plan_obstacle(shape: Shape) -> str | None:
    """Why the kernel cannot follow plans of this shape, whatever the tensors, or None."""
    if shape.block_q != 128 or shape.block_k not in (64, 128):
        return f"blocks of {shape.block_q} x {shape.block_k}: needs 128 x 128 or 128 x 64"
    if shape.box is None and shape.kinds.partial:
        return "a token rule needs blocks that are boxes of the grid"
    if _room(shape) >= 1 << 31:
        return f"{_room(shape)} list entries: needs less than 2^31"
    if 0 in (shape.q_blocks, shape.k_blocks):
        return "no queries or no keys"
    if shape.box is not None and max(shape.grid or (0,)) > MAX_COORDINATE:
        return f"grid {shape.grid}: needs at most {MAX_COORDINATE} along each axis"
    return None


def _room(shape: Shape) -> int:
    """Numbers in the kernel's lists, at most; it counts them in int32."""
    return shape.batch * rooms(shape.entries, shape.block_k)


def rooms(entries: int, block_k: int) -> int:
    """Codes for so many entries of lists and one tile of nothing.

    The list whose first entry is number e starts at code e * (128 / block_k): a list with an odd
    number of blocks of 64 has room for the one that is missing.
    """
    return (entries + 1) * (128 // block_k)


@once
def work_lists(plan: BlockPlan, batch: int, heads: int, programs: int) -> WorkLists:
    """A static plan's lists for calls of that batch and number of heads."""
    blocks, lists = plan.blocks, plan.visits
    codes, metas = key_lists(blocks, lists, plan.counts.entries)
    items = list_items(blocks, lists, batch, heads)
    items = items[_order(items)]
    by = deal_weights()
    masked = by.masked if plan.shape.kinds.partial else by.short
    weights = by.item + masked * items[:, TILES] - (masked - by.tile) * items[:, BARE]
    owners = first_free(weights, programs).long()
    work = torch.zeros((2, programs), dtype=torch.int32, device=plan.device)
    work.index_add_(1, owners, torch.stack([torch.ones_like(weights), items[:, TILES]]))
    counts, tiles = work
    work = torch.stack([counts.cumsum(0) - counts, tiles], -1).int()
    return WorkLists(items[owners.argsort(stable=True)], work, codes, metas)


def copies_of(blocks: Blocks, lists: Visits) -> int:
    """How many times the lists stand in `codes`: once for each sample where they are shared by
    samples whose blocks differ in length."""
    return len(blocks.k.lengths) if len(lists.count) == 1 else 1


def key_lists(blocks: Blocks, lists: Visits, entries: int) -> tuple[Tensor, Tensor]:
    """Codes and metas [copies * rooms]; entries: of all lists."""
    together = 128 // blocks.block_k
    copies, room = copies_of(blocks, lists), rooms(len(lists.index), blocks.block_k)
    codes = torch.full((copies, room), NOTHING, dtype=torch.int32, device=lists.index.device)
    metas = torch.zeros_like(codes)
    count = lists.count.flatten()
    row = torch.arange(len(count), device=count.device)
    row = row.repeat_interleave(count, output_size=entries)  # of every entry, its list
    place = torch.arange(entries, device=count.device) - (count.cumsum(0) - count)[row]
    start, full = lists.start.flatten()[row].long(), lists.full.flatten()[row]
    index = lists.index[start + place].long()
    flags = torch.where(place >= full, PARTIAL, 0)
    at = start * together + place
    codes[:, at] = block_codes(blocks.k, blocks.box is not None)[index]
    if copies > 1 or len(blocks.k.lengths) == 1:
        metas[:, at] = (blocks.k.lengths[:, index] + flags).int()
    else:  # every sample has lists of its own
        sample = row // lists.count[0].numel()
        metas[0, at] = (blocks.k.lengths[sample, index] + flags).int()
    return codes.flatten(), metas.flatten()


def list_items(blocks: Blocks, lists: Visits, batch: int, heads: int) -> Tensor:
    """int32 [batch * heads * NQ, 8], sample and head major (see WorkLists)."""
    together, entries = 128 // blocks.block_k, len(lists.index)
    queries, device = blocks.q.count, lists.count.device
    shape = (batch, heads, queries)
    sample, head, block = (
        torch.arange(n, device=device).view([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(shape)
    )
    samples, rows = lists.count.shape[:2]
    # An empty list is one tile of nothing: its rows come out as 0 with LSE -inf.
    start = torch.where(lists.count > 0, lists.start, entries) * together
    if (copies := copies_of(blocks, lists)) > 1:
        start = start + sample % copies * rooms(entries, blocks.block_k)
    columns = (
        sample,
        head,
        start,
        block_codes(blocks.q, blocks.box is not None),
        blocks.q.lengths.unsqueeze(1),
        ((lists.count + together - 1) // together).clamp_min(1),
        lists.whole // together,
        (sample % samples * rows + head % rows) * queries + block,
    )
    return torch.stack([c.int().expand(shape) for c in columns], -1).view(-1, 8)


def _order(items: Tensor) -> Tensor:
    """The order in which items are dealt: very long ones first, then head by head, longest first in
    each. Heads stay together because their keys and values share the cache."""
    tiles = items[:, TILES].long()
    long = tiles > 2 * tiles.float().mean()
    line = items[:, SAMPLE].long() * (items[:, HEAD].max() + 1) + items[:, HEAD]
    key = torch.where(long, 0, line + 1) * (1 << 24) - tiles
    return key.argsort(stable=True)
