# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Means of token blocks in Triton: xbar_b = (1 / n_b) sum_{i in block b} x_i, in float32.

One program reads the rows of one block of one head, once. Two tensors (q and k, or k and v) share
a launch: the first programs pool the first, the others the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launching import Launch, alike
from dit_accel.kernels.portable.steps import padded_dim


@triton.jit
def _pool_one(
    pid, x_ptr, order, starts, lengths, out_ptr, blocks, heads,
    stride_b, stride_n, stride_h, stride_d, stride_len,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    # Heads are next to each other in memory where tokens are rows: they run next to each other.
    head = pid % heads
    block = pid // heads % blocks
    sample = (pid // heads // blocks).to(tl.int64)
    dims = tl.arange(0, DP)
    rows = tl.arange(0, ROWS)
    length = tl.load(lengths + sample * stride_len + block)
    start = tl.load(starts + block)
    at = x_ptr + sample * stride_b + head.to(tl.int64) * stride_h
    total = tl.zeros([DP], tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        inside = first + rows < length
        tokens = tl.where(inside, start + first + rows, 0)
        if HAS_ORDER:
            tokens = tl.load(order + tokens)
        held = inside[:, None] & (dims < D)[None, :]
        x = tl.load(
            at + tokens.to(tl.int64)[:, None] * stride_n + dims[None, :] * stride_d,
            mask=held, other=0.0,
        )  # fmt: skip
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    place = (sample * blocks + block) * heads + head
    tl.store(out_ptr + place * D + dims, mean.to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def _pool(
    a_ptr, a_order, a_starts, a_lengths, a_out, a_blocks, a_heads,
    stride_ab, stride_an, stride_ah, stride_ad, stride_a_len,
    b_ptr, b_order, b_starts, b_lengths, b_out, b_blocks, b_heads,
    stride_bb, stride_bn, stride_bh, stride_bd, stride_b_len, split,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, A_BLOCK: tl.constexpr,
    B_BLOCK: tl.constexpr, A_ORDER: tl.constexpr, B_ORDER: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < split:
        _pool_one(
            pid, a_ptr, a_order, a_starts, a_lengths, a_out, a_blocks, a_heads,
            stride_ab, stride_an, stride_ah, stride_ad, stride_a_len, D, DP, ROWS, A_BLOCK, A_ORDER,
        )  # fmt: skip
    else:
        _pool_one(
            pid - split, b_ptr, b_order, b_starts, b_lengths, b_out, b_blocks, b_heads,
            stride_bb, stride_bn, stride_bh, stride_bd, stride_b_len, D, DP, ROWS, B_BLOCK, B_ORDER,
        )  # fmt: skip


def launch(
    a: Tensor, a_order: Tensor | None, a_starts: Tensor, a_lengths: Tensor, a_block: int,
    b: Tensor, b_order: Tensor | None, b_starts: Tensor, b_lengths: Tensor, b_block: int,
    dtype: torch.dtype, kept: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Means [B, N, H, D] over the blocks of a and b [B, S, H, D], in `dtype`, each read once.

    *_block: slots of a block, no block is longer. Blocks without tokens have the mean 0.
    kept: where launches over the same blocks are kept.
    """
    key = "means", dtype, *alike(a, b)
    found: _Prepared | None = None if kept is None else kept.get(key)
    if found is not None:
        means = [torch.empty(shape, dtype=dtype, device=a.device) for shape in found.shapes]
        if found.launch is not None:
            found.launch(a.device, a, means[0], b, means[1])
        return means[0], means[1]
    means, programs, fields = [], [], []
    for x, order, starts, lengths in (
        (a, a_order, a_starts, a_lengths), (b, b_order, b_starts, b_lengths)
    ):  # fmt: skip
        batch, _, heads, dim = x.shape
        blocks = starts.shape[0]
        mean = torch.empty((batch, blocks, heads, dim), dtype=dtype, device=x.device)
        means.append(mean)
        programs.append(batch * blocks * heads)
        shared = lengths.stride(0) if lengths.shape[0] > 1 else 0
        unused = starts if order is None else order
        fields += [x, unused, starts, lengths, mean, blocks, heads, *x.stride(), shared]
    made = None
    if sum(programs):
        padded = padded_dim(a.shape[-1])
        constants = {
            "D": a.shape[-1], "DP": padded, "ROWS": max(16, 8192 // padded),
            "A_BLOCK": a_block, "B_BLOCK": b_block, "A_ORDER": a_order is not None,
            "B_ORDER": b_order is not None, "num_warps": 4,
        }  # fmt: skip
        arguments = (*fields, programs[0])
        made = Launch(_pool, (sum(programs),), arguments, constants, _CHANGING)
        made(a.device, a, means[0], b, means[1])
    if kept is not None:
        kept[key] = _Prepared(made, (means[0].shape, means[1].shape))
    return means[0], means[1]


_CHANGING = (0, 4, 12, 16)
"""Places of the two tensors and of their means among the arguments of `_pool`."""


class _Prepared(NamedTuple):
    """A launch (None without programs), and the shapes of the means."""

    launch: Launch | None
    shapes: tuple[torch.Size, torch.Size]


@torch.library.custom_op("dit_accel::pool_pair", mutates_args=())
def pool_pair(
    a: Tensor, a_order: Tensor | None, a_starts: Tensor, a_lengths: Tensor, a_block: int,
    b: Tensor, b_order: Tensor | None, b_starts: Tensor, b_lengths: Tensor, b_block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch` as an operator that `torch.compile` does not look into."""
    return launch(
        a, a_order, a_starts, a_lengths, a_block, b, b_order, b_starts, b_lengths, b_block, dtype
    )


@pool_pair.register_fake
def _fake(
    a: Tensor, a_order: Tensor | None, a_starts: Tensor, a_lengths: Tensor, a_block: int,
    b: Tensor, b_order: Tensor | None, b_starts: Tensor, b_lengths: Tensor, b_block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, heads, dim = a.shape
    first = a.new_empty((batch, a_starts.shape[0], heads, dim), dtype=dtype)
    batch, _, heads, dim = b.shape
    return first, b.new_empty((batch, b_starts.shape[0], heads, dim), dtype=dtype)
