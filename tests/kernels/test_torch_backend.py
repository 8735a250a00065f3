"""The torch backend's grouping: what is merged, what is a view, how much is gathered at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels import torch_backend
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.torch_backend import _buckets, _chunks
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]


def test_full_attention_gathers_nothing() -> None:
    (bucket,) = _buckets(plan_for(TokenLayout((3, 9, 8), before=7), pattern("full"), "cpu"))
    assert bucket.queries == slice(0, 223) and bucket.keys == slice(0, 223)


def test_queries_with_the_same_keys_share_one_call() -> None:
    plan = plan_for(TokenLayout((9, 24, 24)), SlidingTile({"fraction": [1.0, 0.5, 0.5]}), "cpu")
    buckets = _buckets(plan)
    assert sum(bucket.groups for bucket in buckets) == 16 < plan.shape.q_blocks
    assert sum(bucket.groups * bucket.n_queries for bucket in buckets) == 5184


def test_text_rows_read_keys_in_place() -> None:
    layout = TokenLayout((3, 16, 16), after=40, valid=((0, 40), (0, 11)))
    plan = plan_for(layout, SlidingTile({"fraction": [1.0, 0.4, 0.4]}), "cpu")
    text = [b for b in _buckets(plan) if b.queries == slice(768, 808)]
    assert [b.keys for b in text] == [slice(0, 808), slice(0, 779)]


@pytest.mark.parametrize("limit", [1, 1 << 15, 1 << 30])
def test_chunks_stay_within_the_limit(
    limit: int, qkv: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(TokenLayout((5, 12, 12)), SlidingTile({"tiles": [3, 3, 3]}), "cpu")
    q, k, v = (x.cpu() for x in qkv(720, dim=32))
    expected = block_sparse_attention(q, k, v, plan, backend="reference")
    monkeypatch.setattr(torch_backend, "CPU_CHUNK_BYTES", limit)
    for bucket in _buckets(plan):
        for part in _chunks(bucket, k, limit):
            gathered = 2 * part.groups * part.n_keys * 2 * 32 * 4
            assert part.groups == 1 or gathered <= limit
    out = block_sparse_attention(q, k, v, plan, backend="torch")
    assert (out - expected).abs().max() < 2e-6


def test_memory_is_a_small_multiple(qkv: Make) -> None:
    """The largest single allocation stays far below Lq x Lk scores.

    F.sdpa itself takes less than a MiB for each thread.
    """
    plan = plan_for(TokenLayout((9, 24, 24)), SlidingTile({"fraction": [1.0, 0.5, 0.5]}), "cpu")
    q, k, v = (x.cpu() for x in qkv(5184, heads=1, dim=32))
    with torch.profiler.profile(profile_memory=True) as profile:
        block_sparse_attention(q, k, v, plan, backend="torch")
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= max(4 * q.nbytes, torch.get_num_threads() << 20) < 5184**2
