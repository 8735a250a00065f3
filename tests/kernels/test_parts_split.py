"""Blocks by one backend and pooled keys by another: the same as both in one softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.backends import BACKENDS
from dit_accel.kernels.parts import attend_split, halves_of
from dit_accel.kernels.plan import ListKinds, plan_of
from dit_accel.kernels.reference import dense_mask, pooled_mask
from dit_accel.kernels.slots import attend_in_slots, slot_plan

Make = Callable[..., Any]
PAIRS = [("torch", "torch"), ("torch", "triton")]


def split(pair: tuple[str, str]) -> Callable[..., Any]:
    """`attend_split` by two backends, of which the first takes no pooled keys."""
    first, second = (BACKENDS[name].forward for name in pair)

    def on_blocks(*call: Any) -> Any:
        assert len(call) == 6 and call[3].pooled is None
        return first(*call)

    return partial(attend_split, on_blocks=on_blocks, on_pooled=second)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize(
    ("count", "partial"), [(1, None), (63, (1, 2, 1)), (65, None), (130, (1, 2, 1))]
)
def test_random_lists(
    pair: tuple[str, str],
    count: int,
    partial: tuple[int, int, int] | None,
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    plan, mask = random_plan([50, 128, 97], [128, 3, 66], keep=0.4, partial=partial, seed=count)
    plan, pooled, seen = random_pooled(plan, count)
    q, k, v = qkv(275, 197)
    result = split(pair)(q, k, v, plan, -0.1, True, pooled)
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, -0.1, bias)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize(("batch", "heads"), [(2, 1), (1, 4)])
@pytest.mark.parametrize("shuffled", [True, False])
def test_lists_per_sample_and_head(
    pair: tuple[str, str],
    batch: int,
    heads: int,
    shuffled: bool,
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    """In place and in block order, where the split is made inside."""
    plan, mask = random_plan(
        [33, 64, 20], [64, 17], batch=batch, heads=heads, block=64, shuffled=shuffled
    )
    plan, pooled, seen = random_pooled(
        plan, 30, batch=2, dim=80, dtype=torch.float16, shared_counts=batch == 1
    )
    q, k, v = qkv(117, 81, batch=2, heads=4, kv_heads=2, dim=80, dtype=torch.float16)
    call = (q, k, v, plan, 0.2)
    result = split(pair)(*call, True, pooled)
    moved = attend_in_slots(*call, True, partial(split(pair), pooled=pooled))
    assert split(pair)(*call, False, pooled)[1] is None
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    for found in (result, moved):
        assert_right(found, q, k, v, mask, 0.2, bias)


def gaps(plan: Any) -> Any:
    """Of four blocks' lists: no blocks, no pooled keys, neither, both; and rows in no block."""
    alone = {"blocks": torch.tensor([0, 1, 0, 1]), "pooled": torch.tensor([1, 0, 0, 1])}
    lists = []
    for part, kept in ((plan.visits, alone["blocks"]), (plan.pooled, alone["pooled"])):
        kept = kept.to(plan.device).int()
        counts = {name: getattr(part, name) * kept for name in ("whole", "full", "count")}
        lists.append(replace(part, **counts))
    lengths = plan.blocks.q.lengths.clone()
    lengths[:, 3] -= 10
    blocks = replace(plan.blocks, q=replace(plan.blocks.q, lengths=lengths), covers=None)
    return plan_of(blocks, lists[0], pooled=lists[1]).validate()


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_rows_without_keys(
    pair: tuple[str, str],
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    """A row without keys in a half takes the other's; without any it is 0 and -inf."""
    plan, _ = random_plan([60, 64, 50, 40], [64, 64, 30], keep=1.1, block=64, heads=2)
    plan, pooled, _ = random_pooled(plan, 20, keep=1.1)
    plan = gaps(plan)
    q, k, v = qkv(214, 158)
    mask, seen = dense_mask(plan, 1, 2), pooled_mask(plan, 1, 2, 20)
    rows = mask.any(-1).sum(), seen.any(-1).sum(), (mask.any(-1) | seen.any(-1)).sum()
    assert [int(n) for n in rows] == [2 * (64 + 30), 2 * (60 + 30), 2 * (60 + 64 + 30)]
    result = split(pair)(q, k, v, plan, 0.125, True, pooled)
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, bias=bias)


def test_one_half_has_no_lists(qkv: Make, random_plan: Make, random_pooled: Make) -> None:
    """Then the result is the other half's, bit for bit."""
    q, k, v = qkv(168, 90)
    for keep, share in ((0.0, 1.1), (1.1, 0.0)):
        plan, _ = random_plan([40, 128], [90], keep=keep)
        plan, pooled, _ = random_pooled(plan, 20, keep=share)
        found = split(("torch", "torch"))(q, k, v, plan, 0.1, True, pooled)
        expected = BACKENDS["torch"].forward(q, k, v, plan, 0.1, True, pooled)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Reads(TorchDispatchMode):
    """Fails where a value is read back: a GPU would be waited for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_halves_are_made_once_and_read_nothing(random_plan: Make, random_pooled: Make) -> None:
    plan, _ = random_plan([50, 128, 97], [128, 3, 66], partial=(1, 2, 1), heads=2)
    plan, pooled, _ = random_pooled(plan, 40)
    every = ListKinds(True, True, True, True)
    told = replace(plan, shape=replace(plan.shape, kinds=every, online=True), known=None)
    with Reads():
        halves = halves_of(told)
        assert halves_of(told) is halves and halves.pooled.blocks is told.blocks
        assert halves.blocks.shape.kinds == (True, True, True, False)
        assert halves.pooled.shape.kinds == (False, False, False, True)
        assert halves.pooled.launch_order.shape == (3,)
    entries = plan.visits.count.double().mean().item()
    assert plan.shape.visits == pytest.approx(entries)
    halves = halves_of(plan)
    assert halves.blocks.validate().shape.kinds == plan.shape.kinds._replace(pooled=False)
    assert halves.pooled.validate(pooled).kept_density() == pytest.approx(
        plan.kept_density() - halves.blocks.kept_density()
    )
    assert halves.pooled.visits.count.sum() == 0 and plan.visits.count.sum() > 0
    bare, _ = random_plan([50, 128, 97], [128, 3, 66], heads=2)
    bare, _, _ = random_pooled(bare, 40)
    assert halves_of(slot_plan(bare)).blocks.pooled is None


def test_only_pooled_lists_leave_the_tokens_alone(
    qkv: Make, random_plan: Make, random_pooled: Make
) -> None:
    """The portable kernel of the pooled half: NaN in every key and value of a token is not seen."""
    plan, _ = random_plan([50, 128, 97], [128, 3, 66], keep=1.1)
    plan, pooled, _ = random_pooled(plan, 40)
    q, k, v = qkv(275, 197)
    half = halves_of(plan).pooled
    expected = BACKENDS["reference"].forward(q, k, v, half, 0.1, True, pooled)
    bad = torch.full_like(k, torch.nan)
    found = BACKENDS["triton"].forward(q, bad, bad, half, 0.1, True, pooled)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
