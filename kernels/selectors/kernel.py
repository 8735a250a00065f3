# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Scores of block means, selection and lists in one Triton launch.

One program holds the scores of ROWS query blocks of one list against all key blocks:
s_ij = factor sum_h qbar_hi . kbar_hj, summed over the heads that share the list. No score leaves
the registers. A score becomes an integer of the same order, forced blocks the largest and blocks
that are no candidates the smallest one; the threshold of a row, its lowest kept score, is found bit
by bit from the top: 32 counts (and sums of probabilities) over the row. Of the blocks at the
threshold the first ones are kept. Then the kept blocks are written as a list: whole ones, then
short ones, ascending. The sums are trees of fixed form: the same bits every time.

`budget.py` says the same in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.launching import Launch, launches_of
from dit_accel.kernels.portable.steps import aligned, machine_of
from dit_accel.kernels.selectors.lists import MOST_COLUMNS, Lists, Task

# Scores of a program at most, and of a warp; a program of more columns has fewer rows.
_HELD = MOST_COLUMNS
_HELD_BY_WARP = 1 << 10
_ROWS = 16
# Up to so many columns scores are products of tiles, _STEP numbers of each column at a time.
_TILED = 1 << 10
_STEP = 16
# Nothing is compiled anew for other values of these.
_PLAIN = (
    "near_ptr", "q_lengths", "k_lengths", "start_ptr", "whole_ptr", "count_ptr", "index_ptr",
    "tally_ptr", "lists", "summed", "heads", "group", "queries", "keys", "first_video", "video",
    "sinks", "nearby", "most", "stride_q_len", "stride_k_len",
)  # fmt: skip

_LARGEST = tl.constexpr(0x7FFFFFFF)
_SMALLEST = tl.constexpr(-0x80000000)


@triton.jit
def _scores(
    q_ptr, k_ptr, sample, first_head, summed, heads, group, queries, keys, rows, inside, columns,
    stride_kb, stride_kn, stride_kh, stride_kd, first_video, video,
    D: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: sums of scores over `summed` heads; anything past the last key.

    GIVEN: they are at k_ptr, by key block of the video and then query block.
    """
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    given = k_ptr + sample.to(tl.int64) * stride_kb + first_head.to(tl.int64) * stride_kh
    for head in range(first_head, first_head + summed):
        if GIVEN:
            block = columns - first_video
            acc += tl.load(
                given + block.to(tl.int64)[None, :] * stride_kn
                + (rows - first_video)[:, None] * stride_kd,
                mask=inside[:, None] & ((block >= 0) & (block < video))[None, :], other=0.0,
            )  # fmt: skip
            given += stride_kh
        elif TILED:
            q_at = q_ptr + ((sample * queries + rows).to(tl.int64) * heads + head) * D  # [ROWS]
            k_at = k_ptr + sample.to(tl.int64) * stride_kb + (head // group) * stride_kh
            dims = tl.arange(0, STEP)
            for first in range(0, D, STEP):
                held = first + dims < D
                q = tl.load(
                    q_at[:, None] + (first + dims)[None, :],
                    mask=inside[:, None] & held[None, :],
                    other=0.0,
                )  # [ROWS, STEP]
                k = tl.load(
                    k_at + columns[None, :] * stride_kn + (first + dims)[:, None] * stride_kd,
                    mask=(columns < keys)[None, :] & held[:, None],
                    other=0.0,
                )  # [STEP, COLUMNS]
                acc = tl.dot(q, k, acc, input_precision="ieee")
        else:
            q_at = q_ptr + ((sample * queries + rows).to(tl.int64) * heads + head) * D  # [ROWS]
            k_at = k_ptr + sample.to(tl.int64) * stride_kb + (head // group) * stride_kh
            for dim in range(0, D):
                q = tl.load(q_at + dim, mask=inside, other=0.0)
                # Up to the stride the columns are there: whole vectors are loaded.
                k = tl.load(
                    k_at + columns * stride_kn + dim * stride_kd, mask=columns < stride_kd,
                    other=0.0,
                )  # fmt: skip
                acc += q[:, None] * k[None, :]
    return acc


@triton.jit
def _reached(image, threshold, most, weight, target, MASS: tl.constexpr):
    """Whether the blocks at and above a threshold are enough; numbers of rows are [ROWS, 1]."""
    above = image >= threshold
    # Not a cast: Triton 3.6 moves it to a layout that holds a whole row in each thread.
    enough = tl.sum(tl.where(above, 1, 0), 1, keep_dims=True) >= most
    if MASS:
        enough = enough | (tl.sum(tl.where(above, weight, 0.0), 1, keep_dims=True) >= target)
    return enough


@triton.jit(do_not_specialize=_PLAIN)
def _select(
    q_ptr, k_ptr, near_ptr, q_lengths, k_lengths, start_ptr, whole_ptr, count_ptr, index_ptr,
    tally_ptr, lists, summed, heads, group, queries, keys, first_video, video, sinks, nearby, most,
    factor, mass, stride_kb, stride_kn, stride_kh, stride_kd, stride_q_len, stride_k_len,
    D: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILED: tl.constexpr, GIVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASS: tl.constexpr, TALLY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    parts = tl.cdiv(video, ROWS)
    listed = pid // parts % lists
    sample = pid // parts // lists
    row = pid % parts * ROWS + tl.arange(0, ROWS)  # of the video's query blocks
    inside = row < video
    columns = tl.arange(0, COLUMNS)
    acc = _scores(
        q_ptr, k_ptr, sample, listed * summed, summed, heads, group, queries, keys,
        first_video + row, inside, columns, stride_kb, stride_kn, stride_kh, stride_kd,
        first_video, video, D, STEP, ROWS, COLUMNS, TILED, GIVEN,
    )  # fmt: skip
    score = acc * factor  # [ROWS, COLUMNS]

    length = tl.load(k_lengths + sample * stride_k_len + columns, mask=columns < keys, other=0)
    block = columns - first_video
    of_video = (block >= 0) & (block < video)
    candidate = ((of_video & (length > 0))[None, :]) & inside[:, None]
    forced = ((block < sinks)[None, :]) & candidate
    for each in range(0, nearby):
        near = tl.load(near_ptr + row * nearby + each, mask=inside, other=0)
        forced = forced | ((block[None, :] == near[:, None]) & candidate)

    weight = score
    target = tl.zeros([ROWS, 1], tl.float32)
    if MASS:
        score += tl.log(tl.maximum(length, 1).to(tl.float32))[None, :]
        top = tl.max(tl.where(candidate, score, float("-inf")), 1, keep_dims=True)
        weight = tl.where(candidate, tl.exp(score - top), 0.0)
        total = tl.sum(weight, 1, keep_dims=True)
        target = tl.where(total > 0, total, 1.0) * mass
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    image = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    image = tl.where(candidate, tl.where(forced, _LARGEST, image), _SMALLEST)

    # The highest threshold that is enough, in the order of integers: the sign, then bit by bit.
    zero = tl.zeros([ROWS, 1], tl.int32)
    threshold = tl.where(_reached(image, zero, most, weight, target, MASS), 0, _SMALLEST)
    bit = 1 << 30
    for _ in range(0, 31):
        higher = threshold + bit
        threshold = tl.where(_reached(image, higher, most, weight, target, MASS), higher, threshold)
        bit = bit >> 1
    above = image > threshold
    tied = image == threshold
    left = most - tl.sum(tl.where(above, 1, 0), 1, keep_dims=True)
    if MASS:
        missing = target - tl.sum(tl.where(above, weight, 0.0), 1, keep_dims=True)
        one = tl.max(tl.where(tied, weight, 0.0), 1, keep_dims=True)
        some = tl.where(one > 0, missing / tl.where(one > 0, one, 1.0), COLUMNS)
        left = tl.minimum(left, tl.ceil(tl.minimum(some, COLUMNS)).to(tl.int32))
    keep = above | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= left)) | forced
    # Text is always kept; past the last key block lengths are 0.
    text = (length > 0) & (of_video == 0)
    keep = (keep & candidate) | (text[None, :] & inside[:, None])

    fills = (length == BLOCK_K)[None, :]
    whole = (keep & fills).to(tl.int32)
    short = keep.to(tl.int32) - whole
    running = tl.cumsum(whole + (short << 16), 1)
    wholes = tl.sum(whole, 1)
    count = tl.sum(keep.to(tl.int32), 1)
    place = tl.where(fills, running & 0xFFFF, wholes[:, None] + (running >> 16)) - 1
    at = (sample * lists + listed) * queries + first_video + row
    start = tl.load(start_ptr + at, mask=inside, other=0)
    tl.store(index_ptr + start[:, None] + place, tl.broadcast_to(columns[None, :], place.shape),
             mask=keep)  # fmt: skip
    tl.store(whole_ptr + at, wholes, mask=inside)
    tl.store(count_ptr + at, count, mask=inside)
    if TALLY:
        own = tl.load(q_lengths + sample * stride_q_len + first_video + row, mask=inside, other=0)
        pairs = tl.sum(tl.where(keep, length[None, :], 0), 1).to(tl.int64) * own
        entries = tl.sum(count, 0).to(tl.int64)
        tl.atomic_add(tally_ptr, entries * (BLOCK_Q * BLOCK_K) * summed, sem="relaxed")
        tl.atomic_add(tally_ptr + 1, tl.sum(pairs, 0) * summed, sem="relaxed")


def launch(
    queries: Tensor, keys: Tensor | None, blocks: Blocks, task: Task, factor: float, lists: Lists,
    tally: Tensor | None,
) -> None:  # fmt: skip
    """Fills `lists` from block means in float32, contiguous [B, NQ, H, D] and [B, NK, Hkv, D], or
    from given scores [B, H, NV, NV] without keys (see `select.Scores`)."""
    # Of what a task does not fix: the sizes of the call, and where the tally stands.
    kept, place = launches_of(task), None if tally is None else tally.data_ptr() & 15
    sizes = queries.stride() if keys is None else keys.shape
    key = "selection", queries.shape, sizes, keys is None, factor, place
    found: _Prepared | None = kept.get(key)
    if found is None:
        found = kept[key] = _prepared(queries, keys, blocks, task, factor, lists, tally)
    if found.launch is not None:
        if keys is None:
            keys = queries
        elif not found.tiled:
            keys = _transposed(keys)
        tallied = lists.count if tally is None else tally
        found.launch(queries.device, queries, keys, lists.whole, lists.count, lists.index, tallied)


_CHANGING = (0, 1, 6, 7, 8, 9)
"""Places of the means, the lists and the tally among the arguments of `_select`."""


class _Prepared(NamedTuple):
    """A launch (None without programs), and whether its scores are products of tiles."""

    launch: Launch | None
    tiled: bool


def _prepared(
    queries: Tensor, keys: Tensor | None, blocks: Blocks, task: Task, factor: float, lists: Lists,
    tally: Tensor | None,
) -> _Prepared:  # fmt: skip
    columns = max(16, triton.next_power_of_2(blocks.k.count))
    rows = min(_ROWS, _HELD // columns)
    tiled = keys is not None and _tiled(columns, queries.device)
    if keys is None:  # [B, H, NV, NV]: the last two are key blocks and query blocks
        batch, heads, dim, group, source = *queries.shape[:2], 16, 1, queries
        strides = source.stride()
    else:
        batch, _, heads, dim = queries.shape
        group = heads // keys.shape[2]
        source = keys.permute(0, 2, 3, 1) if tiled else _transposed(keys)  # [B, Hkv, D, NK]
        strides = source.stride(0), source.stride(1), source.stride(3), source.stride(2)
    per_sample = lists.count.shape[1]
    programs = batch * per_sample * triton.cdiv(blocks.video_blocks, rows)
    if not programs:
        return _Prepared(None, tiled)
    by_batch, by_head, by_key, by_last = strides
    arguments = (
        queries, source, task.forced.near, blocks.q.lengths, blocks.k.lengths, task.room.start,
        lists.whole, lists.count, lists.index, lists.count if tally is None else tally,
        per_sample, heads // per_sample, heads, group, blocks.q.count,
        blocks.k.count, blocks.first_video, blocks.video_blocks, task.forced.sinks,
        task.forced.near.shape[1], min(task.budget.most, blocks.video_blocks), factor,
        task.budget.share, by_batch, by_key, by_head, by_last,
        blocks.q.sample_stride, blocks.k.sample_stride,
    )  # fmt: skip
    constants = {
        "D": dim, "STEP": _STEP, "ROWS": rows, "COLUMNS": columns, "TILED": tiled,
        "GIVEN": keys is None, "BLOCK_Q": blocks.block_q, "BLOCK_K": blocks.block_k,
        "MASS": task.budget.mass is not None, "TALLY": tally is not None,
        "num_warps": min(16, max(4, rows * columns // _HELD_BY_WARP)), "num_stages": 2,
    }  # fmt: skip
    return _Prepared(Launch(_select, (programs,), arguments, constants, _CHANGING), tiled)


def _tiled(columns: int, device: torch.device) -> bool:
    """Whether scores are products of tiles: where shared memory holds the keys of two steps."""
    return columns <= _TILED and machine_of(device).shared >= (2 * _STEP * columns + 1024) * 4


def _transposed(keys: Tensor) -> Tensor:
    """[B, Hkv, D, NK] of [B, NK, Hkv, D], each line from a multiple of 16 numbers on."""
    batch, blocks, heads, dim = keys.shape
    wide = keys.new_empty((batch, heads, dim, aligned(blocks)))
    wide[..., :blocks].copy_(keys.permute(0, 2, 3, 1))
    return wide[..., :blocks]
