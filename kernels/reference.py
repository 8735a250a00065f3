"""The oracle: softmax(scale q k^T + mask) v with a dense mask, in float64.

out_i = sum_j p_ij v_j with p = softmax over the kept keys of row i; LSE_i = ln sum_j exp(s_ij).
Pooled keys are further columns, with their bias in s_ij.
A row that keeps no key is 0 with LSE -inf. Memory grows with Lq x Lk: for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.plan import BlockPlan, block_tokens, listed_entries
from dit_accel.kernels.pooling import PooledKeys


def dense_mask(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    """bool [batch, heads, Lq, Lk]: the token pairs that the plan keeps."""
    shape = (batch, heads, plan.q_length, plan.k_length)
    mask = torch.zeros(shape, dtype=torch.bool, device=plan.device)
    for b in range(batch):
        q_tokens, q_ok = block_tokens(plan.q_blocks, b, plan.block_q)
        k_tokens, k_ok = block_tokens(plan.k_blocks, b, plan.block_k)
        for h in range(heads):
            for count, index, partial in (
                (plan.full_count, plan.full_index, False),
                (plan.partial_count, plan.partial_index, True),
            ):
                if count is None or index is None:
                    continue
                row = (b if count.shape[0] > 1 else 0, h if count.shape[1] > 1 else 0)
                entries = listed_entries(count[row], index[row])
                for block, key in zip(
                    entries.nonzero()[:, 0].tolist(), index[row][entries].tolist(), strict=True
                ):
                    queries, keys = q_tokens[block][q_ok[block]], k_tokens[key][k_ok[key]]
                    kept = torch.ones((), dtype=torch.bool, device=plan.device)
                    if partial and plan.token_mask is not None:
                        kept = plan.token_mask.allowed(queries, keys)
                    mask[b, h, queries[:, None], keys] |= kept
    return mask


def pooled_mask(plan: BlockPlan, batch: int, heads: int, keys: int) -> Tensor:
    """bool [batch, heads, Lq, keys]: the pooled keys that each query row sees."""
    shape = (batch, heads, plan.q_length, keys)
    mask = torch.zeros(shape, dtype=torch.bool, device=plan.device)
    count, index = plan.pooled_count, plan.pooled_index
    if count is None or index is None:
        return mask
    for b in range(batch):
        q_tokens, q_ok = block_tokens(plan.q_blocks, b, plan.block_q)
        for h in range(heads):
            row = (b if count.shape[0] > 1 else 0, h if count.shape[1] > 1 else 0)
            for block, listed in enumerate(count[row].tolist()):
                seen = index[row][block, :listed].long()
                mask[b, h, q_tokens[block][q_ok[block]][:, None], seen] = True
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
    bias = torch.zeros(1, plan.k_length, dtype=torch.float64, device=q.device)
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
    out = (weights @ value).transpose(1, 2).to(q.dtype)
    return out, lse.float() if return_lse else None
