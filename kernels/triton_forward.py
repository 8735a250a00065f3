"""The portable block-sparse forward kernel (NVIDIA sm80 and later, ROCm, Triton's interpreter).

One program computes BM rows of one query block of one head. With s_ij = scale q_i k_j (masked
pairs -inf), it walks the block's lists keeping, per row, the running maximum m, the sum
l = sum_j 2^(s_ij log2(e) - m) and acc = sum_j 2^(...) v_j, all in float32; on a new maximum m' both
are scaled by 2^(m - m'). At the end out = acc / l and LSE = (m + log2 l) ln 2; a row without keys
is 0 with LSE -inf.

Rows are gathered and scattered through the tables' `order`: nothing is permuted in memory. A full
list has its whole blocks first: they run without any length mask. Short blocks add a bias of 0 or
-inf per key; partial blocks evaluate the token mask on the tokens' coordinates. Stores are masked
to the block's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.triton_masks import MASK_FUNCTIONS, load_params

LOG2_E = 1.4426950408889634


@triton.jit
def _tokens(order, positions, inside, HAS_ORDER: tl.constexpr):
    # Offsets outside the block read token 0, so that no address leaves the tensor.
    tokens = tl.where(inside, positions, 0)
    if HAS_ORDER:
        tokens = tl.load(order + tokens)
    return tokens.to(tl.int64)


@triton.jit
def _visit(
    acc, top, total, q, first, stop, index,
    k_ptr, v_ptr, k_order, k_starts, k_lengths,
    stride_kn, stride_kd, stride_vn, stride_vd, scale,
    qt, qh, qw, k_coords, params,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    HAS_ORDER: tl.constexpr, MASK_LENGTH: tl.constexpr, MASK_TOKENS: tl.constexpr,
    MASK_FN: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    for step in range(first * SPLITS, stop * SPLITS):
        block = tl.load(index + step // SPLITS)
        part = (step % SPLITS) * BN
        start = tl.load(k_starts + block) + part
        inside = columns < BN
        if MASK_LENGTH:
            inside = columns < tl.load(k_lengths + block) - part
        keys = _tokens(k_order, start + columns, inside, HAS_ORDER)  # [BN]
        k_at = k_ptr + keys[:, None] * stride_kn + dims[None, :] * stride_kd
        v_at = v_ptr + keys[:, None] * stride_vn + dims[None, :] * stride_vd
        if MASK_LENGTH or DP != D:
            held = inside[:, None] & (dims < D)[None, :]
            k = tl.load(k_at, mask=held, other=0.0)  # [BN, DP]
            v = tl.load(v_at, mask=held, other=0.0)  # [BN, DP]
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BM, BN]
        if MASK_LENGTH:
            s += tl.where(inside, 0.0, float("-inf"))[None, :]
        if MASK_TOKENS:
            at = k_coords + keys * 3
            kt, kh, kw = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            kept = MASK_FN(
                qt[:, None], qh[:, None], qw[:, None],
                kt[None, :], kh[None, :], kw[None, :], load_params(params),
            )  # fmt: skip
            s = tl.where(kept, s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        # Rows that have seen no key yet: subtract 0, so that -inf - -inf never happens.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        alpha = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = highest
    return acc, top, total


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_order, q_starts, q_lengths, k_order, k_starts, k_lengths, launch_order,
    full_count, full_index, unmasked_count, partial_count, partial_index, q_coords, k_coords,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ob, stride_om, stride_oh, stride_od,
    stride_lb, stride_lh, stride_q_len, stride_k_len, stride_list_b, stride_list_h,
    full_width, partial_width, scale, heads, group, n_queries, params,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    Q_SPLITS: tl.constexpr, K_SPLITS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    HAS_WHOLE: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    MASK_FN: tl.constexpr,
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
    )
    kv_head = (head // group).to(tl.int64)
    k_at = k_ptr + sample * stride_kb + kv_head * stride_kh
    v_at = v_ptr + sample * stride_vb + kv_head * stride_vh
    lengths_at = k_lengths + sample * stride_k_len
    row = sample * stride_list_b + head * stride_list_h + block

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    qt, qh, qw = rows, rows, rows
    alive = length > 0  # a piece past the end of a short block has nothing to do
    if HAS_WHOLE:
        stop = tl.where(alive, tl.load(unmasked_count + row), 0)
        acc, top, total = _visit(
            acc, top, total, q, 0, stop, full_index + row * full_width,
            k_at, v_at, k_order, k_starts, lengths_at,
            stride_kn, stride_kd, stride_vn, stride_vd, scale,
            qt, qh, qw, k_coords, params,
            D, DP, BN, K_SPLITS, K_ORDER, False, False, MASK_FN,
        )  # fmt: skip
    if HAS_SHORT:
        first = 0
        if HAS_WHOLE:
            first = tl.load(unmasked_count + row)
        stop = tl.where(alive, tl.load(full_count + row), first)
        acc, top, total = _visit(
            acc, top, total, q, first, stop, full_index + row * full_width,
            k_at, v_at, k_order, k_starts, lengths_at,
            stride_kn, stride_kd, stride_vn, stride_vd, scale,
            qt, qh, qw, k_coords, params,
            D, DP, BN, K_SPLITS, K_ORDER, True, False, MASK_FN,
        )  # fmt: skip
    if HAS_PARTIAL:
        at = q_coords + queries * 3
        qt, qh, qw = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        stop = tl.where(alive, tl.load(partial_count + row), 0)
        acc, top, total = _visit(
            acc, top, total, q, 0, stop, partial_index + row * partial_width,
            k_at, v_at, k_order, k_starts, lengths_at,
            stride_kn, stride_kd, stride_vn, stride_vd, scale,
            qt, qh, qw, k_coords, params,
            D, DP, BN, K_SPLITS, K_ORDER, True, True, MASK_FN,
        )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = acc / total[:, None]
    out_at = out_ptr + sample * stride_ob + head.to(tl.int64) * stride_oh
    tl.store(
        out_at + queries[:, None] * stride_om + dims[None, :] * stride_od,
        out.to(out_ptr.dtype.element_ty),
        mask=held,
    )
    lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    lse_at = lse_ptr + sample * stride_lb + head.to(tl.int64) * stride_lh
    tl.store(lse_at + queries, lse, mask=inside)


@dataclass(frozen=True)
class Config:
    """Rows and keys of one step, warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def shared_bytes(self, dim: int, itemsize: int) -> int:
        """Shared memory: q, the staged k and v tiles, and p where it passes through it."""
        tiles = (self.block_m + 2 * self.block_n * self.stages) * dim * itemsize
        return tiles + (self.block_m * self.block_n * itemsize if itemsize == 4 else 1024)


# (rows, keys, stages) of a step, best first; the last one fits everywhere.
_STEPS = ((128, 64, 3), (128, 64, 2), (64, 64, 3), (64, 64, 2), (64, 32, 2),
          (32, 32, 2), (32, 32, 1), (32, 16, 2), (32, 16, 1), (16, 16, 1))  # fmt: skip


def pick_config(dim: int, itemsize: int, plan_blocks: tuple[int, int], shared: int) -> Config:
    """The largest configuration for a padded head_dim that fits registers and `shared` bytes.

    float32 multiplies without tensor cores, fully unrolled: larger steps spill registers.
    """
    wide = itemsize >= 4
    for rows, keys, stages in _STEPS:
        rows, keys = min(rows, plan_blocks[0]), min(keys, plan_blocks[1])
        light = not wide and rows * dim <= 128 * 64
        config = Config(rows, keys, 4 if light else 8, stages)
        spills = wide and rows * keys * dim > 64 * 32 * 64
        if not spills and config.shared_bytes(dim, itemsize) <= shared:
            return config
    return config


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 1 << 16)


@torch.library.custom_op("dit_accel::block_sparse_forward", mutates_args=())
def block_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor,
    q_order: Tensor | None, q_starts: Tensor, q_lengths: Tensor,
    k_order: Tensor | None, k_starts: Tensor, k_lengths: Tensor, launch_order: Tensor,
    full_count: Tensor, full_index: Tensor, unmasked_count: Tensor | None,
    partial_count: Tensor | None, partial_index: Tensor | None,
    q_coords: Tensor | None, k_coords: Tensor | None,
    scale: float, block_q: int, block_k: int, whole: bool, short: bool, covers: bool,
    mask_name: str, mask_params: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel behind `triton_attention`: BlockPlan's fields, one by one.

    whole, short: whether any full list has entries without, with a length mask. covers: whether
    every query is in a block (else the others are set to 0 and -inf first). mask_name is empty
    where no list has partial entries.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if not covers:
        out.zero_()
        lse.fill_(-torch.inf)
    padded = max(16, triton.next_power_of_2(dim))
    config = pick_config(padded, q.element_size(), (block_q, block_k), _shared_memory(q.device))
    n_queries = q_starts.shape[0]
    q_splits = block_q // config.block_m
    programs = q_splits * n_queries * heads * batch
    if programs == 0:
        return out, lse
    unused = q_starts  # stands in for tables that the kernel does not read
    with torch.cuda.device_of(q):
        _forward[(programs,)](
            q, k, v, out, lse,
            unused if q_order is None else q_order, q_starts, q_lengths,
            unused if k_order is None else k_order, k_starts, k_lengths, launch_order,
            full_count, full_index,
            *(unused if x is None else x
              for x in (unmasked_count, partial_count, partial_index, q_coords, k_coords)),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), lse.stride(0), lse.stride(1),
            _step(q_lengths, 0), _step(k_lengths, 0), _step(full_count, 0), _step(full_count, 1),
            full_index.shape[-1], 0 if partial_index is None else partial_index.shape[-1],
            scale * LOG2_E, heads, heads // k.shape[2], n_queries,
            unused if mask_params is None else mask_params,
            D=dim, DP=padded, BM=config.block_m, BN=config.block_n,
            Q_SPLITS=q_splits, K_SPLITS=block_k // config.block_n,
            Q_ORDER=q_order is not None, K_ORDER=k_order is not None,
            HAS_WHOLE=whole and unmasked_count is not None, HAS_SHORT=short,
            HAS_PARTIAL=bool(mask_name), MASK_FN=MASK_FUNCTIONS[mask_name or "box"],
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, lse


@block_sparse_forward.register_fake
def _fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, length, heads = q.shape[:3]
    return torch.empty_like(q), q.new_empty((batch, heads, length), dtype=torch.float32)


def _step(table: Tensor, dim: int) -> int:
    """Stride of a contiguous table, 0 where it is shared along `dim`."""
    return table.stride(dim) if table.shape[dim] > 1 else 0


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    whole, short, partial, _ = plan.list_kinds
    mask = plan.token_mask if partial else None
    out, lse = block_sparse_forward(
        q, k, v,
        plan.q_blocks.order, plan.q_blocks.starts, plan.q_blocks.lengths,
        plan.k_blocks.order, plan.k_blocks.starts, plan.k_blocks.lengths, plan.launch_order,
        plan.full_count, plan.full_index, plan.unmasked_count,
        plan.partial_count if mask else None, plan.partial_index if mask else None,
        mask.q_coords if mask else None, mask.k_coords if mask else None,
        scale, plan.block_q, plan.block_k, whole, short, plan.covers_queries,
        mask.name if mask else "", mask.packed if mask else None,
    )  # fmt: skip
    return out, lse if return_lse else None
