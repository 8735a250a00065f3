# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Rows of several token tensors in a new order, in one pass and one launch, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.portable.steps import padded_dim

MAX_TENSORS = 3


@triton.jit
def _gather_one(
    pid, x_ptr, out_ptr, index, count, heads, stride_b, stride_n, stride_h, stride_d,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Heads of a token are next to each other in memory: they run next to each other.
    head = pid % heads
    parts = tl.cdiv(count, ROWS)
    sample = (pid // heads // parts).to(tl.int64)
    rows = pid // heads % parts * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DP)
    tokens = tl.load(index + rows, mask=rows < count, other=-1).to(tl.int64)
    columns = (dims < D)[None, :]
    x = tl.load(
        x_ptr + sample * stride_b + head.to(tl.int64) * stride_h
        + tokens[:, None] * stride_n + dims[None, :] * stride_d,
        mask=(tokens >= 0)[:, None] & columns, other=0.0,
    )  # fmt: skip
    place = (sample * count + rows) * heads + head
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :], x, mask=(rows < count)[:, None] & columns
    )


@triton.jit
def _gather(
    a_ptr, a_out, a_heads, stride_ab, stride_an, stride_ah, stride_ad,
    b_ptr, b_out, b_heads, stride_bb, stride_bn, stride_bh, stride_bd,
    c_ptr, c_out, c_heads, stride_cb, stride_cn, stride_ch, stride_cd,
    index, count, first, second,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < first:
        _gather_one(pid, a_ptr, a_out, index, count, a_heads,
                    stride_ab, stride_an, stride_ah, stride_ad, D, DP, ROWS)  # fmt: skip
    elif pid < second:
        _gather_one(pid - first, b_ptr, b_out, index, count, b_heads,
                    stride_bb, stride_bn, stride_bh, stride_bd, D, DP, ROWS)  # fmt: skip
    else:
        _gather_one(pid - second, c_ptr, c_out, index, count, c_heads,
                    stride_cb, stride_cn, stride_ch, stride_cd, D, DP, ROWS)  # fmt: skip


@torch.library.custom_op("dit_accel::gather_tokens", mutates_args=())
def gather_tokens(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """[B, P, H, D] rows of up to MAX_TENSORS tensors [B, S, H, D] of one type, D and batch.

    index: int32 [P], tokens; -1 gives a row of zeros.
    """
    batch, _, _, dim = tensors[0].shape
    count = index.shape[0]
    padded = padded_dim(dim)
    rows = max(16, 8192 // padded)
    outs = [x.new_empty((batch, count, x.shape[2], dim)) for x in tensors]
    fields, stops = [], [0]
    for place in range(MAX_TENSORS):
        x, out = tensors[0], outs[0]  # stands in where there are fewer: no program reaches it
        heads = 0
        if place < len(tensors):
            x, out = tensors[place], outs[place]
            heads = x.shape[2]
        fields += [x, out, max(1, heads), *x.stride()]
        stops.append(stops[-1] + batch * heads * triton.cdiv(count, rows))
    if stops[-1]:
        with torch.cuda.device_of(index):
            _gather[(stops[-1],)](
                *fields, index, count, stops[1], stops[2], D=dim, DP=padded, ROWS=rows, num_warps=4
            )
    return outs


@gather_tokens.register_fake
def _fake(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    return [x.new_empty((x.shape[0], index.shape[0], x.shape[2], x.shape[3])) for x in tensors]
