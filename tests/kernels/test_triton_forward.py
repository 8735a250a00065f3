"""The portable Triton kernel: the custom op's contract, and that it writes only its own rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels import triton_forward
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.triton_forward import Config, block_sparse_forward, pick_config

Make = Callable[..., Any]


def op_arguments(plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
    """What `triton_attention` hands to the custom op."""
    seen: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(arguments)
        return torch.zeros_like(q), torch.zeros(())

    original = triton_forward.block_sparse_forward
    triton_forward.block_sparse_forward = record  # type: ignore[assignment]
    try:
        triton_forward.triton_attention(q, k, v, plan, 0.125)
    finally:
        triton_forward.block_sparse_forward = original
    return seen[0]


@pytest.mark.parametrize("partial", [None, (1, 1, 1)], ids=str)
def test_opcheck(partial: tuple[int, int, int] | None, qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([33, 20], [30, 9], partial=partial)
    q, k, v = qkv(53, 39, dim=32)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    for query in (q, head_major):
        torch.library.opcheck(block_sparse_forward, op_arguments(plan, query, k, v))


def test_compiles_without_graph_breaks(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([33, 20], [30, 9])
    q, k, v = qkv(53, 39, dim=32)
    arguments = op_arguments(plan, q, k, v)

    def twice(query: torch.Tensor) -> torch.Tensor:
        return block_sparse_forward(query, *arguments[1:])[0] * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), twice(q))


@pytest.mark.parametrize("dim", [64, 80])
def test_neighbours_bytes_stay(
    dim: int, qkv: Make, random_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and LSE lie inside larger memory of sentinels: not one of them changes."""
    plan, _ = random_plan([65, 127, 1, 20], [64, 40], keep=0.8)
    q, k, v = qkv(213, 104, dim=dim)
    expected = block_sparse_attention(q, k, v, plan, backend="triton", scale=0.125)
    guards: list[torch.Tensor] = []

    def guarded(like: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        outer = [n + 7 for n in like.shape]
        guards.append(torch.full(outer, 7.0, dtype=like.dtype, device=like.device))
        return guards[-1][tuple(slice(3, 3 + n) for n in like.shape)]

    monkeypatch.setattr(torch, "empty_like", guarded)
    arguments = op_arguments(plan, q, k, v)
    out, _ = triton_forward.block_sparse_forward._init_fn(*arguments)
    assert torch.equal(out, expected)
    (memory,) = guards
    memory[tuple(slice(3, 3 + n) for n in q.shape)] = 7.0
    assert (memory == 7.0).all()


@pytest.mark.parametrize(
    "config",
    [Config(32, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(128, 128, 4, 1)],
)
def test_steps_smaller_than_blocks(
    config: Config,
    qkv: Make,
    random_plan: Make,
    assert_right: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_forward, "pick_config", lambda *_: config)
    plan, mask = random_plan([128, 31, 65], [128, 33, 90], keep=0.7, partial=(1, 2, 2))
    # float16: on a GPU the largest of these steps would take minutes to compile in float32.
    q, k, v = qkv(224, 251, heads=1, dtype=torch.float16)
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("shared", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("block", [64, 128])
def test_configurations_fit(shared: int, itemsize: int, dim: int, block: int) -> None:
    config = pick_config(dim, itemsize, (block, block), shared)
    assert config.shared_bytes(dim, itemsize) <= shared
    assert block % config.block_m == 0 and block % config.block_n == 0
    assert config.warps in (4, 8) and config.stages in (1, 2, 3)
