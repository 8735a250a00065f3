"""FlexAttention: the plan's conversion by enumeration, and real runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo import config

from dit_accel.kernels.backends import AUTOMATIC, BACKENDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.libraries import flex
from dit_accel.kernels.libraries.flex import FlexPlan, flex_missing, flex_plan
from dit_accel.kernels.plan import BlockPlan, plan_of

Make = Callable[..., Any]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def enumerated(flex: FlexPlan, plan: BlockPlan, batch: int, heads: int) -> torch.Tensor:
    """The mask [batch, heads, Lq, Lk] that FlexAttention makes of the lists, pair by pair."""
    block_q, block_k = plan.blocks.block_q, plan.blocks.block_k
    mask = torch.zeros(batch, heads, plan.blocks.q_length, plan.blocks.k_length).bool()
    q_token = list(range(flex.q_slots)) if flex.q_index is None else flex.q_index.tolist()
    k_token = list(range(flex.k_slots)) if flex.k_index is None else flex.k_index.tolist()
    for b, h in itertools.product(range(batch), range(heads)):
        row = (min(b, len(flex.full_count) - 1), min(h, flex.full_count.shape[1] - 1))
        for kind, count, index in (
            ("full", flex.full_count, flex.full_index),
            ("masked", flex.masked_count, flex.masked_index),
        ):
            for i, n in enumerate(count[row].tolist()):
                for j in index[row][i, :n].tolist():
                    qs = torch.arange(i * block_q, min(flex.q_slots, (i + 1) * block_q))
                    ks = torch.arange(j * block_k, min(flex.k_slots, (j + 1) * block_k))
                    kept = torch.ones(len(qs), len(ks), dtype=torch.bool)
                    if kind == "masked":
                        place = torch.tensor(b), torch.tensor(h)
                        kept = kept & flex.mask_mod(*place, qs[:, None], ks[None])
                    for x, y in kept.nonzero().tolist():
                        query, key = q_token[qs[x]], k_token[ks[y]]
                        if query >= 0:
                            assert key >= 0 and not mask[b, h, query, key]
                            mask[b, h, query, key] = True
    return mask


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("partial", [None, (1, 2, 1)], ids=str)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([64, 64, 20], [64, 64, 33]), ([64, 20, 40], [64, 5, 64, 33])],
)
def test_conversion(
    shuffled: bool,
    partial: tuple[int, int, int] | None,
    q_lengths: list[int],
    k_lengths: list[int],
    random_plan: Make,
) -> None:
    plan, mask = random_plan(
        q_lengths, k_lengths, heads=2, block=64, shuffled=shuffled, partial=partial, keep=0.4
    )
    plan = plan.to("cpu")
    flex = flex_plan(plan)
    assert torch.equal(enumerated(flex, plan, 1, 2), mask)
    moves = shuffled or q_lengths[1] < 64
    assert (flex.q_index is not None) == (flex.k_index is not None) == moves
    assert int(flex.full_count.sum()) == plan.counts.whole > 0
    assert flex_plan(plan) is flex


@pytest.mark.parametrize("partial", [None, (1, 2, 1)], ids=str)
def test_lengths_per_sample(partial: tuple[int, int, int] | None, random_plan: Make) -> None:
    plan, mask = random_plan([64, 20], [64, 64, 33], batch=2, block=64, partial=partial, keep=0.7)
    plan = plan.to("cpu")
    lengths = torch.tensor([[64, 64, 33], [64, 10, 0]], dtype=torch.int32)
    order = plan.blocks.k.order
    cut = torch.cat([order[74:128], order[128:]]).long()
    mask[1][..., cut] = False
    blocks = replace(plan.blocks, k=replace(plan.blocks.k, lengths=lengths))
    lists = replace(plan.visits, whole=torch.zeros_like(plan.visits.whole))
    plan = plan_of(blocks, lists, plan.mask).validate()
    assert torch.equal(enumerated(flex_plan(plan), plan, 2, 1), mask)


def test_only_short_or_only_partial_entries(random_plan: Make) -> None:
    """Each form of the mask function: lengths alone, the rule alone, both."""
    whole, _ = random_plan([64], [64] * 9, block=64, partial=(1, 1, 1), keep=0.5)
    short, _ = random_plan([64], [20] * 9, block=64, partial=(1, 1, 1), keep=0.5)
    bare, _ = random_plan([64], [20, 30], block=64, keep=0.9)
    names = [flex_plan(plan.to("cpu")).mask_mod.__name__ for plan in (whole, short, bare)]
    assert names == ["allowed", "mixed", "inside"]


def test_reasons(random_plan: Make, qkv: Make) -> None:
    assert "flex" in BACKENDS and "flex" not in AUTOMATIC
    plan, _ = random_plan([40], [40])
    q, k, v = (x.cpu() for x in qkv(40))
    assert "CUDA" in str(eligible("flex", q, k, v, plan))
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(flex_missing())


def test_block_mask_holds_the_lists(random_plan: Make) -> None:
    plan, _ = random_plan([64, 64, 20], [64, 64, 33, 5], heads=2, block=64, partial=(1, 2, 1))
    plan = plan.to("cpu")
    mask = flex._block_mask(flex_plan(plan), plan)
    assert mask.shape == (1, 2, 192, 256) and mask.BLOCK_SIZE == (64, 64)
    visited = torch.zeros(1, 2, 3, 4, dtype=torch.int32)
    for h, i in itertools.product(range(2), range(3)):
        for blocks in plan.visits.entries(0, h, i):
            visited[0, h, i, blocks.long()] = 1
    assert torch.equal(mask.to_dense().int(), visited)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("partial", [None, (1, 2, 1)], ids=str)
class TestOnGpu:
    pytestmark = gpu

    def test_all_kinds(
        self, dtype: torch.dtype, shuffled: bool, partial: Any, qkv: Make, random_plan: Make,
        random_pooled: Make, assert_right: Make,
    ) -> None:  # fmt: skip
        plan, mask = random_plan(
            [128, 128, 40], [128, 128, 77], batch=2, heads=4, keep=0.4, shuffled=shuffled,
            partial=partial,
        )  # fmt: skip
        q, k, v = qkv(296, 333, batch=2, heads=4, kv_heads=2, dim=64, dtype=dtype)
        result = block_sparse_attention(q, k, v, plan, backend="flex", return_lse=True)
        assert_right(result, q, k, v, mask)
        plan, pooled, seen = random_pooled(plan, 150, batch=2, dtype=dtype, shared_counts=False)
        result = block_sparse_attention(
            q, k, v, plan, backend="flex", return_lse=True, pooled=pooled
        )
        bias = torch.cat([torch.zeros(2, 333, device=q.device), pooled.log_count], -1)
        k, v = torch.cat([k, pooled.key], 1), torch.cat([v, pooled.value], 1)
        assert_right(result, q, k, v, torch.cat([mask, seen], -1), bias=bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_outside_every_block(qkv: Make, random_plan: Make, assert_right: Make) -> None:
    plan, mask = random_plan([70, 58], [90], keep=1.1, shuffled=False)
    lengths = torch.tensor([[20, 0]], dtype=torch.int32, device=plan.device)
    q_blocks = replace(plan.blocks.q, lengths=lengths)
    plan = plan_of(replace(plan.blocks, q=q_blocks, covers=None), plan.visits)
    mask[:, :, 20:] = False
    q, k, v = qkv(128, 90, heads=1)
    result = block_sparse_attention(q, k, v, plan, backend="flex", return_lse=True)
    assert_right(result, q, k, v, mask)


def test_always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager FlexAttention ignores the lists of a block mask: torch.compile must never go back."""
    seen = []

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        limits = ("recompile_limit", "fail_on_recompile_limit_hit")
        return lambda: seen.append((function.__name__, *(getattr(config, k) for k in limits)))

    monkeypatch.setattr(torch, "compile", compile_)
    flex._compiled.__wrapped__()()
    assert seen == [("flex_attention", flex.KINDS, True)]
    assert not config.fail_on_recompile_limit_hit
