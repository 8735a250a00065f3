"""How tails are computed: statistics, weights, slopes, and the join to the visited blocks' rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.machine import runs_triton
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import PooledKeys, pool_queries_and_keys, pooled_keys
from dit_accel.kernels.probe import pieces_of
from dit_accel.kernels.tails import in_torch

if TYPE_CHECKING:
    from dit_accel.kernels.selectors.base import Context

# Numbers that the linear maps of some heads may take at a time.
_HELD = {"cuda": 1 << 27, "cpu": 1 << 22}


@dataclass(frozen=True)
class Form:
    """A tail over given blocks.

    size: tokens of a pooled key. exact: whether it weighs by a probe. slope: query blocks that
    share a linear map; None without one.
    """

    size: int
    exact: bool
    slope: int | None


def join_tail(context: Context, plan: BlockPlan, form: Form, out: Tensor, lse: Tensor) -> None:
    """Joins the tail of a plan to its rows `out` [B, Lq, H, D] and `lse` [B, H, Lq], in place."""
    q, k, v, blocks = context.q, context.k, context.v, plan.blocks
    if not blocks.video_blocks or not q.numel():
        return
    pieces = pieces_of(blocks, form.size)
    pooled = pooled_keys(k, v, pieces.table, pieces.size)
    mass, shift = _statistics(context, blocks, form, pooled)
    if form.slope is None:
        mass = None
    compiled = runs_triton(q)
    heads = q.shape[2]
    if compiled:
        from dit_accel.kernels.portable import tail as kernel

        bias, weights = kernel.rows(mass, shift, plan.visits, blocks, pieces.each, heads, q.dtype)
    else:
        bias, weights = in_torch.rows(mass, shift, plan, pieces.each, q.dtype)
    if form.slope is not None and form.slope > 1:
        assert weights is not None
        weights = _averaged(weights, form.slope)
    make = kernel.covariances if compiled else in_torch.covariances
    join = kernel.join if compiled else in_torch.join
    for some, of_keys in _parts(form, blocks, q, k):
        slope = None
        if weights is not None:
            slope = _slopes(weights[:, some.start : some.stop], make(k, v, blocks, pieces, of_keys))
        join(q, out, lse, blocks, pooled, bias, slope, form.slope or 1, some, context.scale)


def _statistics(
    context: Context, blocks: Blocks, form: Form, pooled: PooledKeys
) -> tuple[Tensor | None, Tensor]:
    """mass [B, H, NV, NV] (None where nobody needs it) and shift [B, H, NP, NV], as in `Probe`."""
    if form.exact:
        found = context.probe()
        assert found.shift.shape[2] == pooled.count, "the context was told the size of a pooled key"
        return found.mass, found.shift
    batch, _, heads, _ = context.q.shape
    shift = pooled.log_count[:, None, :, None].expand(batch, heads, -1, blocks.video_blocks)
    if form.slope is None:
        return None, shift
    queries, keys = pool_queries_and_keys(context.q, context.k, blocks)
    stop = blocks.first_video + blocks.video_blocks
    query, key = (x[:, blocks.first_video : stop].transpose(1, 2) for x in (queries, keys))
    key = key.repeat_interleave(heads // key.shape[1], 1)
    count = blocks.k.lengths[:, None, blocks.first_video : stop, None].float().log()
    return key @ query.mT * context.scale + count, shift


def _averaged(weights: Tensor, together: int) -> Tensor:
    """Means of weights [B, H, NV, NV] over so many neighbouring query blocks that have a tail."""
    rows = weights.shape[2]
    together = min(together, rows)
    padded = torch.nn.functional.pad(weights.float(), (0, 0, 0, -rows % together))
    grouped = padded.unflatten(2, (-1, together))
    own = (grouped.sum(-1) > 0.5).sum(-1, keepdim=True).clamp_min(1)
    return (grouped.sum(3) / own).to(weights.dtype)


def _slopes(weights: Tensor, covariances: Tensor) -> Tensor:
    """M [B, h, n, D, D] from weights [B, h, n, N] and C [B, hkv, N, D, D]."""
    batch, heads, rows, _ = weights.shape
    kv, dim = covariances.shape[1], covariances.shape[-1]
    grouped = weights.reshape(batch, kv, heads // kv * rows, -1)
    made = grouped @ covariances.flatten(-2)
    return made.view(batch, heads, rows, dim, dim)


def _parts(form: Form, blocks: Blocks, q: Tensor, k: Tensor) -> Iterator[tuple[range, range]]:
    """Query heads and their key heads, so many at a time that their maps do not grow large."""
    batch, _, heads, dim = q.shape
    kv = k.shape[2]
    group = heads // kv
    some = kv
    if form.slope is not None:
        maps = -(-blocks.video_blocks // form.slope) * group + blocks.video_blocks
        some = max(1, _HELD[q.device.type if q.is_cuda else "cpu"] // (batch * maps * dim * dim))
    for first in range(0, kv, some):
        stop = min(kv, first + some)
        yield range(first * group, stop * group), range(first, stop)
