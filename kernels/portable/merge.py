# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The merge of two partial attention results (see `merge`) in one pass, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.portable.steps import padded_dim


@triton.jit
def _merge(
    a_ptr, b_ptr, out_ptr, a_lse, b_lse, lse_ptr, length, heads,
    stride_ab, stride_an, stride_ah, stride_ad, stride_bb, stride_bn, stride_bh, stride_bd,
    stride_ob, stride_on, stride_oh, stride_od, stride_alb, stride_alh, stride_aln,
    stride_blb, stride_blh, stride_bln,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    parts = tl.cdiv(length, ROWS)
    sample = (pid // heads // parts).to(tl.int64)
    rows = (pid // heads % parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DP)
    inside = rows < length
    la = tl.load(
        a_lse + sample * stride_alb + head * stride_alh + rows * stride_aln, mask=inside, other=0.0
    )
    lb = tl.load(
        b_lse + sample * stride_blb + head * stride_blh + rows * stride_bln, mask=inside, other=0.0
    )
    top = tl.maximum(la, lb)
    base = tl.where(top == float("-inf"), 0.0, top)
    wa, wb = tl.exp(la - base), tl.exp(lb - base)
    total = wa + wb
    seen = total != 0  # true of NaN
    total = tl.where(seen, total, 1.0)
    tl.store(
        lse_ptr + (sample * heads + head) * length + rows,
        tl.where(seen, base + tl.log(total), float("-inf")),
        mask=inside,
    )
    wa, wb = wa / total, wb / total
    held = inside[:, None] & (dims < D)[None, :]
    a_at = a_ptr + sample * stride_ab + head * stride_ah
    b_at = b_ptr + sample * stride_bb + head * stride_bh
    a = tl.load(
        a_at + rows[:, None] * stride_an + dims[None, :] * stride_ad,
        mask=held & (wa != 0)[:, None],
        other=0.0,
    )
    b = tl.load(
        b_at + rows[:, None] * stride_bn + dims[None, :] * stride_bd,
        mask=held & (wb != 0)[:, None], other=0.0,
    )  # fmt: skip
    out = a.to(tl.float32) * wa[:, None] + b.to(tl.float32) * wb[:, None]
    out_at = out_ptr + sample * stride_ob + head * stride_oh
    tl.store(
        out_at + rows[:, None] * stride_on + dims[None, :] * stride_od,
        out.to(out_ptr.dtype.element_ty),
        mask=held,
    )


@torch.library.custom_op("dit_accel::merge_results", mutates_args=())
def merge_results(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, L, H, D] like a and LSE float32 [B, H, L], from two of each, any strides."""
    batch, length, heads, dim = a.shape
    out = torch.empty_like(a)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=a.device)
    padded = padded_dim(dim)
    rows = max(16, 8192 // padded)
    programs = triton.cdiv(length, rows) * heads * batch
    if programs:
        with torch.cuda.device_of(a):
            _merge[(programs,)](
                a, b, out, a_lse, b_lse, lse, length, heads,
                *a.stride(), *b.stride(), *out.stride(), *a_lse.stride(), *b_lse.stride(),
                D=dim, DP=padded, ROWS=rows, num_warps=4,
            )  # fmt: skip
    return out, lse


@merge_results.register_fake
def _fake(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = a.shape
    return torch.empty_like(a), a.new_empty((batch, heads, length), dtype=torch.float32)
