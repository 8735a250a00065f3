"""Tokens in another order: for backends that need the blocks of a plan one after another.

Kernels that gather by themselves, or read boxes of the raster tensor, need none of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.machine import runs_triton


def block_order(table: BlockTable, block: int) -> Tensor:
    """int32 [N * block]: the raster token in each slot of the blocks, -1 in slots without one.

    Where samples differ in lengths, a slot has a token if it has one in any sample.
    """
    slots = torch.arange(block, dtype=torch.int32, device=table.starts.device)
    inside = slots < table.lengths.amax(0).unsqueeze(-1)
    positions = torch.where(inside, table.starts.unsqueeze(-1) + slots, 0).long()
    tokens = positions if table.order is None else table.order[positions]
    return torch.where(inside, tokens.int(), -1).flatten()


def raster_order(table: BlockTable, block: int, length: int) -> Tensor:
    """int32 [length]: the slot of each raster token, -1 for tokens in no block."""
    tokens = block_order(table, block)
    filled = (tokens >= 0).nonzero()[:, 0]
    order = torch.full((length,), -1, dtype=torch.int32, device=tokens.device)
    order[tokens[filled].long()] = filled.int()
    return order


def gather(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows `index` int32 [P] of each tensor [B, S, H, D], -1 giving zeros: [B, P, H, D] each.

    On a GPU one pass over all (up to three, of one type and head_dim, any strides).
    """
    if runs_triton(index):
        from dit_accel.kernels.portable.permute import gather_tokens

        return list(gather_tokens(list(tensors), index))
    rows, real = index.clamp_min(0).long(), (index >= 0)[:, None, None]
    return [torch.where(real, x.index_select(1, rows), 0.0) for x in tensors]
