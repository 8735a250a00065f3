"""The oracle: softmax(scale q k^T + mask) v with a dense mask, in float64.

out_i = sum_j p_ij v_j with p = softmax over the kept keys of row i; LSE_i = ln sum_j exp(s_ij).
A row that keeps no key is 0 with LSE -inf. Memory grows with Lq x Lk: for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.plan import BlockPlan, block_tokens, listed_entries


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


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, D] in q's type and LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    batch, _, heads, _ = q.shape
    group = heads // k.shape[2]
    query, key, value = (
        x.double().transpose(1, 2).repeat_interleave(n, 1)
        for x, n in ((q, 1), (k, group), (v, group))
    )
    mask = dense_mask(plan, batch, heads)
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~mask, 0.0)
    return (weights @ value).transpose(1, 2).to(q.dtype), lse.float()
