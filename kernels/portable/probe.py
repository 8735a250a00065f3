# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The probe of `kernels.probe` in Triton: its formulas, one key block a program.

A program holds the keys of one block of one head and goes through the mean queries: a row of scores
lies whole in it, so nothing of the size [blocks, tokens] is ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.launching import alike, launches_of
from dit_accel.kernels.launching import launch as launch_kept
from dit_accel.kernels.portable.steps import aligned, boxable, describe, machine_of, padded_dim

# Bytes of a number -> mean queries of a step, warps, stages.
STEPS = {4: (32, 4, 2), 2: (64, 4, 2)}


@triton.jit
def _probe(
    q_ptr, q_desc, k_ptr, order, starts, lengths, mass_ptr, shift_ptr, rank_ptr,
    heads, group, queries, first, video, padded,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_len, scale, floor,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, EACH: tl.constexpr,
    RANK: tl.constexpr, HAS_ORDER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % video
    line = pid // video
    head = line % heads
    sample = (line // heads).to(tl.int64)
    dims = tl.arange(0, DP)
    columns = tl.arange(0, BK)
    length = tl.load(lengths + sample * stride_len + first + block)
    inside = columns < length
    tokens = tl.where(inside, tl.load(starts + first + block) + columns, 0)
    if HAS_ORDER:
        tokens = tl.load(order + tokens)
    k = tl.load(
        k_ptr + sample * stride_kb + (head // group).to(tl.int64) * stride_kh
        + tokens.to(tl.int64)[:, None] * stride_kn + dims[None, :] * stride_kd,
        mask=inside[:, None] & (dims < D)[None, :], other=0.0,
    )  # [BK, DP]  # fmt: skip
    count = tl.maximum(length, 1).to(tl.float32)
    outside = tl.where(inside, 0.0, float("-inf"))
    held_weight = tl.where(inside, 1.0, 0.0)
    mass_at = mass_ptr + (line.to(tl.int64) * video + block) * padded
    rank_at = rank_ptr + (line.to(tl.int64) * video + block) * padded
    shift_at = shift_ptr + (line.to(tl.int64) * video + block) * EACH * padded
    for low in range(0, video, BM):
        rows = low + tl.arange(0, BM)
        there = rows < video
        if TMA:
            q = q_desc.load([sample.to(tl.int32), first + low, head, 0]).reshape(BM, DP)
        else:
            at = ((sample * queries + first + rows) * heads + head)[:, None] * D + dims[None, :]
            q = tl.load(
                q_ptr + at, mask=there[:, None] & (dims < D)[None, :], other=0.0
            )  # [BM, DP]
        # [BM, BK]; what is past the block's end is 0, as its keys are
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        held = s + outside[None, :]
        top = tl.max(held, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(held - base[:, None])
        mass = base + tl.log(tl.maximum(tl.sum(weights, 1), 1e-30))
        mass = tl.where(length > 0, mass, float("-inf"))
        tl.store(mass_at + rows, mass, mask=there)
        if EACH == 1:
            mean = tl.sum(s, 1) / count
            shift = tl.where(length > 0, mass - mean, float("-inf"))
            tl.store(shift_at + rows, shift, mask=there)
        else:
            size: tl.constexpr = BK // EACH
            piece = tl.arange(0, EACH)
            own = tl.minimum(tl.maximum(length - piece * size, 0), size)  # [EACH]
            # Of each piece by its own maximum: its mass may be far below the block's.
            cut = held.reshape(BM, EACH, size)
            tops = tl.max(cut, 2)
            bases = tl.where(tops == float("-inf"), 0.0, tops)
            total = tl.maximum(tl.sum(tl.exp(cut - bases[:, :, None]), 2), 1e-30)
            masses = bases + tl.log(total)  # [BM, EACH]
            sums = tl.sum(s.reshape(BM, EACH, size), 2)
            means = sums / tl.maximum(own, 1).to(tl.float32)[None, :]
            shifts = tl.where((own > 0)[None, :], masses - means, float("-inf"))
            tl.store(
                shift_at + piece[None, :] * padded + rows[:, None], shifts, mask=there[:, None]
            )
        if RANK:
            mean = tl.sum(s, 1) / count
            away = (s - mean[:, None]) * held_weight[None, :]
            spread = tl.sum(away * away, 1) / count
            tl.store(rank_at + rows, mass + 0.5 * tl.log(spread + floor), mask=there)


def launch(
    means: Tensor, k: Tensor, blocks: Blocks, each: int, scale: float, floor: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mass, shift and rank by error as in `Probe`, from means [B, NQ, H, D] of q and from
    k [B, Lk, Hkv, D]; each: pieces of a block. floor: see `ERROR_FLOOR`; None for no rank.
    """
    batch, queries, heads, dim = means.shape
    video = blocks.video_blocks
    padded = aligned(video)
    counts = (video, video * each) if floor is None else (video, video * each, video)
    rows, warps, stages = STEPS[means.element_size()]
    mass, shift, *ranks = (
        torch.empty((batch, heads, n, padded), dtype=torch.float32, device=k.device) for n in counts
    )
    boxes = machine_of(k.device).tma and boxable(means)
    described = describe(means, rows, padded_dim(dim)) if boxes else means
    arguments = (
        means, described, k, blocks.k.starts if blocks.k.order is None else blocks.k.order,
        blocks.k.starts, blocks.k.lengths, mass, shift, *(ranks or [mass]), heads,
        heads // k.shape[2], queries,
        blocks.first_video, video, padded, *k.stride(),
        blocks.k.sample_stride, scale, floor or 0.0,
    )  # fmt: skip
    constants = {
        "D": dim, "DP": padded_dim(dim), "BK": max(16, triton.next_power_of_2(blocks.block_k)),
        "BM": rows, "EACH": each, "RANK": floor is not None,
        "HAS_ORDER": blocks.k.order is not None, "TMA": boxes, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip
    programs = batch * heads * video
    if programs:
        key = "probe", each, floor, *alike(means, k)
        launch_kept(launches_of(blocks), key, _probe, (programs,), arguments, constants, k.device)
    return mass[..., :video], shift[..., :video], ranks[0][..., :video] if ranks else None
