"""The portable block-sparse forward kernel (NVIDIA sm80 and later, ROCm, Triton's interpreter).

One program computes BM rows of one query block of one head. With s_ij = scale q_i k_j (masked
pairs -inf), it walks the block's lists keeping, per row, the running maximum m, the sum
l = sum_j 2^(s_ij log2(e) - m) and acc = sum_j 2^(...) v_j, all in float32; on a new maximum m' both
are scaled by 2^(m - m'). At the end out = acc / l and LSE = (m + log2 l) ln 2; a row without keys
is 0 with LSE -inf.

Rows are gathered and scattered through the tables' `order`: nothing is permuted in memory. A list
has its whole blocks first: they run without any length mask, and where blocks are consecutive
tokens and the hardware has TMA, as boxes of a tensor descriptor over [B, Lk, Hkv, D]. Short blocks
mask the keys past their length; partial blocks evaluate the token mask on the tokens' coordinates,
and set values that are not finite aside, so that none reaches a row that does not keep it.
Pooled keys are gathered BN at a time, with a bias of their own. Stores are masked to the block's
own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launching import Launch, alike, launches_of, results_like, traced
from dit_accel.kernels.machine import interpreted
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.portable.masks import MASK_FUNCTIONS, load_params
from dit_accel.kernels.portable.steps import (
    boxable,
    describe,
    machine_of,
    padded_dim,
    pick_config,
    shared_stride,
)

LOG2_E = 1.4426950408889634


@triton.jit
def _tokens(order, positions, inside, HAS_ORDER: tl.constexpr):
    # Offsets outside the block read token 0, so that no address leaves the tensor.
    tokens = tl.where(inside, positions, 0)
    if HAS_ORDER:
        tokens = tl.load(order + tokens)
    return tokens.to(tl.int64)


@triton.jit
def _online(acc, top, total, s, v):
    """One step of the online softmax; s [BM, BN] in base 2, masked pairs -inf."""
    highest = tl.maximum(top, tl.max(s, 1))
    # Rows that have seen no key yet: subtract 0, so that -inf - -inf never happens.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    alpha = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])  # [BM, BN]
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BM, DP]
    return acc, highest, total


@triton.jit
def _visit_whole(
    acc, top, total, q, stop, index, k_desc, v_desc,
    k_ptr, v_ptr, k_order, k_starts, sample, kv_head,
    stride_kn, stride_kd, stride_vn, stride_vd, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    HAS_ORDER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    # Where the next step starts is loaded one step ahead: it costs two dependent loads, and read in
    # time it would cost the pipeline a stage of keys and values.
    ahead = 0
    if stop > 0:
        ahead = tl.load(k_starts + tl.load(index))
    for step in range(0, stop * SPLITS):
        start = ahead + (step % SPLITS) * BN
        later = tl.minimum(step + 1, stop * SPLITS - 1) // SPLITS
        ahead = tl.load(k_starts + tl.load(index + later))
        if TMA:
            k = k_desc.load([sample, start, kv_head, 0]).reshape(BN, DP)
            v = v_desc.load([sample, start, kv_head, 0]).reshape(BN, DP)
        else:
            keys = _tokens(k_order, start + columns, columns < BN, HAS_ORDER)  # [BN]
            k_at = k_ptr + keys[:, None] * stride_kn + dims[None, :] * stride_kd
            v_at = v_ptr + keys[:, None] * stride_vn + dims[None, :] * stride_vd
            if DP != D:
                k = tl.load(k_at, mask=(dims < D)[None, :], other=0.0)  # [BN, DP]
                v = tl.load(v_at, mask=(dims < D)[None, :], other=0.0)
            else:
                k = tl.load(k_at)
                v = tl.load(v_at)
        # Nothing is masked and scale >= 0, so that the maximum may be taken before scaling.
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        highest = tl.maximum(top, tl.max(s, 1) * scale)
        alpha = tl.exp2(top - highest)
        p = tl.exp2(tl.fma(s, scale, -highest[:, None]))
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = highest
    return acc, top, total


@triton.jit
def _visit_masked(
    acc, top, total, q, first, stop, index,
    k_ptr, v_ptr, k_order, k_starts, k_lengths,
    stride_kn, stride_kd, stride_vn, stride_vd, scale,
    qt, qh, qw, k_coords, rule_params,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    HAS_ORDER: tl.constexpr, MASK_TOKENS: tl.constexpr, MASK_FN: tl.constexpr,
    OTHER_FN: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    for step in range(first * SPLITS, stop * SPLITS):
        block = tl.load(index + step // SPLITS)
        part = (step % SPLITS) * BN
        inside = columns < tl.load(k_lengths + block) - part
        start = tl.load(k_starts + block) + part
        keys = _tokens(k_order, start + columns, inside, HAS_ORDER)  # [BN]
        held = inside[:, None] & (dims < D)[None, :]
        k = tl.load(
            k_ptr + keys[:, None] * stride_kn + dims[None, :] * stride_kd, mask=held, other=0.0
        )  # [BN, DP]
        v = tl.load(
            v_ptr + keys[:, None] * stride_vn + dims[None, :] * stride_vd, mask=held, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BM, BN]
        kept = inside[None, :]  # [1, BN], then [BM, BN]
        if MASK_TOKENS:
            at = k_coords + keys * 3
            kt, kh, kw = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            allowed = MASK_FN(
                qt[:, None], qh[:, None], qw[:, None],
                kt[None, :], kh[None, :], kw[None, :], load_params(rule_params),
            )  # fmt: skip
            if OTHER_FN is not None:
                allowed = allowed | OTHER_FN(
                    qt[:, None], qh[:, None], qw[:, None],
                    kt[None, :], kh[None, :], kw[None, :], load_params(rule_params + 16),
                )  # fmt: skip
            kept = kept & allowed
        s = tl.where(kept, s, float("-inf"))
        if MASK_TOKENS:
            odd = v - v != 0  # NaN or infinite: its product with 0 must not reach rows without it
            if tl.max(odd.to(tl.int32)) != 0:
                ones = kept.to(v.dtype)
                up = tl.dot(ones, (odd & ~(v < 0)).to(v.dtype), input_precision="ieee")
                down = tl.dot(ones, (odd & ~(v > 0)).to(v.dtype), input_precision="ieee")
                acc += tl.where(up > 0, float("inf"), 0.0)  # of NaN, both
                acc += tl.where(down > 0, float("-inf"), 0.0)
                v = tl.where(odd, 0.0, v).to(v.dtype)
        acc, top, total = _online(acc, top, total, s, v)
    return acc, top, total


@triton.jit
def _visit_pooled(
    acc, top, total, q, stop, index, key_ptr, value_ptr, log_count,
    stride_key_n, stride_key_d, stride_value_n, stride_value_d, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    for first in range(0, stop, BN):
        inside = columns < stop - first
        keys = tl.load(index + first + columns, mask=inside, other=0).to(tl.int64)  # [BN]
        bias = tl.load(log_count + keys, mask=inside, other=float("-inf")) * 1.4426950408889634
        held = inside[:, None] & (dims < D)[None, :]
        k = tl.load(
            key_ptr + keys[:, None] * stride_key_n + dims[None, :] * stride_key_d,
            mask=held,
            other=0.0,
        )  # [BN, DP]
        v = tl.load(
            value_ptr + keys[:, None] * stride_value_n + dims[None, :] * stride_value_d,
            mask=held, other=0.0,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        s = tl.where((bias > float("-inf"))[None, :], s, float("-inf"))
        acc, top, total = _online(acc, top, total, s, v)
    return acc, top, total


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc,
    q_order, q_starts, q_lengths, k_order, k_starts, k_lengths, launch_order,
    list_start, list_whole, list_full, list_count, list_index, q_coords, k_coords,
    pooled_start, pooled_count, pooled_index, pooled_key, pooled_value, log_count,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ob, stride_om, stride_oh, stride_od,
    stride_pkb, stride_pkn, stride_pkh, stride_pkd, stride_pvb, stride_pvn, stride_pvh, stride_pvd,
    stride_lb, stride_lh, stride_q_len, stride_k_len, stride_list_b, stride_list_h, stride_log_b,
    scale, heads, group, n_queries, rule_params,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    Q_SPLITS: tl.constexpr, K_SPLITS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    HAS_WHOLE: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    HAS_POOLED: tl.constexpr, TMA: tl.constexpr, NEGATIVE: tl.constexpr, MASK_FN: tl.constexpr,
    OTHER_FN: tl.constexpr = None,
):  # fmt: skip
    pid = tl.program_id(0)
    piece = pid % Q_SPLITS
    block = tl.load(launch_order + (pid // Q_SPLITS) % n_queries)
    line = pid // Q_SPLITS // n_queries
    head = line % heads
    sample = (line // heads).to(tl.int64)

    rows = tl.arange(0, BM)
    dims = tl.arange(0, DP)
    length = tl.load(q_lengths + sample * stride_q_len + block) - piece * BM
    inside = rows < length
    start = tl.load(q_starts + block) + piece * BM
    queries = _tokens(q_order, start + rows, inside, Q_ORDER)  # [BM]
    held = inside[:, None] & (dims < D)[None, :]
    q_at = q_ptr + sample * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(
        q_at + queries[:, None] * stride_qm + dims[None, :] * stride_qd, mask=held, other=0.0
    )  # [BM, DP]
    if NEGATIVE:  # (-q) k |scale| = q k scale: from here on scale >= 0
        q = -q
    kv_head = (head // group).to(tl.int64)
    k_at = k_ptr + sample * stride_kb + kv_head * stride_kh
    v_at = v_ptr + sample * stride_vb + kv_head * stride_vh
    lengths_at = k_lengths + sample * stride_k_len
    row = sample * stride_list_b + head * stride_list_h + block
    index = list_index + tl.load(list_start + row)

    top = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    total = tl.zeros([BM], tl.float32)  # [BM]
    acc = tl.zeros([BM, DP], tl.float32)  # [BM, DP]
    qt, qh, qw = rows, rows, rows
    alive = length > 0  # a piece past the end of a short block has nothing to do
    whole = 0
    if HAS_WHOLE:
        whole = tl.load(list_whole + row)
        acc, top, total = _visit_whole(
            acc, top, total, q, tl.where(alive, whole, 0), index,
            k_desc, v_desc, k_at, v_at, k_order, k_starts, sample.to(tl.int32), head // group,
            stride_kn, stride_kd, stride_vn, stride_vd, scale,
            D, DP, BN, K_SPLITS, K_ORDER, TMA,
        )  # fmt: skip
    if HAS_SHORT:
        acc, top, total = _visit_masked(
            acc, top, total, q, whole, tl.where(alive, tl.load(list_full + row), whole),
            index, k_at, v_at, k_order, k_starts, lengths_at,
            stride_kn, stride_kd, stride_vn, stride_vd, scale, qt, qh, qw, k_coords, rule_params,
            D, DP, BN, K_SPLITS, K_ORDER, False, MASK_FN, None,
        )  # fmt: skip
    if HAS_PARTIAL:
        full = tl.load(list_full + row)
        at = q_coords + queries * 3
        qt, qh, qw = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        acc, top, total = _visit_masked(
            acc, top, total, q, full, tl.where(alive, tl.load(list_count + row), full),
            index, k_at, v_at, k_order, k_starts, lengths_at,
            stride_kn, stride_kd, stride_vn, stride_vd, scale, qt, qh, qw, k_coords, rule_params,
            D, DP, BN, K_SPLITS, K_ORDER, True, MASK_FN, OTHER_FN,
        )  # fmt: skip
    if HAS_POOLED:
        acc, top, total = _visit_pooled(
            acc, top, total, q, tl.where(alive, tl.load(pooled_count + row), 0),
            pooled_index + tl.load(pooled_start + row),
            pooled_key + sample * stride_pkb + kv_head * stride_pkh,
            pooled_value + sample * stride_pvb + kv_head * stride_pvh,
            log_count + sample * stride_log_b,
            stride_pkn, stride_pkd, stride_pvn, stride_pvd, scale, D, DP, BN,
        )  # fmt: skip

    seen = total != 0  # true of NaN, which must come out as NaN
    total = tl.where(seen, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    out_at = out_ptr + sample * stride_ob + head.to(tl.int64) * stride_oh
    tl.store(
        out_at + queries[:, None] * stride_om + dims[None, :] * stride_od,
        out.to(out_ptr.dtype.element_ty),
        mask=held,
    )
    lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    lse_at = lse_ptr + sample * stride_lb + head.to(tl.int64) * stride_lh
    tl.store(lse_at + queries, lse, mask=inside)


@torch.library.custom_op("dit_accel::block_sparse_forward", mutates_args=())
def block_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor,
    q_order: Tensor | None, q_starts: Tensor, q_lengths: Tensor,
    k_order: Tensor | None, k_starts: Tensor, k_lengths: Tensor, launch_order: Tensor,
    start: Tensor, whole: Tensor, full: Tensor, count: Tensor, index: Tensor,
    q_coords: Tensor | None, k_coords: Tensor | None,
    pooled_start: Tensor | None, pooled_count: Tensor | None, pooled_index: Tensor | None,
    pooled_key: Tensor | None, pooled_value: Tensor | None, log_count: Tensor | None,
    scale: float, block_q: int, block_k: int, has_whole: bool, has_short: bool, covers: bool,
    mask_name: str, mask_params: Tensor | None, other_mask: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel behind `triton_attention`: a plan's and PooledKeys' fields, one by one.

    has_whole, has_short: whether any list has entries without, with a length mask. covers: whether
    every query is in a block (else the others are set to 0 and -inf first). mask_name is empty
    where no list has partial entries, other_mask where there is no second rule; the pooled fields
    are None where there are none of these.
    """
    out, lse = results_like(q, covers)
    fields = (q_order, q_starts, q_lengths, k_order, k_starts, k_lengths, launch_order, start,
              whole, full, count, index, q_coords, k_coords, pooled_start, pooled_count,
              pooled_index, pooled_key, pooled_value, log_count, scale, block_q, block_k,
              has_whole, has_short, mask_name, mask_params, other_mask)  # fmt: skip
    if q_starts.shape[0] * q.shape[0] * q.shape[2]:
        grid, arguments, constants = _launch(q, k, v, out, lse, *fields)
        with torch.cuda.device_of(q):
            _forward[grid](*arguments, **constants)
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_order: Tensor | None, q_starts: Tensor, q_lengths: Tensor,
    k_order: Tensor | None, k_starts: Tensor, k_lengths: Tensor, launch_order: Tensor,
    start: Tensor, whole: Tensor, full: Tensor, count: Tensor, index: Tensor,
    q_coords: Tensor | None, k_coords: Tensor | None,
    pooled_start: Tensor | None, pooled_count: Tensor | None, pooled_index: Tensor | None,
    pooled_key: Tensor | None, pooled_value: Tensor | None, log_count: Tensor | None,
    scale: float, block_q: int, block_k: int, has_whole: bool, has_short: bool,
    mask_name: str, mask_params: Tensor | None, other_mask: str,
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The grid, arguments and constants of the kernel; see `block_sparse_forward`."""
    batch, _, heads, dim = q.shape
    n_queries = q_starts.shape[0]
    padded = padded_dim(dim)
    boxes = has_whole and k_order is None and boxable(k) and boxable(v)
    config = pick_config(padded, q.element_size(), (block_q, block_k), machine_of(q.device), boxes)
    q_splits = block_q // config.block_m
    unused = q_starts  # stands in for tables that the kernel does not read
    descriptors: tuple[Any, Any] = (unused, unused)
    if config.tma:
        descriptors = (describe(k, config.block_n, padded), describe(v, config.block_n, padded))
    tables = (q_coords, k_coords, pooled_start, pooled_count, pooled_index,
              pooled_key, pooled_value, log_count)  # fmt: skip
    arguments = (
        q, k, v, out, lse, *descriptors,
        unused if q_order is None else q_order, q_starts, q_lengths,
        unused if k_order is None else k_order, k_starts, k_lengths, launch_order,
        start, whole, full, count, index, *(unused if x is None else x for x in tables),
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *(_NO_STRIDES if pooled_key is None else pooled_key.stride()),
        *(_NO_STRIDES if pooled_value is None else pooled_value.stride()),
        lse.stride(0), lse.stride(1),
        shared_stride(q_lengths, 0), shared_stride(k_lengths, 0),
        shared_stride(count, 0), shared_stride(count, 1),
        shared_stride(log_count, 0), abs(scale) * LOG2_E, heads, heads // k.shape[2], n_queries,
        unused if mask_params is None else mask_params,
    )  # fmt: skip
    constants = {
        "D": dim, "DP": padded, "BM": config.block_m, "BN": config.block_n,
        "Q_SPLITS": q_splits, "K_SPLITS": block_k // config.block_n,
        "Q_ORDER": q_order is not None, "K_ORDER": k_order is not None,
        "HAS_WHOLE": has_whole, "HAS_SHORT": has_short,
        "HAS_PARTIAL": bool(mask_name), "HAS_POOLED": pooled_key is not None, "TMA": config.tma,
        "NEGATIVE": scale < 0,
        "MASK_FN": MASK_FUNCTIONS[mask_name or "box"],
        "OTHER_FN": MASK_FUNCTIONS[other_mask] if other_mask else None,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    return (q_splits * n_queries * heads * batch,), arguments, constants


_NO_STRIDES = (0, 0, 0, 0)


@block_sparse_forward.register_fake
def _fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return results_like(q)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    if traced(q, k, v) or interpreted() or plan.shape.kinds.pooled or not q.numel():
        out, lse = block_sparse_forward(q, k, v, *_fields(plan, scale, pooled))
    else:
        out, lse = _launched(q, k, v, plan, scale)
    return out, lse if return_lse else None


def _fields(plan: BlockPlan, scale: float, pooled: PooledKeys | None) -> tuple[Any, ...]:
    """What `block_sparse_forward` takes after q, k and v."""
    blocks, lists = plan.blocks, plan.visits
    whole, short, partial, extra = plan.shape.kinds
    mask = plan.mask if partial else None
    more, far = (pooled, plan.pooled) if extra else (None, None)
    return (
        blocks.q.order, blocks.q.starts, blocks.q.lengths,
        blocks.k.order, blocks.k.starts, blocks.k.lengths, plan.launch_order,
        lists.start, lists.whole, lists.full, lists.count, lists.index,
        mask.q_coords if mask else None, mask.k_coords if mask else None,
        far.start if far else None, far.count if far else None, far.index if far else None,
        more.key if more else None, more.value if more else None,
        more.log_count if more else None,
        scale, blocks.block_q, blocks.block_k, whole, short, blocks.covers,
        mask.name if mask else "", mask.packed if mask else None,
        mask.other[0] if mask and mask.other else "",
    )  # fmt: skip


_CHANGING = (
    "q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "list_start", "list_whole", "list_full",
    "list_count", "list_index", "scale", "k_desc", "v_desc",
)  # fmt: skip
"""What a kept launch is given anew at each call."""


def _launched(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """`block_sparse_forward` with little work for the host; what does not change is kept with the
    plan, or with the blocks of plans that are made at each call."""
    blocks, lists, shape = plan.blocks, plan.visits, plan.shape
    out, lse = results_like(q, blocks.covers)
    rows = lists.start, lists.whole, lists.full, lists.count, lists.index
    key: tuple[Any, ...] = (scale < 0, *alike(q, k, v, out))
    if shape.online:
        launches, key = launches_of(blocks), (*key, "portable", shape.kinds, *alike(*rows[:4]),
                                              rows[4].data_ptr() & 15)  # fmt: skip
    else:
        launches = launches_of(plan)
    found: _Prepared | None = launches.get(key)
    if found is None:
        *before, _, name, params, other = _fields(plan, scale, None)
        rule = {"mask_name": name, "mask_params": params, "other_mask": other}
        grid, arguments, constants = _launch(q, k, v, out, lse, *before, **rule)
        places = [_forward.arg_names.index(name) for name in _CHANGING]
        boxes = (constants["BN"], constants["DP"]) if constants["TMA"] else None
        made = Launch(_forward, grid, arguments, constants, places)
        found = launches[key] = _Prepared(made, boxes)
        descriptors = arguments[5:7]
    elif found.boxes is None:
        descriptors = blocks.q.starts, blocks.q.starts
    else:
        descriptors = describe(k, *found.boxes), describe(v, *found.boxes)
    found.launch(q.device, q, k, v, out, lse, *rows, abs(scale) * LOG2_E, *descriptors)
    return out, lse


class _Prepared(NamedTuple):
    """A launch, and the boxes of its tensor descriptors (rows, columns) if it has any."""

    launch: Launch
    boxes: tuple[int, int] | None
