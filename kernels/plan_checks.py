"""What a plan must be for kernels to run it: every rule, checked on request."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.plan import BlockPlan, BlockTable, TokenMask, listed_entries
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES

if TYPE_CHECKING:
    from dit_accel.kernels.pooling import PooledKeys


def check_plan(plan: BlockPlan, pooled: PooledKeys | None = None) -> None:
    """DitAccelError for the first rule that `plan` breaks; `pooled` bounds the pooled lists."""
    _check_table("q_blocks", plan.q_blocks, plan.q_length, plan.block_q)
    _check_table("k_blocks", plan.k_blocks, plan.k_length, plan.block_k)
    _check_rows(plan.q_blocks)
    blocks = plan.k_blocks.count
    _check_lists("full", plan.full_count, plan.full_index, plan, blocks)
    if plan.unmasked_count is not None:
        _check_unmasked(plan, plan.unmasked_count)
    _check_together(
        partial_count=plan.partial_count,
        partial_index=plan.partial_index,
        token_mask=plan.token_mask,
    )
    if plan.partial_count is not None and plan.partial_index is not None:
        _check_lists("partial", plan.partial_count, plan.partial_index, plan, blocks)
        _check_apart(plan, plan.partial_count, plan.partial_index)
    if plan.token_mask is not None:
        _check_mask(plan, plan.token_mask)
    _check_together(pooled_count=plan.pooled_count, pooled_index=plan.pooled_index)
    if plan.pooled_count is not None and plan.pooled_index is not None:
        keys = None if pooled is None else pooled.count
        _check_lists("pooled", plan.pooled_count, plan.pooled_index, plan, keys)
    _check_claims(plan)


def _check_table(name: str, table: BlockTable, length: int, block: int) -> None:
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


def _check_rows(table: BlockTable) -> None:
    starts, by_start = table.starts.sort()
    stops = starts + table.lengths[:, by_start]
    if (stops[:, :-1] > starts[1:]).any():
        raise DitAccelError("plan.q_blocks: expected blocks that share no query.")


def _check_lists(
    name: str, count: Tensor, index: Tensor, plan: BlockPlan, choices: int | None
) -> None:
    _expect_int32(f"{name}_count", count)
    _expect_int32(f"{name}_index", index)
    if count.ndim != 3 or index.shape[:-1] != count.shape or count.shape[2] != plan.q_blocks.count:
        raise DitAccelError(
            f"plan.{name}: expected counts [Bp, Hp, {plan.q_blocks.count}] and indices of that "
            f"shape x M, got {tuple(count.shape)} and {tuple(index.shape)}."
        )
    if count.shape != plan.full_count.shape:
        raise DitAccelError(
            f"plan.{name}_count: expected the shape of full_count, "
            f"{tuple(plan.full_count.shape)}, got {tuple(count.shape)}."
        )
    if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= index.shape[-1]:
        raise DitAccelError(f"plan.{name}_count: expected counts in [0, {index.shape[-1]}].")
    listed = listed_entries(count, index)
    used = index[listed]
    what = "blocks" if name != "pooled" else "pooled keys"
    if used.numel() and (
        int(used.min()) < 0 or (choices is not None and int(used.max()) >= choices)
    ):
        bound = "0 or more" if choices is None else f"[0, {choices})"
        raise DitAccelError(
            f"plan.{name}_index: expected {what} in {bound}, "
            f"got {int(used.min())} to {int(used.max())}."
        )
    # Unlisted slots become -1, -2, ...: all different, so that equal neighbours are repetitions.
    slots = -1 - torch.arange(index.shape[-1], dtype=torch.int32, device=index.device)
    ordered = torch.where(listed, index, slots).sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise DitAccelError(f"plan.{name}_index: expected {what} that no list names twice.")


def _check_unmasked(plan: BlockPlan, count: Tensor) -> None:
    _expect_int32("unmasked_count", count)
    if count.shape != plan.full_count.shape:
        raise DitAccelError(
            f"plan.unmasked_count: expected the shape of full_count, "
            f"{tuple(plan.full_count.shape)}, got {tuple(count.shape)}."
        )
    if (count < 0).any() or (count > plan.full_count).any():
        raise DitAccelError("plan.unmasked_count: expected counts in [0, full_count].")
    front = listed_entries(count, plan.full_index)
    whole = (plan.k_blocks.lengths == plan.block_k).expand(plan.batch, -1)
    for sample in range(plan.batch):
        row = sample if len(front) > 1 else 0
        if not whole[sample][plan.full_index[row][front[row]].long()].all():
            raise DitAccelError(
                "plan.unmasked_count: expected the blocks that it counts to have "
                f"{plan.block_k} tokens each."
            )


def _check_apart(plan: BlockPlan, count: Tensor, index: Tensor) -> None:
    """No block stands in the full and in the partial list of the same query block."""
    shape = (*plan.full_count.shape[1:], plan.k_blocks.count + 1)
    for sample in range(plan.full_count.shape[0]):
        seen = torch.zeros(shape, dtype=torch.int32, device=plan.device)
        for counts, indices in ((plan.full_count, plan.full_index), (count, index)):
            listed = listed_entries(counts[sample], indices[sample])
            slots = torch.where(listed, indices[sample], plan.k_blocks.count).long()
            seen.scatter_add_(-1, slots, listed.int())
        if (seen > 1).any():
            raise DitAccelError("plan.partial_index: expected blocks that are not in full_index.")


def _check_mask(plan: BlockPlan, mask: TokenMask) -> None:
    for rule, params in mask.rules:
        if rule not in TOKEN_RULES:
            raise unknown("token rule", rule, TOKEN_RULES)
        if len(params) > MAX_PARAMS:
            raise DitAccelError(
                f"plan.token_mask: expected at most {MAX_PARAMS} parameters, got {len(params)}."
            )
    for name, coords, length in (
        ("q_coords", mask.q_coords, plan.q_length),
        ("k_coords", mask.k_coords, plan.k_length),
    ):
        _expect_int32(f"token_mask.{name}", coords)
        if coords.shape != (length, 3):
            raise DitAccelError(
                f"plan.token_mask.{name}: expected shape {(length, 3)}, got {tuple(coords.shape)}."
            )


def _check_claims(plan: BlockPlan) -> None:
    """`kinds` and `covers` promise no less than there is."""
    there = replace(plan, kinds=None).list_kinds
    if plan.kinds is not None and any(
        found and not said for said, found in zip(plan.list_kinds, there, strict=True)
    ):
        raise DitAccelError(f"plan.kinds: expected at least {there}, got {plan.kinds}.")
    covers = (plan.q_blocks.lengths.sum(-1) == plan.q_length).all()
    if plan.covers and not covers:
        raise DitAccelError("plan.covers: expected False, some queries are in no block.")


def _expect_int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise DitAccelError(f"plan.{name}: expected int32, got {tensor.dtype}.")
    if not tensor.is_contiguous():
        raise DitAccelError(f"plan.{name}: expected contiguous memory, got {tensor.stride()}.")


def _check_together(**fields: object) -> None:
    """All of `fields` are given, or none."""
    given = sum(value is not None for value in fields.values())
    if given not in (0, len(fields)):
        *first, last = fields
        raise DitAccelError(
            f"plan: expected {', '.join(first)} and {last} together, got {given} of them."
        )
