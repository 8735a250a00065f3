"""Means of blocks, in torch and in Triton, against a loop over the blocks in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.plan import Visits, plan_of
from dit_accel.kernels.pooling import pool_blocks, pool_queries_and_keys, pooled_keys
from dit_accel.kernels.portable.pooling import pool_pair
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def naive(x: torch.Tensor, table: BlockTable) -> torch.Tensor:
    order = torch.arange(x.shape[1]) if table.order is None else table.order.cpu().long()
    means = torch.zeros(len(x), table.count, *x.shape[2:], dtype=torch.float64)
    for b in range(len(x)):
        lengths = table.lengths[b if len(table.lengths) > 1 else 0].tolist()
        for i, (start, n) in enumerate(zip(table.starts.tolist(), lengths, strict=True)):
            if n:
                means[b, i] = x[b].cpu().double()[order[start : start + n]].mean(0)
    return means


def table(lengths: list[int], shuffled: bool, device: torch.device, samples: int = 1) -> BlockTable:
    sizes = torch.tensor(lengths, dtype=torch.int32)
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(1)).int()
    rows = torch.stack([(sizes - 5 * s).clamp_min(0) for s in range(samples)])
    starts = (sizes.cumsum(0) - sizes).int()
    return BlockTable(order if shuffled else None, starts, rows).to(device)


def in_triton(x: torch.Tensor, blocks: BlockTable, block: int, dtype: torch.dtype) -> torch.Tensor:
    fields = (blocks.order, blocks.starts, blocks.lengths, block)
    none = (x[:0], *fields)
    return pool_pair(x, *fields, *none, dtype)[0]


@pytest.mark.parametrize("way", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dim", "block", "dtype", "shuffled"),
    [
        (32, 64, torch.float32, False),
        (80, 128, torch.float16, True),
        (128, 128, torch.float32, True),
        (192, 128, torch.float16, False),
    ],
)
def test_ragged_blocks(
    way: str, shuffled: bool, dim: int, block: int, dtype: torch.dtype, qkv: Make, device: Any
) -> None:
    blocks = table([block, 1, block - 1, 7, 5], shuffled, device, samples=2)
    x = qkv(2 * block + 12, batch=2, heads=3, kv_heads=3, dim=dim, dtype=dtype)[0]
    pool = in_triton if way == "triton" else pool_blocks
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        out = pool(given, blocks, block, dtype)
        assert out.dtype == dtype and out.shape == (2, 5, 3, dim) and out.is_contiguous()
        assert (out.cpu() - naive(x, blocks)).abs().max() <= TOLERANCE[dtype]
        assert (out[1, 1] == 0).all()  # the second sample has no token there


def test_both_in_one_launch(qkv: Make, device: torch.device) -> None:
    """q and k differ in heads, lengths, order and block size."""
    first, second = table([128, 60, 3], True, device), table([64, 64, 9, 33], False, device)
    q, k, _ = qkv(191, 170, batch=2, heads=4, kv_heads=2)
    means = pool_pair(
        q, first.order, first.starts, first.lengths, 128,
        k, second.order, second.starts, second.lengths, 64, torch.float32,
    )  # fmt: skip
    for x, blocks, mean in ((q, first, means[0]), (k, second, means[1])):
        assert (mean.cpu() - naive(x, blocks)).abs().max() <= 1e-6


def test_of_a_plan(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([128, 31], [128, 128, 40], block=128)
    q, k, v = qkv(159, 296, heads=4, kv_heads=2)
    means = pool_queries_and_keys(q, k, plan.blocks)
    assert (means[0].cpu() - naive(q, plan.blocks.q)).abs().max() <= 1e-6
    assert (means[1].cpu() - naive(k, plan.blocks.k)).abs().max() <= 1e-6
    pooled = pooled_keys(k, v, plan.blocks.k)
    assert torch.equal(pooled.key, means[1])
    assert (pooled.value.cpu() - naive(v, plan.blocks.k)).abs().max() <= 1e-6
    assert pooled.log_count.tolist() == [pytest.approx([4.852, 4.852, 3.689], abs=1e-3)]


def test_chunks_change_nothing(qkv: Make, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = table([60, 64, 64, 20], True, device)
    x = qkv(208)[0].cpu()
    expected = pool_blocks(x, blocks.to("cpu"), 64)
    monkeypatch.setattr("dit_accel.kernels.pooling._CHUNK", 1)
    assert torch.equal(pool_blocks(x, blocks.to("cpu"), 64), expected)


def test_blocks_of_equal_tokens_pool_exactly(qkv: Make, device: torch.device) -> None:
    """Where all tokens of a block are equal, attention to its pooled key is exact."""
    layout = TokenLayout((4, 16, 16))
    plan = plan_for(layout, pattern("full"), device)
    lengths = plan.blocks.k.lengths[0].tolist()
    q, k, v = qkv(layout.length)
    for x in (k, v):
        rows = torch.randn(len(lengths), *x.shape[2:], device=device)
        tokens = rows.repeat_interleave(torch.tensor(lengths, device=device), 0)
        order = plan.blocks.k.order
        x[0, slice(None) if order is None else order.long()] = tokens
    expected = block_sparse_attention(q, k, v, plan, backend="reference")
    zeros = torch.zeros_like(plan.visits.count)
    every, index = zeros + len(lengths), torch.arange(len(lengths), device=device).int()
    none = replace(plan.visits, whole=zeros, full=zeros, count=zeros)
    only = plan_of(plan.blocks, none, pooled=Visits(zeros, every, every, every, index))
    pooled = pooled_keys(k, v, plan.blocks.k)
    for backend in ("triton", "torch"):
        out = block_sparse_attention(q, k, v, only, backend=backend, pooled=pooled)
        assert (out - expected).abs().max() < 5e-6


def test_opcheck(qkv: Make, device: torch.device) -> None:
    q, k, _ = qkv(60, 70, heads=4, kv_heads=2, dim=32)
    first, second = table([40, 20], True, device), table([64, 6], False, device)
    arguments = (
        q, first.order, first.starts, first.lengths, 64,
        k, second.order, second.starts, second.lengths, 64, torch.float16,
    )  # fmt: skip
    torch.library.opcheck(pool_pair, arguments)


def test_other_number_of_tokens(qkv: Make, device: torch.device) -> None:
    with pytest.raises(DitAccelError, match="expected 60 tokens like the table's order, got 61"):
        pool_blocks(qkv(61)[0], table([40, 20], True, device))
