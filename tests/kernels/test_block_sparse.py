"""Every backend against dense attention in float64, over masks enumerated in the tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import TokenMask, plan_of
from dit_accel.layout import TokenLayout

CUDA = torch.cuda.is_available()
BACKENDS = ["triton", "torch", "reference"]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])
DIMS = [32, 64, 80, 96, 128, 192, 256]
# The interpreter runs one kernel for all types: there each dim is met with one of them.
DIMS_AND_TYPES = (
    list(itertools.product(DIMS, DTYPES)) if CUDA
    else list(zip(DIMS, itertools.cycle(DTYPES), strict=False))
)  # fmt: skip
EDGES = [1, 63, 64, 65, 127, 128, 129]
Make = Callable[..., Any]


def runs(length: int, block: int = 128) -> list[int]:
    """A length in blocks, all but the last one whole."""
    return [block] * (length // block) + [length % block] * (length % block > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", EDGES)
def test_ragged_lengths(
    backend: str, length: int, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan(runs(length), runs(130 - length // 2), keep=0.8, seed=length)
    q, k, v = qkv(length, 130 - length // 2, heads=1)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dim", "dtype"), DIMS_AND_TYPES, ids=str)
def test_head_dims_and_types(
    backend: str, dtype: torch.dtype, dim: int, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan([50, 128, 97], [128, 3, 128, 66], seed=dim)
    q, k, v = qkv(275, 325, heads=1, dim=dim, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "partial"),
    [
        (1, 1, (1, 2, 1)), (2, 1, (1, 2, 1)), (1, 4, (1, 2, 1)),
        (2, 4, None), (2, 4, (1, 2, 1)), (2, 4, (0, 0, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_lists_per_sample_and_head(
    backend: str,
    block: int,
    batch: int,
    heads: int,
    partial: tuple[int, int, int] | None,
    qkv: Make,
    random_plan: Make,
    assert_right: Make,
) -> None:
    plan, mask = random_plan(
        [33, 64, 20], [64, 17, 40], batch=batch, heads=heads, block=block, partial=partial
    )
    q, k, v = qkv(117, 121, batch=2, heads=4, kv_heads=2, dim=32)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_key_heads_and_scale(
    backend: str, kv_heads: int, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan([40, 30], [50, 31])
    q, k, v = qkv(70, 81, heads=4, kv_heads=kv_heads, dim=32)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, scale=0.3)
    assert_right(result, q, k, v, mask, 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_layouts(backend: str, qkv: Make, random_plan: Make, device: Any) -> None:
    plan, _ = random_plan([40, 128, 7], [128, 30, 17])
    q, k, v = qkv(175)
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    fused = torch.stack([q, k, v], 2)  # [B, S, 3, H, D], as fused projections leave it
    padded = torch.full((1, 175, 2, 100), torch.nan, device=device)
    padded[..., ::1][..., 4:68] = q
    apart = torch.full((1, 175, 2, 128), torch.nan, device=device)[..., ::2].copy_(v)
    head_major = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for inputs in (
        fused.unbind(2),
        (padded[..., 4:68], k, apart),
        [x.transpose(1, 2) for x in head_major],
    ):
        out = block_sparse_attention(*inputs, plan, backend=backend)
        assert (out - expected).abs().max() <= (0 if backend == "triton" else 2e-6)
    out, lse = block_sparse_attention(
        *head_major, plan, backend=backend, layout="bhsd", return_lse=True
    )
    assert (out.transpose(1, 2) - expected).abs().max() < 2e-6
    assert lse.shape == (1, 2, 175)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layout", "parameters"),
    [
        (TokenLayout((3, 5, 7), before=12, after=5, valid=((3, 5), (12, 0))), {}),
        (TokenLayout((7, 11, 13)), {"window": {"fraction": [0.5, 0.3, 0.3]}}),
        (TokenLayout((1, 13, 11), before=9), {"window": {"tokens": [1, 5, 5]}, "tile": [1, 2, 3]}),
        (TokenLayout((6, 1, 30), after=70, valid=((0, 0), (0, 65))), {"tile": [1, 1, 10]}),
    ],
    ids=str,
)
def test_sliding_tile(
    backend: str,
    layout: TokenLayout,
    parameters: dict,
    qkv: Make,
    sliding_mask: Make,
    assert_right: Make,
    device: torch.device,
) -> None:
    rule = SlidingTile(**parameters)
    parts = rule.tiling(layout, "lengths").parts
    window = [rule.window.tiles(a, layout.grid[a], len(parts[a])) for a in range(3)]
    mask = sliding_mask(parts, window, layout.before, layout.after, layout.valid)
    q, k, v = qkv(layout.length, batch=len(mask), heads=1, dim=32)
    plan = plan_for(layout, rule, device, layout_kind="lengths")
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_lists(
    backend: str, masked: bool, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    """Neither an empty list nor one whose token mask removes every pair leaves NaN behind."""
    q, k, v = qkv(160, 90, heads=1)
    plan, mask = random_plan([128, 32], [90], keep=float(masked))
    if masked:
        coords = (torch.zeros(n, 3, dtype=torch.int32, device=plan.device) for n in (160, 90))
        zeros = torch.zeros_like(plan.visits.count)
        lists = replace(plan.visits, whole=zeros, full=zeros)
        plan = plan_of(plan.blocks, lists, TokenMask("box", (-1, 0, 0), *coords)).validate()
    assert plan.kept_density() == 0
    nothing = torch.zeros_like(mask)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, nothing)
    assert (block_sparse_attention(q, k, v, plan, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_outside_every_block_are_zero(
    backend: str, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan([70, 58], [90], keep=1.1, shuffled=False)
    lengths = torch.tensor([[20, 0]], dtype=torch.int32, device=plan.device)
    q_blocks = replace(plan.blocks.q, lengths=lengths)
    plan = plan_of(replace(plan.blocks, q=q_blocks, covers=None), plan.visits)
    mask[:, :, 20:] = False
    q, k, v = qkv(128, 90, heads=1)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_same_bits_every_time(backend: str, qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([128, 100, 3], [77, 128, 26])
    q, k, v = qkv(231, dtype=torch.float16)
    first = block_sparse_attention(q, k, v, plan, backend=backend)
    assert torch.equal(block_sparse_attention(q, k, v, plan, backend=backend), first)


def test_bad_tensors(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([40], [50])
    q, k, v = qkv(40, 50, heads=4)
    three, _ = random_plan([40], [50], heads=3)
    for arguments, words in (
        ((q[:, 1:], k, v, plan), r"q: expected .*40.* got .*39"),
        ((q, k, v[..., :32], plan), "v: expected"),
        ((q, k[:, :, :3], v[:, :, :3], plan), "divide 4, got 3"),
        ((q, k.half(), v, plan), "k: expected torch.float32"),
        ((q[0], k, v, plan), "q: expected four dimensions"),
        ((q, k, v, three), "1 or 4 heads, got 3"),
        ((q, k, v, plan.to("meta")), "plan: expected it on .* like q, got meta"),
        ((q, k, v.to("meta"), plan), "v: expected torch.float32 on .* like q, got .* on meta"),
        ((q, k[:, 1:], v[:, 1:], plan), r"k: expected .*50.* got .*49"),
        ((q.double(), k.double(), v.double(), plan), "dtype"),
        ((None, k, v, plan), "q: expected a tensor, got None"),
        ((q, [1.0], v, plan), r"k: expected a tensor, got \[1.0\]"),
        ((q, k, None, plan), "v: expected a tensor, got None"),
        ((q, k, v, None), "plan: expected a BlockPlan, got None"),
        ((q, k, v, torch.ones(2)), "plan: expected a BlockPlan, got a tensor"),
    ):
        with pytest.raises(DitAccelError, match=words):
            block_sparse_attention(*arguments)
    with pytest.raises(DitAccelError, match="layout"):
        block_sparse_attention(q, k, v, plan, layout="sbhd")  # type: ignore[call-overload]
    with pytest.raises(DitAccelError, match="Did you mean 'triton'"):
        block_sparse_attention(q, k, v, plan, backend="tritn")
    for backend in (5, ["torch"]):
        with pytest.raises(DitAccelError, match="unknown backend"):
            block_sparse_attention(q, k, v, plan, backend=backend)  # type: ignore[call-overload]
    for scale in ("0.1", True, 1j, torch.tensor(0.1)):
        with pytest.raises(DitAccelError, match="scale: expected a number, got"):
            block_sparse_attention(q, k, v, plan, scale=scale)  # type: ignore[call-overload]


@pytest.mark.parametrize("scale", [0, -1, -0.25, np.float32(0.5)], ids=str)
def test_scales_of_any_real_number(
    scale: Any, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan([40], [50])
    q, k, v = qkv(40, 50, heads=1, dim=32)
    for backend in BACKENDS:
        result = block_sparse_attention(
            q, k, v, plan, scale=scale, backend=backend, return_lse=True
        )
        assert_right(result, q, k, v, mask, float(scale))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_batch_of_none(backend: str | None, qkv: Make, random_plan: Make) -> None:
    """As dense attention has it: no samples in, none out; tensors that do not fit stay errors."""
    plan, _ = random_plan([40], [50, 7])
    q, k, v = (x[:0] for x in qkv(40, 57, heads=4, kv_heads=2))
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (0, 4, 40) and lse.dtype == torch.float32
    head_major = [x.transpose(1, 2) for x in (q, k, v)]
    alone = block_sparse_attention(*head_major, plan, backend=backend, layout="bhsd")
    assert isinstance(alone, torch.Tensor) and alone.shape == (0, 4, 40, q.shape[-1])
    with pytest.raises(DitAccelError, match="v: expected"):
        block_sparse_attention(q, k, v[:, 1:], plan, backend=backend)


def test_full_equals_dense(qkv: Make, device: torch.device) -> None:
    layout = TokenLayout((2, 9, 9), before=30)
    q, k, v = qkv(layout.length, dim=96)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    for backend in BACKENDS:
        out = block_sparse_attention(
            q, k, v, plan_for(layout, pattern("full"), device), backend=backend
        )
        assert (out - dense).abs().max() < 3e-6
