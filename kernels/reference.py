"""The oracle: softmax(scale q k^T + mask) v with a dense mask, in float64.

out_i = sum_j p_ij v_j with p = softmax over the kept keys of row i; LSE_i = ln sum_j exp(s_ij).
Pooled keys are further columns, with their bias in s_ij.
A row that keeps no key is 0 with LSE -inf. A pair that is not kept adds nothing, whatever stands
in its key or value. Memory grows with Lq x Lk: for tests.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dit_accel.kernels.blocks import block_tokens
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import PooledKeys


def dense_mask(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    """bool [batch, heads, Lq, Lk]: the token pairs that the plan keeps."""
    blocks = plan.blocks
    shape = (batch, heads, blocks.q_length, blocks.k_length)
    mask = torch.zeros(shape, dtype=torch.bool, device=plan.device)
    for b in range(batch):
        q_tokens, q_real = block_tokens(blocks.q, b, blocks.block_q)
        k_tokens, k_real = block_tokens(blocks.k, b, blocks.block_k)
        for h, block in itertools.product(range(heads), range(blocks.q.count)):
            queries = q_tokens[block][q_real[block]]
            full, masked = plan.visits.entries(b, h, block)
            for key in full.tolist():
                mask[b, h, queries[:, None], k_tokens[key][k_real[key]]] = True
            for key in masked.tolist():
                assert plan.mask is not None, "`validate` asks for it"
                keys = k_tokens[key][k_real[key]]
                mask[b, h, queries[:, None], keys] |= plan.mask.allowed(queries, keys)
    return mask


def pooled_mask(plan: BlockPlan, batch: int, heads: int, keys: int) -> Tensor:
    """bool [batch, heads, Lq, keys]: the pooled keys that each query row sees."""
    blocks = plan.blocks
    shape = (batch, heads, blocks.q_length, keys)
    mask = torch.zeros(shape, dtype=torch.bool, device=plan.device)
    if plan.pooled is None:
        return mask
    for b in range(batch):
        q_tokens, q_real = block_tokens(blocks.q, b, blocks.block_q)
        for h, block in itertools.product(range(heads), range(blocks.q.count)):
            seen, _ = plan.pooled.entries(b, h, block)
            mask[b, h, q_tokens[block][q_real[block]][:, None], seen.long()] = True
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] in q's type and LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    batch, _, heads, _ = q.shape
    mask = dense_mask(plan, batch, heads)
    bias = torch.zeros(1, plan.blocks.k_length, dtype=torch.float64, device=q.device)
    if pooled is not None:
        k, v = torch.cat([k, pooled.key], 1), torch.cat([v, pooled.value], 1)
        mask = torch.cat([mask, pooled_mask(plan, batch, heads, pooled.count)], -1)
        log_count = pooled.log_count.double()
        bias = torch.cat([bias.expand(len(log_count), -1), log_count], -1)
    group = heads // k.shape[2]
    query, key, value = (
        x.double().transpose(1, 2).repeat_interleave(n, 1)
        for x, n in ((q, 1), (k, group), (v, group))
    )
    scores = query @ key.mT * scale + bias[:, None, None, :]
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    finite = torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)
    weights = (scores - finite).exp()
    out = weights @ value.nan_to_num(0.0, 0.0, 0.0)
    for odd in (value.isnan(), value.isposinf(), value.isneginf()):  # 0 times these is NaN
        hit = mask.double() @ odd.double() > 0
        out = out + torch.where(hit, value[odd][:1].sum(), 0.0)
    return out.transpose(1, 2).to(q.dtype), lse.float() if return_lse else None
