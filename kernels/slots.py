"""Calls in block order: for a kernel whose blocks must be runs of consecutive tokens.

The tokens of each block are moved to slots of their own, one block after another, in one pass over
q, k and v; the call runs on a plan over the slots; one pass moves the output back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.once import once
from dit_accel.kernels.permute import block_order, gather, raster_order
from dit_accel.kernels.plan import BlockPlan, BlockTable

# (q, k, v, plan, scale, return_lse, perhaps pooled) -> (out, LSE or None)
Attend = Callable[..., tuple[Tensor, Tensor | None]]


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
def slot_plan(plan: BlockPlan) -> BlockPlan:
    """The plan over slots; it has no token rule."""
    q, k = _sides(plan)
    return replace(
        plan,
        q_blocks=q.table,
        k_blocks=k.table,
        q_length=len(q.tokens),
        k_length=len(k.tokens),
        # Slots that are empty in every sample are never read.
        covers=plan.q_blocks.lengths.shape[0] == 1,
        box=None,
        grid=None,
        video_start=0,
    )


def attend_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    attend: Attend,
) -> tuple[Tensor, Tensor | None]:
    """`attend` on the tokens of q, k, v [B, S, H, D] in block order; its results in raster order.

    The plan has no token rule.
    """
    rows, keys = _sides(plan)
    if _same_places(plan):
        q, k, v = gather((q, k, v), rows.tokens)
    else:
        (q,), (k, v) = gather((q,), rows.tokens), gather((k, v), keys.tokens)
    out, lse = attend(q, k, v, slot_plan(plan), scale, return_lse)
    (out,) = gather((out,), rows.back)
    if lse is not None:
        lse = lse.index_select(-1, rows.back.clamp_min(0).long())
        lse = torch.where(rows.back >= 0, lse, -torch.inf)
    return out, lse


def _sides(plan: BlockPlan) -> tuple[Slots, Slots]:
    return (
        slots_of(plan.q_blocks, plan.block_q, plan.q_length),
        slots_of(plan.k_blocks, plan.block_k, plan.k_length),
    )


def _same_places(plan: BlockPlan) -> bool:
    """Whether a key block stands where the query block of its number does."""
    q, k = plan.q_blocks, plan.k_blocks
    return q.order is k.order and q.starts is k.starts and plan.block_q == plan.block_k
