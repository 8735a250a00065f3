"""A plan as the Hopper kernel's work lists: its key blocks as codes, its query blocks in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.costs.kernels import deal_weights
from dit_accel.kernels.hopper.deal import first_free
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, BlockTable

RUN = 1 << 30
NOTHING = -1
MAX_COORDINATE = 1023
PARTIAL = 256
# The columns of an item.
SAMPLE, HEAD, ROW, CODE, LENGTH, TILES, BARE = range(7)


@dataclass(frozen=True)
class WorkLists:
    """A plan in the kernel's form (see `forward`); all int32.

    items [n, 8]: a query block each: sample, head, row of the lists, code, tokens, tiles, tiles
        without a mask. Those of one program stand together, in its order.
    work [P, 2]: each program's first item, and its tiles of 128 keys.
    codes, metas [Bl, Hl, NQ, W]: where the key blocks are, and how many tokens each has, plus
        PARTIAL where the token rule applies.
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


def plan_obstacle(plan: BlockPlan) -> str | None:
    """Why the kernel cannot follow this plan, whatever the tensors, or None."""
    if plan.block_q != 128 or plan.block_k not in (64, 128):
        return f"blocks of {plan.block_q} x {plan.block_k}: needs 128 x 128 or 128 x 64"
    if plan.box is None and plan.list_kinds.partial:
        return "a token rule needs blocks that are boxes of the grid"
    if _entries(plan) >= 1 << 31:
        return f"{_entries(plan)} list entries: needs less than 2^31"
    if 0 in (plan.q_blocks.count, plan.k_blocks.count, plan.full_index.shape[-1]):
        return "no queries, no keys, or lists without room"
    if plan.box is not None and max(plan.grid or (0,)) > MAX_COORDINATE:
        return f"grid {plan.grid}: needs at most {MAX_COORDINATE} along each axis"
    return None


def _entries(plan: BlockPlan) -> int:
    """Numbers in the kernel's lists, at most; it counts them in int32."""
    partial = 0 if plan.partial_index is None else plan.partial_index.shape[-1]
    samples = max(len(plan.full_count), len(plan.k_blocks.lengths))
    return samples * plan.full_count[0].numel() * (plan.full_index.shape[-1] + partial + 1)


@once
def work_lists(plan: BlockPlan, batch: int, heads: int, programs: int) -> WorkLists:
    """The plan's lists for calls of that batch and number of heads."""
    codes, metas, tiles, bare = _key_lists(plan)
    items = _items(plan, tiles, bare, batch, heads)
    items = items[_order(items)]
    by = deal_weights()
    masked = by.masked if plan.list_kinds.partial else by.short
    weights = by.item + masked * items[:, TILES] - (masked - by.tile) * items[:, BARE]
    owners = first_free(weights, programs).long()
    work = torch.zeros((2, programs), dtype=torch.int32, device=plan.device)
    work.index_add_(1, owners, torch.stack([torch.ones_like(weights), items[:, TILES]]))
    counts, tiles = work
    work = torch.stack([counts.cumsum(0) - counts, tiles], -1).int()
    return WorkLists(items[owners.argsort(stable=True)], work, codes, metas)


def _key_lists(plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and metas [Bl, Hl, NQ, W]; tiles, and those without a mask, [Bl, Hl, NQ]."""
    together = 128 // plan.block_k
    count, index = plan.full_count, plan.full_index
    flags: Tensor | int = 0
    total = count
    if plan.partial_count is not None and plan.partial_index is not None:
        total = count + plan.partial_count
        width = index.shape[-1] + plan.partial_index.shape[-1]
        slots = torch.arange(width, device=plan.device, dtype=torch.int32)
        masked = slots >= count.unsqueeze(-1)
        behind = (slots - count.unsqueeze(-1)).clamp(0, plan.partial_index.shape[-1] - 1)
        later = plan.partial_index.gather(-1, behind.long())
        front = slots.clamp_max(index.shape[-1] - 1).long().expand(later.shape)
        index = torch.where(masked, later, index.gather(-1, front))
        flags = masked.int() * PARTIAL
    slots = torch.arange(index.shape[-1], device=plan.device, dtype=torch.int32)
    listed = slots < total.unsqueeze(-1)
    blocks = torch.where(listed, index, 0).long()
    codes = torch.where(listed, block_codes(plan.k_blocks, plan.box is not None)[blocks], NOTHING)
    lengths = plan.k_blocks.lengths
    samples = max(len(lengths), len(blocks))
    rows = lengths.expand(samples, -1)
    metas = torch.stack(
        [r[b] for r, b in zip(rows, blocks.expand(samples, -1, -1, -1), strict=True)]
    )
    codes, total = codes.expand(samples, -1, -1, -1), total.expand(samples, -1, -1)
    metas = metas + flags
    if index.shape[-1] % together:
        codes = torch.nn.functional.pad(codes, (0, 1), value=NOTHING)
        metas = torch.nn.functional.pad(metas, (0, 1))
    bare = torch.zeros_like(total) if plan.unmasked_count is None else plan.unmasked_count
    # An empty list is one tile of nothing: its rows come out as 0 with LSE -inf.
    tiles = ((total + together - 1) // together).clamp_min(1)
    return codes.int().contiguous(), metas.int().contiguous(), tiles, bare // together


def _items(plan: BlockPlan, tiles: Tensor, bare: Tensor, batch: int, heads: int) -> Tensor:
    """int32 [batch * heads * NQ, 8], sample and head major (see WorkLists)."""
    blocks = plan.q_blocks.count
    shape = (batch, heads, blocks)
    sample, head, block = (
        torch.arange(n, device=plan.device).view([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(shape)
    )
    lists = tiles.shape
    row = (sample % lists[0] * lists[1] + head % lists[1]) * blocks + block
    columns = (
        sample,
        head,
        row,
        block_codes(plan.q_blocks, plan.box is not None),
        plan.q_blocks.lengths.unsqueeze(1),
        tiles,
        bare.expand(lists),
        torch.zeros_like(sample),
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
