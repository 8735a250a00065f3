"""Plans with pooled keys on the Hopper backend, without its GPU: torch stands in for its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from dit_accel.kernels.backends import BACKENDS, choose
from dit_accel.kernels.hopper import launch
from dit_accel.kernels.hopper.launch import hopper_attention
from dit_accel.kernels.hopper.lists import plan_obstacle
from dit_accel.kernels.plan import Visits, plan_of
from dit_accel.kernels.torch_backend import torch_attention

Make = Callable[..., Any]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that reach the Hopper kernel."""
    plans: list[Any] = []

    def on_blocks(*call: Any, programs: int | None) -> Any:
        plan = call[3]
        assert not (plan.shape.scattered or plan.shape.kinds.pooled) and plan.pooled is None
        plans.append(plan)
        return torch_attention(*call)

    monkeypatch.setattr(launch, "_on_blocks", on_blocks)
    return plans


@pytest.mark.parametrize("scattered", [False, True])
def test_blocks_and_pooled_keys(
    scattered: bool,
    runs: list[Any],
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    """With lists per sample and head; `test_parts_split` has the others."""
    plan, mask = random_plan([50, 128, 97], [128, 3, 66], batch=2, heads=4, shuffled=scattered)
    plan, pooled, seen = random_pooled(plan, 70, batch=2)
    assert plan_obstacle(plan.shape) is None
    q, k, v = qkv(275, 197, batch=2, heads=4, kv_heads=2)
    out, none = hopper_attention(q, k, v, plan, 0.1, False, pooled)
    assert none is None
    result = hopper_attention(q, k, v, plan, 0.1, True, pooled)
    assert torch.equal(out, result[0]) and len(runs) == 2 and runs[0] is runs[1]
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, 0.1, bias)


def test_no_split_without_pooled_entries(
    runs: list[Any], qkv: Make, runs_plan: Make, random_pooled: Make
) -> None:
    bare, _ = runs_plan([50, 128], [128, 66])
    plan, pooled, _ = random_pooled(bare, 9, keep=0.0)
    q, k, v = qkv(178, 194)
    expected = torch_attention(q, k, v, bare, 0.1)[0]
    for some, more in ((bare, None), (replace(plan, pooled=None), None)):
        assert torch.equal(hopper_attention(q, k, v, some, 0.1, False, more)[0], expected)
    assert len(runs) == 2


def pooled_plan(random_plan: Make, visits: int, block_k: int = 128, shuffled: bool = False) -> Any:
    """A plan whose lists all have `visits` blocks, and one pooled key."""
    plan, _ = random_plan([128] * 2, [block_k] * visits, keep=1.1, shuffled=shuffled)
    one = torch.ones_like(plan.visits.count)
    pooled = Visits(one - 1, one, one, one, torch.zeros(1, dtype=torch.int32))
    return plan_of(replace(plan.blocks, block_k=block_k), plan.visits, pooled=pooled)


def test_the_split_pays_where_lists_are_long(random_plan: Make) -> None:
    def fewest(head_dim: int, **how: Any) -> int:
        plans = (pooled_plan(random_plan, n, **how) for n in range(10, 50))
        pays = BACKENDS["hopper"].pays
        return next((p.shape.visits for p in plans if pays(head_dim, p.shape)), 0)

    # Worked out by hand: 2 x passes x 0.0079 x head_dim / saved, rounded up.
    assert fewest(128) == 19  # 2 x 3 x 1.011 / 0.32
    assert fewest(128, shuffled=True) == 17  # moved: 2 x 11 x 1.011 / 1.35
    assert fewest(128, block_k=64) == 38
    assert fewest(64) == 0  # the portable kernel is as fast
    assert fewest(64, shuffled=True) == 23  # 2 x 11 x 0.5056 / 0.49


def test_choose_takes_the_portable_kernel_where_the_split_does_not_pay(
    random_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hopper", "triton"):
        able = replace(BACKENDS[name], machine=lambda: None, obstacle=lambda *_: None)
        monkeypatch.setitem(BACKENDS, name, able)
    q: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(1, 256, 2, 128))
    few, many = (pooled_plan(random_plan, n) for n in (4, 40))
    assert choose(q, q, q, few) == "triton" and choose(q, q, q, many) == "hopper"
    bare = plan_of(few.blocks, few.visits)
    assert choose(q, q, q, bare) == "hopper"
    q.shape = (1, 256, 2, 64)
    assert choose(q, q, q, many) == "triton" and choose(q, q, q, bare) == "hopper"
