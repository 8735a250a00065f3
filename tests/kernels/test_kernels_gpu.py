"""On a GPU only: real shapes in every type, tensors past 2^31 elements, agreement of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import BlockPlan
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


def kept_keys(plan: BlockPlan, block: int) -> torch.Tensor:
    """Raster tokens that query block number `block` visits."""
    keys = plan.full_index[0, 0, block, : plan.full_count[0, 0, block]].tolist()
    order, starts, lengths = plan.k_blocks.order, plan.k_blocks.starts, plan.k_blocks.lengths[0]
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
    table = plan.q_blocks
    assert table.order is not None
    for block in (0, table.count // 2, table.count - 1):
        start, length = int(table.starts[block]), int(table.lengths[0, block])
        rows, keys = table.order[start : start + length].long(), kept_keys(plan, block)
        for head in (0, heads - 1):
            scores = q[0, rows, head].double() @ k[0, keys, head].double().T * dim**-0.5
            truth = scores.softmax(-1) @ v[0, keys, head].double()
            error = (out[0, rows, head] - truth).abs().max() / truth.abs().max()
            assert error <= TOLERANCE[torch.bfloat16]
