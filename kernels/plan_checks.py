"""What a plan must be for kernels to run it: every rule, checked on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES

if TYPE_CHECKING:
    from dit_accel.kernels.plan import BlockPlan, TokenMask, Visits
    from dit_accel.kernels.pooling import PooledKeys


def check_plan(plan: BlockPlan, pooled: PooledKeys | None = None) -> None:
    """DitAccelError for the first rule that `plan` breaks; `pooled` bounds the pooled lists."""
    blocks = plan.blocks
    _check_table("q", blocks.q, blocks.q_length, blocks.block_q)
    _check_table("k", blocks.k, blocks.k_length, blocks.block_k)
    _check_rows(blocks)
    _check_lists("visits", plan.visits, plan, blocks.k.count)
    _check_whole(plan)
    if plan.mask is not None:
        _check_mask(plan, plan.mask)
    elif (plan.visits.count > plan.visits.full).any():
        raise DitAccelError("plan.mask: expected one, as visits.count is more than visits.full.")
    if plan.pooled is not None:
        _check_lists("pooled", plan.pooled, plan, None if pooled is None else pooled.count)
    _check_claims(plan)


def _check_table(side: str, table: BlockTable, length: int, block: int) -> None:
    name = f"blocks.{side}"
    if table.starts.ndim != 1 or table.lengths.ndim != 2:
        raise DitAccelError(
            f"plan.{name}: expected starts [N] and lengths [Bp, N], got "
            f"{tuple(table.starts.shape)} and {tuple(table.lengths.shape)}."
        )
    if table.lengths.shape[1] != table.count:
        raise DitAccelError(
            f"plan.{name}: expected {table.count} lengths, got {table.lengths.shape[1]}."
        )
    for part, tensor in (("starts", table.starts), ("lengths", table.lengths)):
        _expect_int32(f"{name}.{part}", tensor)
    stops = table.starts + table.lengths
    if table.count and (int(stops.max()) > length or int(table.starts.min()) < 0):
        raise DitAccelError(f"plan.{name}: expected blocks within [0, {length}).")
    if table.count and not 0 <= int(table.lengths.min()) <= int(table.lengths.max()) <= block:
        raise DitAccelError(f"plan.{name}: expected lengths in [0, {block}].")
    if table.order is not None:
        _expect_int32(f"{name}.order", table.order)
        tokens = torch.arange(length, device=table.order.device, dtype=torch.int32)
        if table.order.shape != (length,) or not torch.equal(table.order.sort().values, tokens):
            raise DitAccelError(f"plan.{name}.order: expected a permutation of {length} tokens.")


def _check_rows(blocks: Blocks) -> None:
    starts, by_start = blocks.q.starts.sort()
    stops = starts + blocks.q.lengths[:, by_start]
    if (stops[:, :-1] > starts[1:]).any():
        raise DitAccelError("plan.blocks.q: expected blocks that share no query.")
    covered = (blocks.q.lengths.sum(-1) == blocks.q_length).all()
    if blocks.covers and not covered:
        raise DitAccelError("plan.blocks.covers: expected False, some queries are in no block.")


def _check_lists(name: str, lists: Visits, plan: BlockPlan, choices: int | None) -> None:
    """choices: how many blocks or pooled keys there are to name; None where nobody knows."""
    _expect_int32(f"{name}.index", lists.index)
    room, queries = len(lists.index), plan.blocks.q.count
    if lists.index.ndim != 1:
        raise DitAccelError(f"plan.{name}.index: expected shape [E], got {lists.index.shape}.")
    expected = plan.visits.count.shape
    for part in ("count", "full", "whole", "start"):
        tensor = getattr(lists, part)
        _expect_int32(f"{name}.{part}", tensor)
        if tensor.ndim != 3 or tensor.shape != expected or tensor.shape[2] != queries:
            raise DitAccelError(
                f"plan.{name}.{part}: expected shape [Bl, Hl, {queries}] like visits.count, "
                f"{tuple(expected)}, got {tuple(tensor.shape)}."
            )
    if (lists.count < 0).any() or (lists.count > room).any():
        raise DitAccelError(f"plan.{name}.count: expected counts in [0, {room}].")
    for part, tensor, most in (("full", lists.full, "count"), ("whole", lists.whole, "full")):
        if (tensor < 0).any() or (tensor > getattr(lists, most)).any():
            raise DitAccelError(f"plan.{name}.{part}: expected counts in [0, {most}].")
    if (lists.start < 0).any() or (lists.start + lists.count > room).any():
        raise DitAccelError(f"plan.{name}.start: expected lists within the {room} entries.")
    index, listed = lists.rows()
    used = index[listed]
    what = "blocks" if name == "visits" else "pooled keys"
    if used.numel() and (
        int(used.min()) < 0 or (choices is not None and int(used.max()) >= choices)
    ):
        bound = "0 or more" if choices is None else f"[0, {choices})"
        raise DitAccelError(
            f"plan.{name}.index: expected {what} in {bound}, "
            f"got {int(used.min())} to {int(used.max())}."
        )
    # Unlisted slots become -1, -2, ...: all different, so that equal neighbours are repetitions.
    slots = -1 - torch.arange(index.shape[-1], dtype=torch.int32, device=index.device)
    ordered = torch.where(listed, index, slots).sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise DitAccelError(f"plan.{name}.index: expected {what} that no list names twice.")


def _check_whole(plan: BlockPlan) -> None:
    index, front = plan.visits.rows(stop=plan.visits.whole)
    whole = (plan.blocks.k.lengths == plan.blocks.block_k).expand(plan.batch, -1)
    for sample in range(plan.batch):
        row = sample % len(front)
        if not whole[sample][index[row][front[row]].long()].all():
            raise DitAccelError(
                "plan.visits.whole: expected the blocks that it counts to have "
                f"{plan.blocks.block_k} tokens each."
            )


def _check_mask(plan: BlockPlan, mask: TokenMask) -> None:
    for rule, params in mask.rules:
        if rule not in TOKEN_RULES:
            raise unknown("token rule", rule, TOKEN_RULES)
        if len(params) > MAX_PARAMS:
            raise DitAccelError(
                f"plan.mask: expected at most {MAX_PARAMS} parameters, got {len(params)}."
            )
    for name, coords, length in (
        ("q_coords", mask.q_coords, plan.blocks.q_length),
        ("k_coords", mask.k_coords, plan.blocks.k_length),
    ):
        _expect_int32(f"mask.{name}", coords)
        if coords.shape != (length, 3):
            raise DitAccelError(
                f"plan.mask.{name}: expected shape {(length, 3)}, got {tuple(coords.shape)}."
            )


def _check_claims(plan: BlockPlan) -> None:
    """What the shape says is so, and promises no less than there is."""
    shape, blocks, lists = plan.shape, plan.blocks, plan.visits
    counts = plan.counts
    there = (counts.whole > 0, counts.short > 0, counts.partial > 0, counts.pooled > 0)
    if any(found and not said for said, found in zip(shape.kinds, there, strict=True)):
        raise DitAccelError(f"plan.shape.kinds: expected at least {there}, got {shape.kinds}.")
    video = slice(blocks.first_video, blocks.first_video + blocks.video_blocks)
    longest = (
        int(lists.count[..., video].max()) if blocks.video_blocks and lists.count.numel() else 0
    )
    if longest > shape.most:
        raise DitAccelError(f"plan.shape.most: expected at least {longest}, got {shape.most}.")
    known = {
        "block_q": blocks.block_q,
        "block_k": blocks.block_k,
        "q_blocks": blocks.q.count,
        "k_blocks": blocks.k.count,
        "box": blocks.box,
        "grid": blocks.grid,
        "scattered": blocks.scattered,
        "gathered": blocks.gathered,
        "mixed": blocks.mixed,
        "in_place": blocks.in_place,
        "batch": max(len(lists.count), len(blocks.k.lengths)),
        "heads": lists.count.shape[1],
        "entries": len(lists.index),
        "rules": () if plan.mask is None else tuple(name for name, _ in plan.mask.rules),
    }
    for name, expected in known.items():
        if getattr(shape, name) != expected:
            raise DitAccelError(
                f"plan.shape.{name}: expected {expected}, got {getattr(shape, name)}."
            )


def _expect_int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise DitAccelError(f"plan.{name}: expected int32, got {tensor.dtype}.")
    if not tensor.is_contiguous():
        raise DitAccelError(f"plan.{name}: expected contiguous memory, got {tensor.stride()}.")
