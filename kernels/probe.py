"""What one exact row for each query block says of the video's key blocks.

The row of query block i is its mean query: p_i(t) = scale qbar_i . k_t for every token t of the
video's keys. Of each key block j, with n_j valid tokens, it tells in float32
    l_ij = ln sum_{t in j} exp(p_i(t)), the block's log mass,
    b_ij = l_ij - mean_t p_i(t), what a pooled key adds to its score to have this mass,
    var_ij, the population variance of p_i(t) over the block.
Selectors rank blocks by it, tails weigh by it; a call makes it once. Source: linear tail, ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, BlockTable, block_tokens
from dit_accel.kernels.machine import runs_triton
from dit_accel.kernels.once import once
from dit_accel.kernels.pooling import pool_blocks

Rank = Literal["mass", "error"]
ERROR_FLOOR = 1e-3
"""Added to the variance in the rank "error"."""
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Pieces:
    """The video's key blocks, cut into runs of `size` consecutive slots; the last may be short.

    table: of all pieces, `each` per block, block after block; those past a block's end are empty.
    """

    table: BlockTable
    size: int
    each: int


@once
def pieces_of(blocks: Blocks, size: int) -> Pieces:
    """The pieces of at most `size` tokens; the blocks themselves where these are no longer."""
    size = min(size, blocks.block_k)
    each = -(-blocks.block_k // size)
    video = slice(blocks.first_video, blocks.first_video + blocks.video_blocks)
    before = torch.arange(each, device=blocks.device, dtype=torch.int32) * size
    starts = blocks.k.starts[video, None] + before
    lengths = (blocks.k.lengths[:, video, None] - before).clamp(0, size)
    # An empty piece begins where there is a token.
    starts = torch.where(lengths.amax(0) > 0, starts, blocks.k.starts[video, None])
    table = BlockTable(
        blocks.k.order, starts.flatten().contiguous(), lengths.flatten(1).contiguous()
    )
    return Pieces(table, size, each)


@dataclass(frozen=True, eq=False)
class Probe:
    """The statistics of a call, float32, by key block (or piece) and then query block.

    mass: l [B, H, NV, NV]. shift: b [B, H, NP, NV], of pieces. rank: [B, H, NV, NV], what a
    selector keeps the highest of, if it was asked for. Where a key block or a piece has no valid
    token all are -inf.
    """

    mass: Tensor
    shift: Tensor
    rank: Tensor | None = None


def probe(
    q: Tensor, k: Tensor, blocks: Blocks, scale: float, size: int, rank: Rank | None = None
) -> Probe:
    """The statistics of q [B, Lq, H, D] and k [B, Lk, Hkv, D]; size: tokens of a piece.

    rank: "mass" is l, "error" is l + ln(var + 1e-3) / 2: the mass times what a first order would
    get wrong.
    """
    means = pool_blocks(q, blocks.q, blocks.block_q, q.dtype)  # [B, NQ, H, D]
    pieces = pieces_of(blocks, size)
    if runs_triton(q):
        from dit_accel.kernels.portable.probe import launch

        floor = ERROR_FLOOR if rank == "error" else None
        mass, shift, ranks = launch(means, k, blocks, pieces.each, scale, floor)
        return Probe(mass, shift, mass if rank == "mass" else ranks)
    return in_torch(means, k, blocks, pieces, scale, rank)


def in_torch(
    means: Tensor, k: Tensor, blocks: Blocks, pieces: Pieces, scale: float, rank: Rank | None
) -> Probe:
    """The same with torch alone, some key blocks at a time; means: of q's blocks."""
    batch, _, heads, _ = means.shape
    first, video = blocks.first_video, blocks.video_blocks
    group = heads // k.shape[2]
    shape = (batch, heads, video, video)
    mass = means.new_empty(shape, dtype=torch.float32)
    shift = means.new_empty((batch, heads, video * pieces.each, video), dtype=torch.float32)
    ranks = None if rank is None else torch.empty_like(mass)
    slots = pieces.each * pieces.size
    some = max(1, _CHUNK // max(1, heads * slots * video))
    for sample in range(batch):
        tokens, real = block_tokens(blocks.k, sample, slots)  # [NK, slots]
        query = means[sample, first : first + video].transpose(0, 1).float()  # [H, NV, D]
        for low in range(0, video, some):
            part = slice(first + low, first + min(low + some, video))
            key = k[sample].index_select(0, tokens[part].flatten()).float()  # [n slots, Hkv, D]
            key = key.transpose(0, 1).repeat_interleave(group, 0)
            scores = (query * scale @ key.mT).unflatten(-1, (-1, slots))  # [H, NV, n, slots]
            found = _statistics(scores, real[part], pieces.each, rank)
            at = slice(low, low + scores.shape[2])
            mass[sample, :, at] = found.mass
            shift[sample, :, at.start * pieces.each : at.stop * pieces.each] = found.shift
            if ranks is not None and found.rank is not None:
                ranks[sample, :, at] = found.rank
    return Probe(mass, shift, ranks)


def _statistics(scores: Tensor, real: Tensor, each: int, rank: Rank | None) -> Probe:
    """Of scores [H, NV, n, slots] of some key blocks, the statistics [H, n, NV]."""
    cut = scores.unflatten(-1, (each, -1))
    there = real.unflatten(-1, (each, -1))  # [n, each, size]
    count = there.sum(-1)
    masses = cut.masked_fill(~there, -torch.inf).logsumexp(-1)  # [H, NV, n, each]
    means = cut.masked_fill(~there, 0.0).sum(-1) / count.clamp_min(1)
    shift = torch.where(count > 0, masses - means, -torch.inf)
    mass = masses.logsumexp(-1)  # [H, NV, n]
    ranks = None
    if rank == "mass":
        ranks = mass.mT
    elif rank == "error":
        count = real.sum(-1).clamp_min(1)  # [n]
        mean = scores.masked_fill(~real, 0.0).sum(-1, keepdim=True) / count.unsqueeze(-1)
        spread = (scores - mean).masked_fill(~real, 0.0).square().sum(-1) / count
        ranks = (mass + 0.5 * (spread + ERROR_FLOOR).log()).mT
    return Probe(mass.mT, shift.flatten(2).mT, ranks)
