"""Calls in block order: equal to the same plan in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.plan import plan_of
from dit_accel.kernels.reference import dense_mask
from dit_accel.kernels.slots import attend_in_slots, slot_plan, slots_of
from dit_accel.kernels.torch_backend import torch_attention
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
LENGTHS = [[128], [1], [65, 127, 3], [128] * 3]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_random_blocks(
    lengths: list[int], qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan(lengths, [*lengths, 20], batch=2, heads=4, keep=0.6)
    q, k, v = qkv(sum(lengths), sum(lengths) + 20, batch=2, heads=4, kv_heads=2)
    result = attend_in_slots(q, k, v, plan, 64**-0.5, True, torch_attention)
    assert_right(result, q, k, v, mask)
    assert slot_plan(plan) is slot_plan(plan)


@pytest.mark.parametrize("valid", [None, ((7, 30), (20, 0))])
def test_video_with_text(valid: Any, qkv: Make, device: torch.device, assert_right: Make) -> None:
    """Queries and keys of one table move together; padded text is cut for each sample."""
    layout = TokenLayout((3, 9, 17), before=20, after=30, valid=valid)
    plan = plan_for(layout, pattern("sliding_tile"), device, layout_kind="gather")
    q, k, v = qkv(layout.length, batch=2)
    result = attend_in_slots(q, k, v, plan, 64**-0.5, True, torch_attention)
    assert_right(result, q, k, v, dense_mask(plan, 2, 1))


def test_slots_stand_in_rows_of_a_block(random_plan: Make) -> None:
    plan, _ = random_plan([20, 128, 7], [30])
    slots = slots_of(plan.blocks.q, 128, plan.blocks.q_length)
    order = plan.blocks.q.order
    assert order is not None and len(slots.tokens) == 3 * 128
    for block, (start, length) in enumerate([(0, 20), (20, 128), (148, 7)]):
        row = slots.tokens[block * 128 :][:128].tolist()
        assert row[:length] == order[start : start + length].tolist()
        assert set(row[length:]) <= {-1}
    tokens = torch.arange(plan.blocks.q_length, device=order.device)
    assert torch.equal(slots.tokens[slots.back.long()].long(), tokens)


def test_tokens_in_no_block_are_zero(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([70, 58], [90], keep=1.1)
    lengths = torch.tensor([[20, 0]], dtype=torch.int32, device=plan.device)
    q_blocks = replace(plan.blocks.q, lengths=lengths)
    plan = plan_of(replace(plan.blocks, q=q_blocks, covers=None), plan.visits)
    q, k, v = qkv(128, 90, heads=1)
    out, lse = attend_in_slots(q, k, v, plan, 0.1, True, torch_attention)
    assert lse is not None and plan.blocks.q.order is not None
    rest = plan.blocks.q.order[20:].long()
    assert (out[:, rest] == 0).all() and lse[..., rest].isneginf().all()
    assert (out != 0).any() and not out.isnan().any()


def test_tokens_in_no_block_of_one_sample_are_zero(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([70, 58], [90], keep=1.1, shuffled=False)
    lengths = torch.tensor([[70, 58], [20, 58]], dtype=torch.int32, device=plan.device)
    q_blocks = replace(plan.blocks.q, lengths=lengths)
    plan = plan_of(replace(plan.blocks, q=q_blocks, covers=None), plan.visits)
    q, k, v = qkv(128, 90, batch=2, heads=1)
    out, lse = attend_in_slots(q, k, v, plan, 0.1, True, torch_attention)
    expected = torch_attention(q, k, v, plan, 0.1, True)
    assert lse is not None and expected[1] is not None
    assert torch.allclose(out, expected[0]) and torch.allclose(lse, expected[1])
    assert (out[1, 20:70] == 0).all() and lse[1, :, 20:70].isneginf().all()
