"""Pooled keys in the same softmax, in every backend, against dense attention with extra columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.backends import eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.plan import plan_of
from dit_accel.kernels.pooling import PooledKeys

BACKENDS = ["triton", "torch", "reference"]
Make = Callable[..., Any]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("count", "partial"),
    [(1, None), (63, (1, 2, 1)), (64, None), (65, (1, 2, 1)), (130, None)],
)
def test_beside_blocks(
    backend: str,
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
    out = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, pooled=pooled)
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(out, q, k, v, mask, bias=bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "heads", "dtype"),
    [(1, 1, torch.float32), (2, 1, torch.float16), (1, 4, torch.float16), (2, 4, torch.float32)],
)
def test_lists_and_counts_per_sample_and_head(
    backend: str,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    plan, mask = random_plan([33, 64, 20], [64, 17], batch=batch, heads=heads, block=64)
    plan, pooled, seen = random_pooled(
        plan, 30, batch=2, dim=80, dtype=dtype, shared_counts=batch == 1
    )
    q, k, v = qkv(117, 81, batch=2, heads=4, kv_heads=2, dim=80, dtype=dtype)
    result = block_sparse_attention(
        q, k, v, plan, backend=backend, return_lse=True, pooled=pooled, scale=0.2
    )
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, 0.2, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", [0.0, 1.1])
@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_only_one_kind(
    backend: str,
    blocks: float,
    keep: float,
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    plan, mask = random_plan([40, 128], [90], keep=blocks)
    plan, pooled, seen = random_pooled(plan, 20, keep=keep)
    q, k, v = qkv(168, 90)
    for with_lse in (True, False):
        result = block_sparse_attention(
            q, k, v, plan, backend=backend, return_lse=with_lse, pooled=pooled
        )
        out = result[0] if with_lse else result
    assert torch.equal(out, result)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, pooled=pooled)
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, bias=bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_one_token_each_are_the_tokens(
    backend: str, qkv: Make, random_plan: Make, random_pooled: Make
) -> None:
    """Bias ln(1) = 0: pooled keys that are tokens give what a full list of them gives."""
    plan, _ = random_plan([60, 70], [128, 12], keep=1.1, shuffled=False)
    q, k, v = qkv(130, 140)
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    zeros = torch.zeros_like(plan.visits.count)
    none = plan_of(plan.blocks, replace(plan.visits, whole=zeros, full=zeros, count=zeros))
    none, _, _ = random_pooled(none, 140, keep=1.1)
    pooled = PooledKeys(k, v, torch.zeros(1, 140, device=k.device))
    out = block_sparse_attention(q, k, v, none, backend=backend, pooled=pooled)
    assert (out - expected).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_of_none_leaves_a_key_out(
    backend: str,
    qkv: Make,
    random_plan: Make,
    random_pooled: Make,
    assert_right: Make,
    beside_pooled: Make,
) -> None:
    plan, mask = random_plan([60], [70], keep=0.0)
    plan, pooled, seen = random_pooled(plan, 9, keep=1.1)
    logs = pooled.log_count.clone()
    logs[:, ::2] = -torch.inf
    pooled = replace(pooled, log_count=logs)
    seen[..., ::2] = False
    q, k, v = qkv(60, 70)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, pooled=pooled)
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, bias=bias.clamp_min(-1e3))
    everyone = replace(pooled, log_count=torch.full_like(logs, -torch.inf))
    out, lse = block_sparse_attention(
        q, k[:, :70], v[:, :70], plan, backend=backend, return_lse=True, pooled=everyone
    )
    assert (out == 0).all() and lse.isneginf().all()


def test_density_counts_a_pooled_key_as_a_key(random_plan: Make, random_pooled: Make) -> None:
    plan, mask = random_plan([50, 128], [128, 3, 66], keep=0.6, heads=2)
    before = {n: plan.launched_density(n) for n in ("triton", "torch")}
    kept, total = plan.kept_density(), 2 * 178 * 197
    plan, _, seen = random_pooled(plan, 31)
    assert plan.pooled is not None
    entries = int(plan.pooled.count.sum())
    assert plan.launched_density("triton") == pytest.approx(
        before["triton"] + entries * 128 / total
    )
    assert plan.launched_density("torch") == pytest.approx(before["torch"] + seen.sum() / total)
    assert plan.kept_density() == pytest.approx(kept + int(seen.sum()) / total)
    assert plan.shape.kinds.pooled
    zeros = torch.zeros_like(plan.visits.count)
    only = replace(plan, visits=replace(plan.visits, whole=zeros, full=zeros, count=zeros))
    assert only.launch_order.tolist() == (
        plan.pooled.count.sum((0, 1)).argsort(descending=True, stable=True).tolist()
    )


def test_bad_pooled_keys(qkv: Make, random_plan: Make, random_pooled: Make) -> None:
    bare, _ = random_plan([40], [50])
    plan, pooled, _ = random_pooled(bare, 7)
    q, k, v = qkv(40, 50)
    for wrong, plan_, words in (
        (None, plan, "pooled: expected pooled keys exactly where .* got none with its lists"),
        (pooled, bare, "got some with no lists"),
        (
            replace(pooled, key=pooled.key[:, 1:]),
            plan,
            r"pooled.key: expected .*7, 2, 64.* got .*6",
        ),
        (replace(pooled, value=pooled.value.half()), plan, "pooled.value: expected torch.float32"),
        (replace(pooled, log_count=pooled.log_count[0]), plan, "pooled.log_count: expected shape"),
        (replace(pooled, log_count=pooled.log_count.double()), plan, "torch.float32"),
    ):
        with pytest.raises(DitAccelError, match=words):
            block_sparse_attention(q, k, v, plan_, pooled=wrong)
    fewer = PooledKeys(pooled.key[:, :3], pooled.value[:, :3], pooled.log_count[:, :3].contiguous())
    one = plan.pooled.count * 0 + 1
    lists = replace(plan.pooled, whole=one, full=one, count=one)
    lists.index[lists.start.long()] = 5
    plan = plan_of(plan.blocks, plan.visits, pooled=lists)
    with pytest.raises(
        DitAccelError, match=r"pooled.index: expected pooled keys in \[0, 3\), got 5"
    ):
        plan.validate(fewer)
    assert plan.validate() is plan.validate(pooled)
    assert eligible("torch", q, k, v, plan) is None
