"""Means of token blocks, and pooled keys: key blocks that enter the softmax as one key each.

A pooled key j stands for n_j tokens: it has the score scale q . kbar_j + ln(n_j) and the value
vbar_j, with kbar and vbar the means of the tokens' keys and values. Means are summed in float32;
on a GPU a Triton kernel (`portable.pooling`) reads each tensor once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.launching import launches_of, traced
from dit_accel.kernels.machine import runs_triton

# Gathered tokens of one step of the torch twin, in numbers.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class PooledKeys:
    """The pooled keys of a call; a plan's pooled lists number them.

    key, value: [B, NP, Hkv, D] in the type of q, any strides. log_count: float32 [B or 1, NP],
    added to the scores (natural log); -inf leaves a pooled key out.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor

    @property
    def count(self) -> int:
        """Number of pooled keys, NP."""
        return self.log_count.shape[-1]

    def to(self, device: torch.device | str) -> PooledKeys:
        """The same pooled keys on another device."""
        return PooledKeys(self.key.to(device), self.value.to(device), self.log_count.to(device))


def pool_blocks(
    x: Tensor, table: BlockTable, block: int = 128, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, N, H, D]: the mean over each block's valid tokens of x [B, S, H, D] (any strides).

    block: slots of a block (`Blocks.block_q` or `block_k`), no block is longer. A block without
    tokens has the mean 0. Raises DitAccelError where x has fewer tokens than the table's order.
    """
    return _pool((x, table, block), dtype=dtype)[0]


def pool_queries_and_keys(
    q: Tensor, k: Tensor, blocks: Blocks, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Block means [B, NQ, H, D] of q and [B, NK, Hkv, D] of k [B, S, H, D], each read once."""
    sides = ((q, blocks.q, blocks.block_q), (k, blocks.k, blocks.block_k))
    queries, keys = _pool(*sides, dtype=dtype, kept=launches_of(blocks))
    return queries, keys


def pooled_keys(k: Tensor, v: Tensor, table: BlockTable, block: int = 128) -> PooledKeys:
    """One pooled key for each block of `table`, from k and v [B, Lk, Hkv, D], in their type.

    A block without valid tokens has log_count -inf: it counts for nothing.
    """
    key, value = _pool((k, table, block), (v, table, block), dtype=k.dtype)
    return PooledKeys(key, value, table.lengths.float().log())


def _pool(
    *sides: tuple[Tensor, BlockTable, int], dtype: torch.dtype, kept: dict[Any, Any] | None = None
) -> list[Tensor]:
    """`pool_blocks` of one or two (tensor, table, slots of a block), two in the same launch.

    kept: where launches over the same tables are kept.
    """
    for x, table, _ in sides:
        if table.order is not None and table.order.shape[0] != x.shape[1]:
            raise DitAccelError(
                f"x: expected {table.order.shape[0]} tokens like the table's order, "
                f"got {x.shape[1]}."
            )
    if not runs_triton(sides[0][0]):
        return [_mean(x, table, block, dtype) for x, table, block in sides]
    from dit_accel.kernels.portable.pooling import launch, pool_pair

    x, table, block = sides[0]
    nothing = (x[:0], table, block)
    fields: list[Any] = [
        field
        for x, table, block in (*sides, nothing)[:2]
        for field in (x, table.order, table.starts, table.lengths, block)
    ] + [dtype]
    # The operator costs the host more than the launch: only a compiler needs it.
    means = pool_pair(*fields) if traced() else launch(*[*fields, kept])
    return list(means)[: len(sides)]


def _mean(x: Tensor, table: BlockTable, block: int, dtype: torch.dtype) -> Tensor:
    """The same with torch alone, some blocks at a time."""
    batch, _, heads, dim = x.shape
    slots = torch.arange(block, device=x.device)
    inside = slots < table.lengths.unsqueeze(-1)  # [Bp, N, block]
    positions = torch.where(inside.any(0), table.starts.unsqueeze(-1) + slots, 0)
    tokens = positions if table.order is None else table.order[positions.long()]
    count = table.lengths.clamp_min(1)[..., None, None]
    some = max(1, _CHUNK // max(1, batch * block * heads * dim))
    sums = [x.new_zeros((batch, 0, heads, dim), dtype=torch.float32)]
    for first in range(0, table.count, some):
        part = slice(first, first + some)
        rows = x.index_select(1, tokens[part].flatten()).unflatten(1, (-1, block))
        held = inside[:, part, :, None, None]
        sums.append(torch.where(held, rows, 0).sum(2, dtype=torch.float32))
    return (torch.cat(sums, 1) / count).to(dtype)
