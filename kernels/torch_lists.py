"""The torch backend's way through plans that are made at each call: no group is looked for.

Their lists are rows of equal length: a row's key blocks are gathered side by side, with a mask
where a block is short or a list has fewer, and many rows run as one batched call. Query blocks that
are not video visit every key, all as one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, block_tokens
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan

# Gathered keys and values of one batched call, bytes: within a CPU's caches; on a GPU large enough
# to fill it, small beside the caller's own tensors.
CPU_CHUNK_BYTES = 4 << 20
GPU_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class _Side:
    """What the blocks of one sample are, worked out once.

    queries int64 [NV, P], keys int64 [NK, P]: raster tokens of the video's query blocks and of all
    key blocks; slots past a block's end repeat one of its tokens. real_q, real_k: which are not
    such. full: whether all slots of both are real. others: int64, queries that are not video;
    valid: int64, every valid key.
    """

    queries: Tensor
    keys: Tensor
    real_q: Tensor
    real_k: Tensor
    full: bool
    others: Tensor
    valid: Tensor


@once
def _side(blocks: Blocks, sample: int) -> _Side:
    first, stop = blocks.first_video, blocks.first_video + blocks.video_blocks
    queries, real_q = block_tokens(blocks.q, sample, blocks.block_q)
    keys, real_k = block_tokens(blocks.k, sample, blocks.block_k)
    others = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    others[first:stop] = False
    rest = queries[others][real_q[others]]
    valid = keys[real_k].sort().values
    queries, keys = (
        torch.where(real, tokens, tokens[:, :1])
        for tokens, real in ((queries, real_q), (keys, real_k))
    )
    real_q = real_q[first:stop]
    return _Side(
        queries[first:stop], keys, real_q, real_k, bool(real_q.all() & real_k.all()), rest, valid
    )


def attend_lists(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `torch_backend.torch_attention`; the plan has neither a token mask nor pooled keys."""
    batch, length, heads, _ = q.shape
    blocks, lists = plan.blocks, plan.visits
    first, stop = blocks.first_video, blocks.first_video + blocks.video_blocks
    group = heads // k.shape[2]
    out = torch.empty_like(q) if blocks.covers else torch.zeros_like(q)
    lse = None
    if return_lse:
        lse = q.new_full((batch, heads, length), -torch.inf, dtype=torch.float32)
    start, count = (x[..., first:stop] for x in (lists.start, lists.count))
    places = torch.arange(max(1, plan.shape.most), device=q.device, dtype=torch.int32)
    for sample in range(batch):
        side = _side(blocks, sample % max(len(blocks.k.lengths), len(blocks.q.lengths)))
        rows = sample % len(count)
        listed = places < count[rows].unsqueeze(-1)  # [Hl, NV, M]
        at = torch.where(listed, start[rows].unsqueeze(-1) + places, start[rows].unsqueeze(-1))
        index = lists.index[at.long()].long() if len(lists.index) else at.long()
        whole = side.full and bool(listed.all())
        for head in range(heads):
            one = head % len(index)
            _video(
                q[sample, :, head], k[sample, :, head // group], v[sample, :, head // group],
                side, index[one], None if whole else listed[one], scale,
                out[sample, :, head], None if lse is None else lse[sample, head],
            )  # fmt: skip
        if len(side.others):
            _text(q[sample], k[sample], v[sample], side, scale, out[sample],
                  None if lse is None else lse[sample])  # fmt: skip
    return out, lse


def _video(
    q: Tensor, k: Tensor, v: Tensor, side: _Side, index: Tensor, listed: Tensor | None,
    scale: float, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """The video's rows of one head; q, k, v, out [L, D], index [NV, M]."""
    key, value = (x.index_select(0, side.keys.flatten()) for x in (k, v))
    key, value = (x.view(*side.keys.shape, -1) for x in (key, value))  # [NK, P, D]
    slots, width, dim = side.keys.shape[1], index.shape[1], key.shape[-1]
    limit = GPU_CHUNK_BYTES if q.is_cuda else CPU_CHUNK_BYTES
    some = max(1, limit // (2 * width * slots * dim * key.element_size()))
    for low in range(0, len(index), some):
        part = index[low : low + some]
        queries = side.queries[low : low + some]
        query = q.index_select(0, queries.flatten()).view(*queries.shape, -1).unsqueeze(1)
        keys, values = (
            x.index_select(0, part.flatten()).view(len(part), 1, width * slots, -1)
            for x in (key, value)
        )
        mask = None
        if listed is not None:
            real = side.real_k[part] & listed[low : low + some].unsqueeze(-1)
            mask = real.flatten(1)[:, None, None]
        result, sums = attention_and_lse(query, keys, values, mask, scale, lse is not None)
        real_q = side.real_q[low : low + some]
        tokens = queries[real_q]
        out.index_copy_(0, tokens, result[:, 0][real_q])
        if lse is not None and sums is not None:
            lse.index_copy_(0, tokens, sums[:, 0][real_q])


def _text(
    q: Tensor, k: Tensor, v: Tensor, side: _Side, scale: float, out: Tensor, lse: Tensor | None
) -> None:
    """Rows that see every valid key; [L, H, D]."""
    group = q.shape[1] // k.shape[1]
    query = q.index_select(0, side.others).transpose(0, 1)[None]
    key, value = (
        x.index_select(0, side.valid).transpose(0, 1).repeat_interleave(group, 0)[None]
        for x in (k, v)
    )
    result, sums = attention_and_lse(query, key, value, None, scale, lse is not None)
    out.index_copy_(0, side.others, result[0].transpose(0, 1))
    if lse is not None and sums is not None:
        lse.index_copy_(1, side.others, sums[0])


def attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, H, n, D], and the LSE float32 [B, H, n] where it is asked for (or at hand).

    mask: bool [B, 1, 1 or n, m]; a row that keeps nothing is 0 with LSE -inf.
    """
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if fused is not None and q.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            bias = bias.expand(-1, -1, q.shape[2], -1)
        # It takes numbers of a row to be next to each other.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = fused(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        if mask is not None:
            empty = ~mask.any(-1)
            out = out.masked_fill(empty.unsqueeze(-1), 0.0)
            lse = lse.masked_fill(empty, -torch.inf)
        return out, lse.float()
    if not with_lse:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return (out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)), None
    return written_out(q, k, v, mask, scale)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    careful: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out, a few rows at a time, for the LSE that F.sdpa keeps back.

    mask: as in `attention_and_lse`, of the first keys. bias: float32 [B, np], added to the scores
    of the last np keys, which the mask leaves alone.
    careful: values may be NaN or infinite where the mask cuts them off.
    """
    step = max(16, (64 << 20) // (q.shape[0] * q.shape[1] * k.shape[2] * 4))
    outs, sums = [], []
    for rows in range(0, q.shape[2], step):
        scores = q[:, :, rows : rows + step].float() @ k.float().mT * scale
        if mask is not None:
            own = mask if mask.shape[2] == 1 else mask[:, :, rows : rows + step]
            scores[..., : mask.shape[-1]].masked_fill_(~own, -torch.inf)
        if bias is not None:
            scores[..., -bias.shape[-1] :] += bias[:, None, None]
        lse = scores.logsumexp(-1)
        finite = torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)
        weights = (scores - finite).exp()
        if careful and mask is not None:
            # Pooled keys, behind the others, are kept.
            kept = F.pad(own, (0, k.shape[2] - mask.shape[-1]), value=True)
            outs.append(_kept_product(weights, v.float(), kept).to(q.dtype))
        else:
            outs.append((weights @ v.float()).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _kept_product(weights: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """weights [.., n, m] @ v [.., m, D], to which a pair that is not `kept` adds nothing."""
    out = weights @ v.nan_to_num(0.0, 0.0, 0.0)
    for odd, number in (
        (v.isnan(), torch.nan),
        (v.isposinf(), torch.inf),
        (v.isneginf(), -torch.inf),
    ):
        out = out + torch.where(kept.float() @ odd.float() > 0, number, 0.0)
    return out
