"""The steps of tails with torch alone, some heads at a time; `portable.tail` has their twins."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, block_tokens
from dit_accel.kernels.parts import merge
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.probe import Pieces

# Scores that are held at a time.
_CHUNK = 1 << 23


def rows(
    mass: Tensor | None, shift: Tensor, plan: BlockPlan, each: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Bias float32 [B, H, NV, NP] and weights [B, H, NV, NV] in `dtype`; see `portable.tail`."""
    free = ~visited(plan)  # [Bl, Hl, NV, NV]
    bias = shift.mT.masked_fill(~free.repeat_interleave(each, -1), -torch.inf)
    if mass is None:
        return bias, None
    mass = mass.mT.masked_fill(~free, -torch.inf)
    top = mass.amax(-1, keepdim=True)
    weights = (mass - torch.where(top.isneginf(), 0.0, top)).exp()
    return bias, (weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)).to(dtype)


def visited(plan: BlockPlan) -> Tensor:
    """bool [Bl, Hl, NV, NV]: which blocks of the video the video's query blocks visit."""
    blocks, lists = plan.blocks, plan.visits
    first, video = blocks.first_video, blocks.video_blocks
    stop = first + video
    index, listed = (x[:, :, first:stop] for x in lists.rows(width=max(1, plan.shape.most)))
    # What is listed nowhere goes to a column past the last.
    seen = torch.where(listed, index, blocks.k.count).long()
    flags = torch.zeros((*seen.shape[:3], blocks.k.count + 1), dtype=torch.bool, device=seen.device)
    return flags.scatter_(-1, seen, True)[..., first:stop]


def covariances(k: Tensor, v: Tensor, blocks: Blocks, pieces: Pieces, heads: range) -> Tensor:
    """C [B, h, NV, D, D] in the type of k, of some of the heads of k and v [B, Lk, Hkv, D]."""
    batch, _, _, dim = k.shape
    first, video = blocks.first_video, blocks.video_blocks
    out = k.new_empty((batch, len(heads), video, dim, dim))
    for sample in range(batch):
        tokens, real = block_tokens(blocks.k, sample, pieces.each * pieces.size)
        tokens, real = (x[first : first + video] for x in (tokens, real))
        own = real.unflatten(-1, (pieces.each, -1))[..., None]  # [NV, each, size, 1]
        count = own.sum(2, keepdim=True).clamp_min(1)
        centred = []
        for x in (k, v):
            part = x[sample][:, heads.start : heads.stop].index_select(0, tokens.flatten())
            part = part.float().transpose(0, 1).unflatten(1, own.shape[:3])  # [h, NV, ., ., D]
            part = part.masked_fill(~own, 0.0)
            away = part - part.sum(3, keepdim=True) / count
            centred.append(away.masked_fill(~own, 0.0).flatten(2, 3))
        length = real.sum(-1).clamp_min(1)[:, None, None]
        out[sample] = centred[0].mT @ centred[1] / length
    return out


def join(
    q: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, pooled: PooledKeys, bias: Tensor,
    slope: Tensor | None, rows_of_slope: int, heads: range, scale: float,
) -> None:  # fmt: skip
    """See `portable.tail.join`; some query blocks at a time."""
    first = blocks.first_video
    scores = max(1, len(heads) * blocks.block_q * pooled.count)
    step = max(1, _CHUNK // scores)
    for sample in range(len(q)):
        tokens, real = block_tokens(blocks.q, sample, blocks.block_q)
        key, value = (
            x[sample].transpose(0, 1).repeat_interleave(q.shape[2] // x.shape[2], 0)
            for x in (pooled.key, pooled.value)
        )
        key, value = (x[heads.start : heads.stop].float()[:, None] for x in (key, value))
        for low in range(0, blocks.video_blocks, step):
            part = slice(low, min(low + step, blocks.video_blocks))
            own = slice(first + part.start, first + part.stop)
            rows = torch.arange(part.start, part.stop, device=q.device) // rows_of_slope
            maps = None if slope is None else slope[sample][:, rows].float()
            some = slice(heads.start, heads.stop)
            _join_rows(
                q[sample, :, some], out[sample, :, some], lse[sample, some], tokens[own],
                real[own], key, value, bias[sample, some, part], maps, scale,
            )  # fmt: skip


def _join_rows(
    q: Tensor, out: Tensor, lse: Tensor, tokens: Tensor, real: Tensor, key: Tensor, value: Tensor,
    bias: Tensor, maps: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """q, out [L, h, D], lse [h, L], tokens and real [n, slots], key and value [h, 1, NP, D],
    bias [h, n, NP], maps [h, n, D, D]."""
    query = q.index_select(0, tokens.flatten()).float()
    query = query.unflatten(0, tokens.shape).permute(2, 0, 1, 3)  # [h, n, slots, D]
    score = query @ key.mT * scale + bias[:, :, None]
    far = score.logsumexp(-1)  # [h, n, slots]
    base = torch.where(far.isneginf(), 0.0, far).unsqueeze(-1)
    tail = (score - base).exp() @ value
    if maps is not None:
        tail = tail + query @ maps * scale
    # Slots past a block's end are left out: each token is written once.
    where = tokens[real]
    tail, far = tail[:, real].transpose(0, 1)[None], far[:, real][None]
    near, near_lse = out.index_select(0, where)[None], lse.index_select(1, where)[None]
    joined, joined_lse = merge(near, near_lse, tail.contiguous(), far.contiguous())
    out.index_copy_(0, where, joined[0])
    lse.index_copy_(1, where, joined_lse[0])
