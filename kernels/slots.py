"""Calls in block order: for a kernel whose blocks must be runs of consecutive tokens.

The tokens of each block are moved to slots of their own, one block after another, in one pass over
q, k and v; the call runs on a plan over the slots; one pass moves the output back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.once import once
from dit_accel.kernels.permute import block_order, gather, raster_order
from dit_accel.kernels.plan import BlockPlan, Forward


@dataclass(frozen=True, eq=False)
class Slots:
    """One side of a call in block order.

    tokens: int32 [N * block], the raster token in each slot, -1 in empty ones.
    back: int32 [L], the slot of each raster token, -1 for those in no block.
    table: the blocks over the slots.
    """

    tokens: Tensor
    back: Tensor
    table: BlockTable


@once
def slots_of(table: BlockTable, block: int, length: int) -> Slots:
    """The slots of a table's blocks."""
    starts = torch.arange(table.count, device=table.starts.device, dtype=torch.int32) * block
    return Slots(
        block_order(table, block),
        raster_order(table, block, length),
        BlockTable(None, starts, table.lengths),
    )


@once
def slot_blocks(blocks: Blocks) -> Blocks:
    """The same blocks over slots."""
    q, k = _sides(blocks)
    return replace(
        blocks,
        q=q.table,
        k=k.table,
        q_length=len(q.tokens),
        k_length=len(k.tokens),
        # Slots that are empty in every sample are never read.
        covers=blocks.q.lengths.shape[0] == 1,
        box=None,
        grid=None,
        video_start=0,
    )


@once
def slot_plan(plan: BlockPlan) -> BlockPlan:
    """The plan over slots; it has no token rule."""
    blocks = slot_blocks(plan.blocks)
    shape = replace(
        plan.shape,
        box=None,
        grid=None,
        scattered=False,
        gathered=False,
        mixed=False,
        in_place=False,  # nobody asks
    )
    return replace(plan, blocks=blocks, shape=shape)


def attend_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    attend: Forward,
) -> tuple[Tensor, Tensor | None]:
    """`attend` on the tokens of q, k, v [B, S, H, D] in block order; its results in raster order.

    The plan has no token rule.
    """
    rows, keys = _sides(plan.blocks)
    if _same_places(plan.blocks):
        q, k, v = gather((q, k, v), rows.tokens)
    else:
        (q,), (k, v) = gather((q,), rows.tokens), gather((k, v), keys.tokens)
    out, lse = attend(q, k, v, slot_plan(plan), scale, return_lse)
    (out,) = gather((out,), rows.back)
    if lse is not None:
        lse = lse.index_select(-1, rows.back.clamp_min(0).long())
        lse = torch.where(rows.back >= 0, lse, -torch.inf)
    return out, lse


def _sides(blocks: Blocks) -> tuple[Slots, Slots]:
    return (
        slots_of(blocks.q, blocks.block_q, blocks.q_length),
        slots_of(blocks.k, blocks.block_k, blocks.k_length),
    )


def _same_places(blocks: Blocks) -> bool:
    """Whether a key block stands where the query block of its number does."""
    q, k = blocks.q, blocks.k
    return q.order is k.order and q.starts is k.starts and blocks.block_q == blocks.block_k
