"""Any head_dim runs on a CPU; GPU kernels pad what they hold in registers, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.backends import BACKENDS, choose, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention

Make = Callable[..., Any]
DIMS = (1, 3, 7, 8, 16, 17, 31, 33)


@pytest.mark.parametrize("dim", [*DIMS, 257, 320])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_any_head_dim(
    backend: str, dim: int, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan([65, 20], [64, 40], heads=2, partial=(1, 1, 1))
    q, k, v = qkv(85, 104, kv_heads=1, dim=dim)
    assert_right(
        block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True), q, k, v, mask
    )
    if not q.is_cuda:
        assert choose(q, k, v, plan) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
def test_the_portable_kernel_pads(
    dim: int, dtype: torch.dtype, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    """Memory behind each row is NaN: the padding is not read from there."""
    plan, mask = random_plan([33, 20], [40, 128], keep=0.6, partial=(2, 1, 1))
    q, k, v = qkv(53, 168, dim=dim, dtype=dtype)
    around = [torch.full((*x.shape[:-1], dim + 9), torch.nan, dtype=dtype) for x in (q, k, v)]
    q, k, v = (
        wide.to(x.device)[..., 4 : 4 + dim].copy_(x)
        for wide, x in zip(around, (q, k, v), strict=True)
    )
    assert_right(
        block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True), q, k, v, mask
    )


def test_what_declines_says_why(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([20], [20])
    for name, backend in BACKENDS.items():
        for dim in (8, 17, 264):
            reason = eligible(name, *qkv(20, dim=dim), plan)
            if backend.dims[1] is None or backend.dims[0] <= dim <= backend.dims[1]:
                assert "head_dim" not in str(reason) or name in ("hopper", "fa4")
            else:
                assert reason is not None and reason.startswith(f"head_dim {dim}: needs ")
