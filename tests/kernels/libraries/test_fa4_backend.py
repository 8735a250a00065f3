"""flash-attn-4: its lists, read by a stand-in for its kernel (from the end, one seqlen mask)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from dit_accel.kernels.backends import AUTOMATIC, BACKENDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.libraries.fa4 import fa4_attention, fa4_missing, plan_obstacle, sparse_lists
from dit_accel.kernels.plan import plan_of

Make = Callable[..., Any]


class SparseTensors(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, pack_gqa: bool,
    block_sparse_tensors: SparseTensors, return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Key blocks past the sequence's end read zeros; only the block read first is masked there."""
    lists, group = block_sparse_tensors, q.shape[2] // k.shape[2]
    assert lists.block_size == (128, 128) and not pack_gqa
    assert int(lists.mask_block_cnt.sum()) == 0 and lists.full_block_cnt is not None
    assert {x.dtype for x in lists[:4]} == {torch.int32}
    rows, keys = -(-q.shape[1] // 128), -(-k.shape[1] // 128)
    assert lists.full_block_idx.shape[3] <= keys and lists.full_block_cnt.shape[2] == rows
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, keys * 128 - x.shape[1])) for x in (k, v)]
    out, lse = torch.zeros_like(q), torch.full((len(q), q.shape[2], q.shape[1]), -torch.inf)
    for b in range(len(q)):
        for h in range(q.shape[2]):
            at = tuple(
                min(x, n - 1) for x, n in zip((b, h), lists.full_block_cnt.shape, strict=False)
            )
            for m in range(rows):
                count = int(lists.full_block_cnt[at][m])
                scores, values = [], []
                for i in reversed(range(count)):
                    block = int(lists.full_block_idx[at][m, i])
                    some = slice(block * 128, block * 128 + 128)
                    key, value = (x[b, some, h // group].float() for x in padded)
                    s = q[b, m * 128 : m * 128 + 128, h].float() @ key.T * softmax_scale
                    if i == count - 1:
                        s[:, torch.arange(128) + block * 128 >= k.shape[1]] = -torch.inf
                    scores.append(s)
                    values.append(value)
                if count:
                    s = torch.cat(scores, -1)
                    out[b, m * 128 : m * 128 + 128, h] = (s.softmax(-1) @ torch.cat(values)).to(q)
                    lse[b, h, m * 128 : m * 128 + 128] = s.logsumexp(-1)
    return out, lse if return_lse else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, cute, sparsity = (
        ModuleType(name)
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity")
    )
    cute.flash_attn_func = attend  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = SparseTensors  # type: ignore[attr-defined]
    for module in (package, cute, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([128, 128], [128, 128, 128]), ([128, 31], [128, 128, 5]), ([7], [99])],
)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 4)])
def test_lists_as_the_kernel_reads_them(
    q_lengths: list[int],
    k_lengths: list[int],
    batch: int,
    heads: int,
    installed: None,
    qkv: Make,
    random_plan: Make,
    assert_right: Make,
) -> None:
    plan, mask = random_plan(
        q_lengths, k_lengths, batch=batch, heads=heads, keep=0.6, shuffled=False, seed=2
    )
    assert plan_obstacle(plan.shape) is None
    lists = replace(
        plan.visits, index=plan.visits.index.clone(), whole=torch.zeros_like(plan.visits.whole)
    )
    for place in torch.cartesian_prod(*map(torch.arange, lists.count.shape)).tolist():
        blocks, _ = lists.entries(*place)  # a view
        blocks.copy_(blocks.flip(0))
    backwards = plan_of(plan.blocks, lists)
    q, k, v = (
        x.cpu() for x in qkv(sum(q_lengths), sum(k_lengths), batch=2, heads=4, kv_heads=2, dim=64)
    )
    for given in (plan.to("cpu"), backwards.to("cpu")):
        out, lse = fa4_attention(q, k, v, given, 0.125, True)
        assert_right((out, lse), q, k, v, mask)
        assert fa4_attention(q, k, v, given, 0.125)[1] is None
    assert sparse_lists(plan) is sparse_lists(plan)


def test_reasons(random_plan: Make, random_pooled: Make, qkv: Make) -> None:
    for arguments, words in (
        (random_plan([128, 31], [128, 5], shuffled=True)[0], "not every 128 consecutive"),
        (random_plan([31, 128], [128, 5], shuffled=False)[0], "not every 128 consecutive"),
        (random_plan([128, 31], [5, 128], shuffled=False)[0], "not every 128 consecutive"),
        (random_plan([64, 31], [64, 5], shuffled=False, block=64)[0], "64 x 64: needs 128"),
        (random_plan([128], [128], shuffled=False, partial=(1, 1, 1), keep=0.0)[0], None),
        (random_plan([128] * 3, [128] * 3, shuffled=False, partial=(1, 1, 1))[0], "partial"),
        (random_pooled(random_plan([128], [128], shuffled=False)[0], 3)[0], "pooled"),
    ):
        reason = plan_obstacle(arguments.shape)
        assert reason is None if words is None else words in str(reason)
    assert "fa4" in BACKENDS and "fa4" not in AUTOMATIC
    if not torch.cuda.is_available():
        plan, _ = random_plan([128], [128])
        assert eligible("fa4", *qkv(128), plan) == fa4_missing() == "flash-attn-4 is not installed"


@pytest.mark.gpu
@pytest.mark.skipif(fa4_missing() is not None, reason=str(fa4_missing()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_on_a_gpu(
    dtype: torch.dtype, dim: int, kv_heads: int, qkv: Make, random_plan: Make, assert_right: Make
) -> None:
    plan, mask = random_plan(
        [128] * 3 + [40], [128] * 5 + [77], batch=2, heads=4, keep=0.3, shuffled=False
    )
    q, k, v = qkv(424, 717, batch=2, heads=4, kv_heads=kv_heads, dim=dim, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend="fa4", return_lse=True)
    assert_right(result, q, k, v, mask)
