"""On a GPU only: real shapes in every type, tensors past 2^31 elements, agreement of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.backends import BACKENDS
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.launching import launches_of
from dit_accel.kernels.parts import merge
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.permute import gather
from dit_accel.kernels.plan import BlockPlan, ListKinds, shape_of, visits_from_mask
from dit_accel.kernels.pooling import pool_blocks, pool_queries_and_keys
from dit_accel.kernels.portable import forward
from dit_accel.kernels.portable.steps import machine_of
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., Any]
# float32: rounding of sums over thousands of keys (the torch backend reaches 4e-6 too).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = [
    TokenLayout((9, 24, 24)),
    TokenLayout((5, 30, 45), before=226),
    TokenLayout((1, 64, 64), before=512),
    TokenLayout((7, 20, 31), after=256, valid=((0, 256), (0, 77))),
]


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 out [B, L, H, D] and LSE [B, H, L], one sample and head at a time."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64, device=q.device), []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            kv = h * k.shape[2] // q.shape[2]
            scores = q[b, :, h].double() @ k[b, :, kv].double().T * q.shape[-1] ** -0.5
            scores.masked_fill_(~mask[min(b, len(mask) - 1), 0], -torch.inf)
            out[b, :, h] = scores.softmax(-1) @ v[b, :, kv].double()
            lse.append(scores.logsumexp(-1))
    return out, torch.stack(lse).view(q.shape[0], q.shape[2], -1)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_real_shapes(
    backend: str, dtype: torch.dtype, dim: int, layout: TokenLayout, qkv: Make, device: Any
) -> None:
    batch = len(layout.valid or (0,))
    q, k, v = qkv(layout.length, batch=batch, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    for rule in (pattern("full"), SlidingTile({"fraction": [0.6, 0.4, 0.4]})):
        plan = plan_for(layout, rule, device).validate()
        out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        truth, truth_lse = expected(q, k, v, dense_mask(plan, batch, 1))
        assert (out - truth).abs().max() / truth.abs().max() <= TOLERANCE[dtype]
        assert (lse - truth_lse).abs().max() <= 1e-3
        again, lse_again = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_partial_blocks(
    block: int, dtype: torch.dtype, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    lengths = [block, block - 1, 3, block // 2] * 3
    plan, mask = random_plan(lengths, lengths[::-1], heads=2, block=block, partial=(2, 1, 2))
    q, k, v = qkv(sum(lengths), dim=128, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize("shuffled", [False, True])
def test_pooled_keys(
    dtype: torch.dtype, dim: int, shuffled: bool, qkv: Make, random_plan: Make,
    random_pooled: Make, assert_right: Make,
) -> None:  # fmt: skip
    plan, mask = random_plan(
        [128] * 5 + [9], [128] * 6 + [77], batch=2, heads=4, keep=0.3, shuffled=shuffled
    )
    sizes = {"batch": 2, "kv_heads": 2, "dim": dim, "dtype": dtype}
    plan, pooled, seen = random_pooled(plan, 200, shared_counts=False, **sizes)
    q, k, v = qkv(649, 845, heads=4, **sizes)
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True, pooled=pooled)
    bias = torch.cat([torch.zeros(2, 845, device=q.device), pooled.log_count], -1)
    k, v = torch.cat([k, pooled.key], 1), torch.cat([v, pooled.value], 1)
    assert_right(result, q, k, v, torch.cat([mask, seen], -1), bias=bias)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("head_major", [False, True])
def test_boxes_and_pointers(
    block: int, dim: int, head_major: bool, qkv: Make, random_plan: Make, assert_right: Make,
    monkeypatch: pytest.MonkeyPatch, device: torch.device,
) -> None:  # fmt: skip
    """Blocks in place come by TMA where there is one; the results are those of plain loads."""
    if not machine_of(device).tma:
        pytest.skip("no TMA")
    lengths = [block] * 7 + [block - 5]
    plan, mask = random_plan(lengths, lengths, batch=2, heads=4, block=block, shuffled=False)
    q, k, v = qkv(sum(lengths), batch=2, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16)
    if head_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    calls = []
    real = forward.describe
    monkeypatch.setattr(forward, "describe", lambda *a: calls.append(a) or real(*a))
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert len(calls) == 2
    assert_right(result, q, k, v, mask)
    monkeypatch.setattr(forward, "boxable", lambda x: False)
    launches_of(plan).clear()  # or the same launch would be made again
    plain = block_sparse_attention(q, k, v, plan, backend="triton")
    assert len(calls) == 2
    assert (result[0] - plain).abs().max() <= 2e-2


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_plan_made_on_the_gpu_waits_for_nothing(
    backend: str, qkv: Make, device: torch.device
) -> None:
    """From visible pairs to the output without reading anything back, and inside a CUDA graph."""
    if (missing := BACKENDS[backend].machine()) is not None:
        pytest.skip(missing)
    q, k, v = qkv(1024, heads=4, dtype=torch.bfloat16)
    tables = BlockTable(
        None,
        torch.arange(0, 1024, 128, dtype=torch.int32, device=device),
        torch.full((1, 8), 128, dtype=torch.int32, device=device),
    )

    blocks = Blocks(tables, tables, 1024, 1024, video_blocks=8, covers=True)
    shape = shape_of(
        blocks, batch=1, heads=4, kinds=ListKinds(True, False, False), most=8, entries=4 * 64,
        visits=4.0, online=True,
    )  # fmt: skip

    def call() -> torch.Tensor:
        means = pool_queries_and_keys(q, k, blocks)
        visible = torch.einsum("bqhd,bkhd->bhqk", *means) > 0
        lists = visits_from_mask(visible, tables.lengths == 128, width=8)
        return block_sparse_attention(q, k, v, BlockPlan(blocks, lists, shape), backend=backend)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, out)


def test_token_kernels_past_2_31_elements(device: torch.device) -> None:
    """Pooling, permuting and merging tensors of 2.2e9 elements."""
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    length, heads, dim = 33024, 512, 128
    x = torch.zeros(1, length, heads, dim, dtype=torch.float16, device=device)
    last = torch.randn(length, dim, device=device).half()
    x[0, :, -1] = last
    assert x.numel() > 1 << 31
    starts = torch.arange(0, length, 128, dtype=torch.int32, device=device)
    table = BlockTable(None, starts, torch.full_like(starts, 128)[None])
    means = pool_blocks(x, table)
    assert (means[0, :, -1] - last.float().unflatten(0, (-1, 128)).mean(1)).abs().max() < 1e-3
    assert (means[0, :, :-1] == 0).all()
    back = torch.arange(length - 1, -1, -1, dtype=torch.int32, device=device)
    (turned,) = gather([x], back)
    assert torch.equal(turned[0, :, -1], last.flip(0))
    lse = torch.zeros(1, heads, length, device=device)
    out, _ = merge(x, lse, turned, lse)
    assert (out[0, :, -1] - (last + last.flip(0)) / 2).abs().max() < 1e-2


def kept_keys(plan: BlockPlan, block: int) -> torch.Tensor:
    """Raster tokens that query block number `block` visits."""
    keys = plan.visits.entries(0, 0, block)[0].tolist()
    table = plan.blocks.k
    order, starts, lengths = table.order, table.starts, table.lengths[0]
    assert order is not None
    return torch.cat([order[starts[j] : starts[j] + lengths[j]] for j in keys]).long()


def test_more_than_2_31_elements(device: torch.device) -> None:
    """Offsets are 64 bit: queries, keys and output of 2.4e9 elements each."""
    layout, heads, dim = TokenLayout((21, 90, 80)), 128, 128
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, layout.length, heads, dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    assert q.numel() > 1 << 31
    plan = plan_for(layout, SlidingTile({"fraction": [0.2, 0.2, 0.2]}), device)
    out = block_sparse_attention(q, k, v, plan, backend="triton")
    table = plan.blocks.q
    assert table.order is not None
    for block in (0, table.count // 2, table.count - 1):
        start, length = int(table.starts[block]), int(table.lengths[0, block])
        rows, keys = table.order[start : start + length].long(), kept_keys(plan, block)
        for head in (0, heads - 1):
            scores = q[0, rows, head].double() @ k[0, keys, head].double().T * dim**-0.5
            truth = scores.softmax(-1) @ v[0, keys, head].double()
            error = (out[0, rows, head] - truth).abs().max() / truth.abs().max()
            assert error <= TOLERANCE[torch.bfloat16]
