"""A plan's blocks by one backend, its pooled keys by another: for kernels that take blocks alone.

The two halves have disjoint keys, so that their merge (see `merge`) is the softmax over both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.merge import merge
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, ListKinds
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.slots import Attend


@dataclass(frozen=True, eq=False)
class Halves:
    """Two plans over the same blocks: `blocks` has no pooled lists, `pooled` nothing else."""

    blocks: BlockPlan
    pooled: BlockPlan


@once
def halves_of(plan: BlockPlan) -> Halves:
    """The halves of a plan with pooled lists; nothing new is read from the device."""
    kinds, covers = plan.list_kinds, plan.covers_queries
    return Halves(
        replace(
            plan,
            pooled_count=None,
            pooled_index=None,
            kinds=kinds._replace(pooled=False),
            covers=covers,
        ),
        replace(
            plan,
            full_count=torch.zeros_like(plan.full_count),
            unmasked_count=None,
            partial_count=None,
            partial_index=None,
            token_mask=None,
            kinds=ListKinds(whole=False, short=False, partial=False, pooled=True),
            covers=covers,
        ),
    )


def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    pooled: PooledKeys,
    on_blocks: Attend,
    on_pooled: Attend,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD.

    on_blocks is called without pooled keys, on_pooled with them as its last argument and with lists
    of nothing else; both must give 0 and -inf where a row sees no key.
    """
    halves = halves_of(plan)
    near, near_lse = on_blocks(q, k, v, halves.blocks, scale, True)
    far, far_lse = on_pooled(q, k, v, halves.pooled, scale, True, pooled)
    assert near_lse is not None and far_lse is not None, "both were asked for it"
    out, lse = merge(near, near_lse, far, far_lse)
    return out, lse if return_lse else None
