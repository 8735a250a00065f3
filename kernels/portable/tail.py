# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The tail of `kernels.tails` in Triton: which blocks it holds, what a slope is made of, the join.

`rows` turns statistics and a plan's lists into one row a query block: the bias of every pooled key,
-inf where its block was visited, and the blocks' weights. `covariances` are the C_j of `linear`.
`join` computes a query block's rows against the pooled keys and joins them to what the visited
blocks gave, in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.launching import alike, launch, launches_of
from dit_accel.kernels.plan import Visits
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.portable.steps import (
    aligned,
    boxable,
    describe,
    machine_of,
    padded_dim,
    shared_stride,
)
from dit_accel.kernels.probe import Pieces


@triton.jit
def _rows(
    mass_ptr, shift_ptr, start_ptr, count_ptr, index_ptr, flag_ptr, bias_ptr, weight_ptr,
    heads, first, video, flags, biases,
    stride_mb, stride_mh, stride_mk, stride_mq, stride_sb, stride_sh, stride_sk, stride_sq,
    stride_list_b, stride_list_h,
    COLUMNS: tl.constexpr, EACH: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid % video
    line = pid // video
    head = (line % heads).to(tl.int64)
    sample = (line // heads).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < video
    flag_at = flag_ptr + pid.to(tl.int64) * flags
    tl.store(flag_at + columns, tl.zeros([COLUMNS], tl.int8), mask=inside)
    tl.debug_barrier()
    at = sample * stride_list_b + head * stride_list_h + first + row
    start = tl.load(start_ptr + at)
    count = tl.load(count_ptr + at)
    entry = tl.arange(0, 128)
    for low in range(0, count, 128):
        listed = low + entry < count
        block = tl.load(index_ptr + start + low + entry, mask=listed, other=-1) - first
        tl.store(
            flag_at + block,
            tl.full([128], 1, tl.int8),
            mask=listed & (block >= 0) & (block < video),
        )
    tl.debug_barrier()
    free = tl.load(flag_at + columns, mask=inside, other=1) == 0
    bias_at = bias_ptr + pid.to(tl.int64) * biases
    shift_at = shift_ptr + sample * stride_sb + head * stride_sh + row * stride_sq
    for piece in tl.static_range(0, EACH):
        shift = tl.load(
            shift_at + (columns * EACH + piece).to(tl.int64) * stride_sk, mask=inside & free,
            other=float("-inf"),
        )  # fmt: skip
        tl.store(bias_at + columns * EACH + piece, shift, mask=inside)
    if WEIGHTS:
        mass = tl.load(
            mass_ptr + sample * stride_mb + head * stride_mh + row * stride_mq
            + columns.to(tl.int64) * stride_mk,
            mask=inside & free, other=float("-inf"),
        )  # fmt: skip
        top = tl.max(mass, 0)
        weight = tl.exp(mass - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight, 0)
        weight = weight / tl.where(total == 0, 1.0, total)
        tl.store(
            weight_ptr + pid.to(tl.int64) * flags + columns,
            weight.to(weight_ptr.dtype.element_ty), mask=columns < flags,
        )  # fmt: skip


def rows(
    mass: Tensor | None, shift: Tensor, visits: Visits, blocks: Blocks, each: int, heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Bias float32 [B, H, NV, NP] and weights [B, H, NV, n] in `dtype`, by query block.

    n: NV, and as many more of zeros as make it a multiple of 16.
    mass [B, H, NV, NV] (None: no weights) and shift [B, H, NP, NV] as in `Probe`, any strides.
    """
    batch, video = shift.shape[0], blocks.video_blocks
    flags, biases = map(aligned, (video, video * each))
    device = shift.device
    visited = torch.empty((batch, heads, video, flags), dtype=torch.int8, device=device)
    bias = torch.empty((batch, heads, video, biases), dtype=torch.float32, device=device)
    weights = None
    if mass is not None:
        weights = torch.empty((batch, heads, video, flags), dtype=dtype, device=device)
    masses = shift if mass is None else mass
    arguments = (
        masses, shift, visits.start, visits.count, visits.index, visited, bias,
        bias if weights is None else weights, heads, blocks.first_video, video, flags, biases,
        *masses.stride(), *shift.stride(),
        shared_stride(visits.count, 0), shared_stride(visits.count, 1),
    )  # fmt: skip
    constants = {
        "COLUMNS": max(16, triton.next_power_of_2(video)), "EACH": each,
        "WEIGHTS": weights is not None, "num_warps": 4,
    }  # fmt: skip
    lists = visits.start.data_ptr() & 15, visits.count.data_ptr() & 15, visits.index.data_ptr() & 15
    key = "tail rows", each, dtype, mass is None, visits.count.shape, *lists, *alike(masses, shift)
    launch(launches_of(blocks), key, _rows, (batch * heads * video,), arguments, constants,
           shift.device)  # fmt: skip
    return bias[..., : video * each], weights


@triton.jit
def _covariances(
    k_ptr, v_ptr, order, starts, lengths, out_ptr, heads, first_head, first, video, padded,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd,
    stride_len,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, EACH: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % padded  # those past the last one are zeros
    line = pid // padded
    head = (first_head + line % heads).to(tl.int64)
    sample = (line // heads).to(tl.int64)
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BK)
    there = block < video
    length = tl.load(lengths + sample * stride_len + first + block, mask=there, other=0)
    inside = columns < length
    start = tl.load(starts + first + block, mask=there, other=0)
    tokens = tl.where(inside, start + columns, 0)
    if HAS_ORDER:
        tokens = tl.load(order + tokens)
    tokens = tokens.to(tl.int64)
    held = inside[:, None] & (dims < D)[None, :]
    k = tl.load(
        k_ptr + sample * stride_kb + head * stride_kh
        + tokens[:, None] * stride_kn + dims[None, :] * stride_kd, mask=held, other=0.0,
    )  # [BK, DP]  # fmt: skip
    v = tl.load(
        v_ptr + sample * stride_vb + head * stride_vh
        + tokens[:, None] * stride_vn + dims[None, :] * stride_vd, mask=held, other=0.0,
    )  # [BK, DP]  # fmt: skip
    dtype = k.dtype
    if EACH > 1:
        size: tl.constexpr = BK // EACH
        own = tl.minimum(tl.maximum(length - tl.arange(0, EACH) * size, 0), size)
        count = tl.maximum(own, 1).to(tl.float32)[:, None]  # [EACH, 1]
        # About the mean of each piece; what is not there stays 0.
        kc = k.to(tl.float32).reshape(EACH, size, DP)
        vc = v.to(tl.float32).reshape(EACH, size, DP)
        kc = (kc - (tl.sum(kc, 1) / count)[:, None, :]).reshape(BK, DP)
        vc = (vc - (tl.sum(vc, 1) / count)[:, None, :]).reshape(BK, DP)
        k = tl.where(held, kc, 0.0).to(dtype)
        v = tl.where(held, vc, 0.0).to(dtype)
    count = tl.maximum(length, 1).to(tl.float32)
    c = tl.dot(tl.trans(k), v, input_precision="ieee") / count  # [DP, DP]
    if EACH == 1:  # the mean of products, less the product of the means
        key = tl.sum(k.to(tl.float32), 0) / count
        value = tl.sum(v.to(tl.float32), 0) / count
        c -= key[:, None] * value[None, :]
    at = out_ptr + (line.to(tl.int64) * padded + block) * D * D + dims[:, None] * D + dims[None, :]
    c = tl.where(block < video, c, 0.0)
    tl.store(at, c.to(dtype), mask=(dims < D)[:, None] & (dims < D)[None, :])


def covariances(k: Tensor, v: Tensor, blocks: Blocks, pieces: Pieces, heads: range) -> Tensor:
    """C [B, h, n, D, D] in the type of k, of some of the heads of k and v [B, Lk, Hkv, D].

    n: NV, and as many more of zeros as make it a multiple of 16.
    """
    batch, _, _, dim = k.shape
    video = blocks.video_blocks
    padded = aligned(video)
    out = torch.empty((batch, len(heads), padded, dim, dim), dtype=k.dtype, device=k.device)
    wide = k.element_size() == 4
    arguments = (
        k, v, blocks.k.starts if blocks.k.order is None else blocks.k.order, blocks.k.starts,
        blocks.k.lengths, out, len(heads), heads.start, blocks.first_video, video, padded,
        *k.stride(), *v.stride(), blocks.k.sample_stride,
    )  # fmt: skip
    constants = {
        "D": dim, "DP": padded_dim(dim), "BK": max(16, triton.next_power_of_2(blocks.block_k)),
        "EACH": pieces.each, "HAS_ORDER": blocks.k.order is not None,
        "num_warps": 4 if wide else 8, "num_stages": 1,
    }  # fmt: skip
    key = "covariances", pieces.each, len(heads), heads.start, *alike(k, v)
    launch(launches_of(blocks), key, _covariances, (batch * len(heads) * padded,), arguments,
           constants, k.device)  # fmt: skip
    return out


@triton.jit
def _join(
    q_ptr, out_ptr, lse_ptr, order, starts, lengths, key_ptr, value_ptr, key_desc, value_desc,
    bias_ptr, slope_ptr,
    heads, all_heads, first_head, group, first, video, pooled, biases, rows_of_slope, slopes,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_ob, stride_om, stride_oh, stride_od,
    stride_lb, stride_lh, stride_pkb, stride_pkn, stride_pkh, stride_pkd,
    stride_pvb, stride_pvn, stride_pvh, stride_pvd, stride_len, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
    SPLITS: tl.constexpr, HAS_ORDER: tl.constexpr, SLOPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = pid % SPLITS
    block = pid // SPLITS % video
    line = pid // SPLITS // video
    head = first_head + line % heads
    sample = (line // heads).to(tl.int64)
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    length = tl.load(lengths + sample * stride_len + first + block) - part * BM
    inside = tl.arange(0, BM) < length
    tokens = tl.where(
        inside, tl.load(starts + first + block) + part * BM + tl.arange(0, BM), 0
    )  # [BM]
    if HAS_ORDER:
        tokens = tl.load(order + tokens)
    tokens = tokens.to(tl.int64)
    held = inside[:, None] & (dims < D)[None, :]
    q_at = q_ptr + sample * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(
        q_at + tokens[:, None] * stride_qm + dims[None, :] * stride_qd, mask=held, other=0.0
    )  # [BM, DP]
    kv_head = (head // group).to(tl.int64)
    key_at = key_ptr + sample * stride_pkb + kv_head * stride_pkh
    value_at = value_ptr + sample * stride_pvb + kv_head * stride_pvh
    bias_at = bias_ptr + ((sample * all_heads + head) * video + block) * biases

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    scale_2 = scale * 1.4426950408889634
    # Loaded one step ahead: in time it would be waited for.
    ahead = tl.load(bias_at + columns, mask=columns < pooled, other=float("-inf"))  # [BN]
    for low in range(0, pooled, BN):
        number = low + columns
        there = number < pooled
        if TMA:  # past the last one it reads zeros
            k = key_desc.load([sample.to(tl.int32), low, head // group, 0]).reshape(BN, DP)
            v = value_desc.load([sample.to(tl.int32), low, head // group, 0]).reshape(BN, DP)
        else:
            some = there[:, None] & (dims < D)[None, :]
            k = tl.load(
                key_at + number.to(tl.int64)[:, None] * stride_pkn + dims[None, :] * stride_pkd,
                mask=some, other=0.0,
            )  # [BN, DP]  # fmt: skip
            v = tl.load(
                value_at + number.to(tl.int64)[:, None] * stride_pvn + dims[None, :] * stride_pvd,
                mask=some, other=0.0,
            )  # fmt: skip
        bias = ahead * 1.4426950408889634
        ahead = tl.load(bias_at + number + BN, mask=number + BN < pooled, other=float("-inf"))
        # A bias of -inf leaves no score: keys are finite where a block has any token.
        s = tl.fma(tl.dot(q, tl.trans(k), input_precision="ieee"), scale_2, bias[None, :])
        highest = tl.maximum(top, tl.max(s, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        alpha = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = highest

    seen = total != 0  # true of NaN, which must come out as NaN
    tail = acc / tl.where(seen, total, 1.0)[:, None]  # [BM, DP]
    if SLOPE:
        row = block // rows_of_slope
        slope_at = slope_ptr + (line.to(tl.int64) * slopes + row) * D * D
        moved = tl.zeros([BM, DP], tl.float32)
        for low in tl.static_range(0, DP, STEP):
            inner = low + tl.arange(0, STEP)
            piece = tl.load(
                q_at + tokens[:, None] * stride_qm + inner[None, :] * stride_qd,
                mask=inside[:, None] & (inner < D)[None, :], other=0.0,
            )  # [BM, STEP]  # fmt: skip
            m = tl.load(
                slope_at + inner[:, None] * D + dims[None, :],
                mask=(inner < D)[:, None] & (dims < D)[None, :], other=0.0,
            )  # [STEP, DP]  # fmt: skip
            moved = tl.dot(piece, m, moved, input_precision="ieee")
        tail += moved * scale
    far = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453,
                   float("-inf"))  # fmt: skip

    out_at = (out_ptr + sample * stride_ob + head.to(tl.int64) * stride_oh
              + tokens[:, None] * stride_om + dims[None, :] * stride_od)  # fmt: skip
    lse_at = lse_ptr + sample * stride_lb + head.to(tl.int64) * stride_lh + tokens
    near = tl.load(lse_at, mask=inside, other=float("-inf"))  # [BM]
    out = tl.load(out_at, mask=held, other=0.0).to(tl.float32)
    most = tl.maximum(near, far)
    base = tl.where(most == float("-inf"), 0.0, most)
    of_near = tl.exp(near - base)
    of_far = tl.exp(far - base)
    both = of_near + of_far
    some = both != 0
    both = tl.where(some, both, 1.0)
    joined = out * (of_near / both)[:, None] + tl.where(
        (of_far != 0)[:, None], tail * (of_far / both)[:, None], 0.0
    )
    tl.store(out_at, joined.to(out_ptr.dtype.element_ty), mask=held)
    tl.store(lse_at, tl.where(some, base + tl.log(both), float("-inf")), mask=inside)


def join(
    q: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, pooled: PooledKeys, bias: Tensor,
    slope: Tensor | None, rows_of_slope: int, heads: range, scale: float,
) -> None:  # fmt: skip
    """Joins the tail of some query heads to `out` [B, Lq, H, D] and `lse` [B, H, Lq], in place.

    bias [B, H, NV, NP]. slope: [B, h, n, D, D] of these heads, each for so many query blocks.
    """
    batch, _, every, dim = q.shape
    video = blocks.video_blocks
    padded = padded_dim(dim)
    rows, some, step, warps, stages = _steps(padded, q.element_size())
    slots = max(16, triton.next_power_of_2(blocks.block_q))
    rows = min(rows, slots)
    boxes = machine_of(q.device).tma and boxable(pooled.key) and boxable(pooled.value)
    described = (bias, bias)
    if boxes:
        described = (describe(pooled.key, some, padded), describe(pooled.value, some, padded))
    assert slope is None or slope.is_contiguous(), "made by a product"
    splits = slots // rows
    arguments = (
        q, out, lse, blocks.q.starts if blocks.q.order is None else blocks.q.order,
        blocks.q.starts, blocks.q.lengths, pooled.key, pooled.value, *described, bias,
        bias if slope is None else slope, len(heads), every, heads.start,
        every // pooled.key.shape[2], blocks.first_video, video, pooled.count, bias.stride(2),
        rows_of_slope, 1 if slope is None else slope.shape[2], *q.stride(), *out.stride(),
        lse.stride(0), lse.stride(1), *pooled.key.stride(), *pooled.value.stride(),
        blocks.q.sample_stride, scale,
    )  # fmt: skip
    constants = {
        "D": dim, "DP": padded, "BM": rows, "BN": some, "STEP": min(step, padded),
        "SPLITS": splits, "HAS_ORDER": blocks.q.order is not None, "SLOPE": slope is not None,
        "TMA": boxes, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    slopes = () if slope is None else (slope,)
    key = ("join", len(heads), heads.start, rows_of_slope,
           *alike(q, out, lse, pooled.key, pooled.value, bias, *slopes))  # fmt: skip
    launch(launches_of(blocks), key, _join, (batch * len(heads) * video * splits,), arguments,
           constants, q.device)  # fmt: skip


def _steps(dim: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Rows, pooled keys and columns of a step, warps and stages, for a padded head_dim."""
    if itemsize == 4:
        return 32, 32, 32, 4, 2
    return (64, 64, 64, 4, 3) if dim <= 128 else (64, 32, 64, 4, 2)
