"""The Hopper kernel on its GPU: boxes and runs, ragged edges, gathered blocks, token rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dit_accel.kernels.backends import BACKENDS
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.hopper import launch
from dit_accel.kernels.hopper.launch import hopper_forward
from dit_accel.kernels.hopper.lists import work_lists
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import TokenMask, plan_of, visits_from_mask
from dit_accel.kernels.pooling import pooled_keys
from dit_accel.kernels.reference import dense_mask, reference_attention
from dit_accel.layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        BACKENDS["hopper"].machine() is not None, reason=str(BACKENDS["hopper"].machine())
    ),
]
Make = Callable[..., Any]
TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
DIMS = pytest.mark.parametrize("dim", [64, 128])
LENGTHS = [
    [128],
    [1],
    [63],
    [64],
    [65],
    [127],
    [129 - 128, 128],
    [128, 128, 40],
    [17, 128, 65, 1, 127, 128, 33, 64],
    [128] * 9,
]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, so that each has several query blocks, one after the other."""
    monkeypatch.setattr(launch, "processors", lambda device: 3)


@TYPES
@DIMS
@pytest.mark.parametrize("block_k", [128, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_runs(
    lengths: list[int], block_k: int, dim: int, dtype: torch.dtype, qkv: Make, assert_right: Make,
    runs_plan: Make,
) -> None:  # fmt: skip
    k_lengths = [min(n, block_k) for n in reversed(lengths)] + [block_k, 5]
    plan, mask = runs_plan(lengths, k_lengths, heads=4, batch=2, block_k=block_k)
    q, k, v = qkv(sum(lengths), sum(k_lengths), batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, mask)


@DIMS
def test_empty_lists_and_uncovered_rows(
    dim: int, qkv: Make, assert_right: Make, runs_plan: Make
) -> None:
    plan, mask = runs_plan([128, 70, 128], [128, 30, 128], heads=2, keep=0.3, seed=3)
    for count in (plan.visits.whole, plan.visits.full, plan.visits.count):
        count[:, :, 0] = 0
    plan = plan_of(plan.blocks, plan.visits)
    mask[:, :, :128] = False
    q, k, v = qkv(326, 286, dim=dim, dtype=torch.float16)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, mask)


LAYOUTS = [
    TokenLayout((4, 16, 16)),
    TokenLayout((3, 13, 20)),
    TokenLayout((1, 7, 5)),
    TokenLayout((5, 11, 9), before=130),
    TokenLayout((5, 11, 9), after=77, valid=((0, 77), (0, 3))),
    TokenLayout((3, 9, 17), before=20, after=300, valid=((7, 300), (20, 0))),
]


@pytest.mark.parametrize(
    ("tile", "dim", "dtype", "head_major"),
    [
        ((2, 8, 8), 128, torch.bfloat16, False),
        ((2, 8, 8), 64, torch.float16, True),
        ((1, 8, 16), 128, torch.float16, False),
        ((4, 4, 8), 64, torch.bfloat16, False),
        ((1, 1, 128), 128, torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_boxes(
    layout: TokenLayout, tile: Any, head_major: bool, dim: int, dtype: torch.dtype, qkv: Make,
    device: torch.device, assert_right: Make,
) -> None:  # fmt: skip
    batch = len(layout.valid or (0,))
    rule = SlidingTile({"tiles": [1, 3, 1]}, list(tile))
    plan = rule.build(layout, device, layout_kind="boxes").validate()
    q, k, v = qkv(layout.length, batch=batch, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    if head_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, dense_mask(plan, batch, 1))


@TYPES
@DIMS
@pytest.mark.parametrize("layout", LAYOUTS[:2] + LAYOUTS[4:], ids=str)
def test_token_rule(
    layout: TokenLayout, dim: int, dtype: torch.dtype, qkv: Make, device: torch.device,
    assert_right: Make,
) -> None:  # fmt: skip
    """Every second video block of a list goes under a token rule."""
    batch = len(layout.valid or (0,))
    plan = SlidingTile({"tiles": [3, 3, 3]}, [2, 8, 8]).build(layout, device, layout_kind="boxes")
    blocks, every = plan.blocks, plan.shape.k_blocks
    assert blocks.k.origins is not None
    video = blocks.k.origins[:, 0] >= 0
    index, listed = plan.visits.rows()
    visible = torch.zeros(*index.shape[:3], every + 1, dtype=torch.bool, device=device)
    visible = visible.scatter_(-1, torch.where(listed, index, every).long(), True)[..., :every]
    odd = torch.arange(every, device=device) % 2 == 1
    moved = visible & video[:, None] & video & odd
    coords = torch.cartesian_prod(*(torch.arange(n) for n in layout.grid)).int()
    coords = torch.cat(
        [torch.zeros(layout.before, 3), coords, torch.zeros(layout.after, 3)]
    ).int().to(device)  # fmt: skip
    lists = visits_from_mask(visible & ~moved, (blocks.k.lengths == 128), moved)
    plan = plan_of(blocks, lists, TokenMask("box", (1, 5, 6), coords, coords)).validate()
    q, k, v = qkv(layout.length, batch=batch, heads=2, dim=dim, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, dense_mask(plan, batch, 1))


@DIMS
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_of_any_tokens(
    lengths: list[int], dim: int, qkv: Make, assert_right: Make, random_plan: Make
) -> None:
    """Blocks that are neither boxes nor runs: their tokens are moved."""
    plan, mask = random_plan(lengths, [*reversed(lengths), 5], batch=2, heads=4)
    q, k, v = qkv(
        sum(lengths), sum(lengths) + 5, batch=2, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16
    )
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, mask)


POOLED = pytest.mark.parametrize("count", [1, 63, 64, 130])


@TYPES
@DIMS
@POOLED
@pytest.mark.parametrize("block_k", [128, 64])
def test_pooled_keys_beside_runs(
    count: int, block_k: int, dim: int, dtype: torch.dtype, qkv: Make, assert_right: Make,
    runs_plan: Make, random_pooled: Make, beside_pooled: Make,
) -> None:  # fmt: skip
    """Lists per sample and head; half of them are empty, of blocks or of pooled keys."""
    lengths, k_lengths = [17, 128, 65, 1, 127, 33], [block_k, 40, block_k, 5]
    plan, mask = runs_plan(lengths, k_lengths, heads=4, batch=2, block_k=block_k, keep=0.2)
    plan, pooled, seen = random_pooled(
        plan, count, batch=2, dim=dim, dtype=dtype, keep=min(0.4, 8 / count), shared_counts=False
    )
    q, k, v = qkv(sum(lengths), sum(k_lengths), batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    call = {"backend": "hopper", "pooled": pooled}
    result = block_sparse_attention(q, k, v, plan, return_lse=True, **call)
    assert torch.equal(block_sparse_attention(q, k, v, plan, **call), result[0])
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, bias=bias)


@DIMS
@POOLED
def test_pooled_keys_beside_blocks_of_any_tokens(
    count: int, dim: int, qkv: Make, assert_right: Make, random_plan: Make, random_pooled: Make,
    beside_pooled: Make,
) -> None:  # fmt: skip
    plan, mask = random_plan([50, 128, 97], [128, 3, 66], batch=2, heads=4, keep=0.4)
    plan, pooled, seen = random_pooled(plan, count, batch=2, dim=dim, dtype=torch.bfloat16)
    q, k, v = qkv(275, 197, batch=2, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16)
    result = block_sparse_attention(
        q, k, v, plan, backend="hopper", return_lse=True, pooled=pooled, scale=-0.1
    )
    k, v, mask, bias = beside_pooled(k, v, mask, pooled, seen)
    assert_right(result, q, k, v, mask, -0.1, bias)


@TYPES
@DIMS
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pooled_keys_beside_boxes(
    layout: TokenLayout, exact: bool, dim: int, dtype: torch.dtype, qkv: Make,
    device: torch.device, assert_right: Make, random_pooled: Make, beside_pooled: Make,
) -> None:  # fmt: skip
    """With and without a token rule, and text whose length differs by sample."""
    batch = len(layout.valid or (0,))
    rule = pattern("neighborhood", window={"tokens": [3, 5, 7]}, tile=[2, 8, 8], exact=exact)
    plan = rule.build(layout, device, layout_kind="boxes")
    mask = dense_mask(plan, batch, 1)
    plan, pooled, seen = random_pooled(plan, 40, batch=batch, dim=dim, dtype=dtype)
    q, k, v = qkv(layout.length, batch=batch, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True, pooled=pooled)
    k, v, mask, bias = beside_pooled(k, v, mask.cpu(), pooled, seen)
    assert_right(result, q, k, v, mask, bias=bias)


def test_pooled_keys_of_the_blocks_not_visited(
    qkv: Make, device: torch.device, assert_right: Make
) -> None:
    """What a selector makes: each list's other blocks enter as their means; no wait for the GPU."""
    layout = TokenLayout((8, 16, 16), after=60)
    plan = plan_for(layout, pattern("sliding_tile", tile=[2, 8, 8]), device, layout_kind="boxes")
    every = plan.shape.k_blocks
    index, entries = plan.visits.rows()
    listed = torch.zeros(*index.shape[:3], every + 1, device=device)
    others = listed.scatter(-1, torch.where(entries, index, every).long(), 1.0)[..., :-1] == 0
    others = visits_from_mask(others, torch.ones_like(others[:, 0, 0]), width=every)
    plan = plan_of(plan.blocks, plan.visits, pooled=others)
    q, k, v = qkv(layout.length, heads=4, dim=128, dtype=torch.bfloat16)
    pooled = pooled_keys(k, v, plan.blocks.k)
    plan.validate(pooled)
    call = {"backend": "hopper", "pooled": pooled}
    first = block_sparse_attention(q, k, v, plan, return_lse=True, **call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = block_sparse_attention(q, k, v, replace(plan), return_lse=True, **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wanted = reference_attention(q, k, v, plan, 128**-0.5, True, pooled)
    assert wanted[1] is not None and (first[1] - wanted[1]).abs().max() <= 2e-4
    apart = (first[0].float() - wanted[0].float()).abs().max()
    assert apart <= 1.6e-2 * wanted[0].float().abs().max()


def test_slices_of_fused_projections(qkv: Make, device: torch.device, assert_right: Make) -> None:
    layout = TokenLayout((3, 13, 20))
    plan = plan_for(layout, pattern("sliding_tile", tile=[2, 8, 8]), device, layout_kind="boxes")
    fused = torch.randn(1, layout.length, 3, 2, 128, device=device).bfloat16()
    q, k, v = fused.unbind(2)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, dense_mask(plan, 1, 1))


def test_neighbours_bytes_stay(qkv: Make, runs_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output lies inside larger memory of sentinels: not one of them changes."""
    plan, _ = runs_plan([65, 127, 1, 128, 20], [64, 40], heads=2, keep=1.1)
    q, k, v = qkv(341, 104, dim=128, dtype=torch.bfloat16)
    expected = block_sparse_attention(q, k, v, plan, backend="hopper")
    memory = torch.full((1, 341 + 256, 2, 128), 7.0, dtype=q.dtype, device=q.device)
    monkeypatch.setattr(torch, "empty_like", lambda *_: memory[:, 128:-128])
    out = block_sparse_attention(q, k, v, plan, backend="hopper")
    assert torch.equal(out, expected)
    memory[:, 128:-128] = 7.0
    assert (memory == 7.0).all()


def test_nan_and_inf_end(qkv: Make, runs_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in their rows and columns, those of the program's next block as well."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    plan, mask = runs_plan([128, 128], [128, 128], heads=1, keep=1.1)
    q, k, v = qkv(256, heads=1, dim=128, dtype=torch.bfloat16)
    q[0, 3] = torch.nan
    v[0, 200, 0, 5] = torch.inf
    out = block_sparse_attention(q, k, v, plan, backend="hopper")
    assert out[0, 3].isnan().all() and out[0, 4, 0, :5].isfinite().all()
    assert out[0, 4:, 0, 5].isinf().all() and out[0, 128:, 0, :5].isfinite().all()


def test_same_bits(qkv: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From call to call, and however many programs share the work."""
    layout = TokenLayout((9, 24, 24), after=50)
    plan = plan_for(layout, pattern("sliding_tile", tile=[2, 8, 8]), device, layout_kind="boxes")
    q, k, v = qkv(layout.length, heads=6, dim=128, dtype=torch.bfloat16)
    first = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    for programs in (3, 1, 50, 132):
        monkeypatch.setattr(launch, "processors", lambda device, n=programs: n)
        again = block_sparse_attention(q, k, v, replace(plan), backend="hopper", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("block_k", [128, 64])
def test_online_runs(block_k: int, qkv: Make, runs_plan: Make) -> None:
    """The same bits as the static plan's: lists per sample and head, some empty."""
    plan, _ = runs_plan(
        [128, 17, 128, 65], [block_k, 3, block_k, block_k, 20], batch=2, heads=4, block_k=block_k,
        keep=0.3,
    )  # fmt: skip
    q, k, v = qkv(338, 3 * block_k + 23, batch=2, heads=4, dim=128, dtype=torch.bfloat16)
    check_online(plan, q, k, v)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS[3:], ids=str)
def test_online_tiles(
    layout: TokenLayout, kind: Any, exact: bool, qkv: Make, device: torch.device
) -> None:
    """Boxes, tiles that are moved, token rules, text whose length differs by sample."""
    if exact and kind == "gather":
        pytest.skip("the kernel has token rules for boxes alone")
    rule = pattern("neighborhood", window={"tokens": [3, 5, 7]}, tile=[2, 8, 8], exact=exact)
    plan = rule.build(layout, device, layout_kind=kind)
    batch = len(layout.valid or (0,))
    q, k, v = qkv(layout.length, batch=batch, heads=4, dim=64, dtype=torch.float16)
    check_online(plan, q, k, v)


def check_online(plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """A plan taken for one that was made on the device: the same bits, nothing read back."""
    call = {"backend": "hopper", "return_lse": True}
    expected = block_sparse_attention(q, k, v, plan, **call)
    online = replace(plan, shape=replace(plan.shape, online=True), known=None)
    block_sparse_attention(q, k, v, online, **call)  # compiles, and deals
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = block_sparse_attention(q, k, v, replace(online), **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@DIMS
@pytest.mark.parametrize("kind", ["boxes", "gather"])
@pytest.mark.parametrize("text", [0, 77])
def test_tiles_that_are_rows_of_the_raster(
    text: int, kind: Any, dim: int, qkv: Make, device: torch.device, assert_right: Make
) -> None:
    layout = TokenLayout((5, 2, 50), after=text)
    rule = SlidingTile({"tiles": [3, 1, 1]}, [1, 2, 50])
    plan = plan_for(layout, rule, device, layout_kind=kind)
    mask = dense_mask(plan_for(layout, rule, "cpu", layout_kind=kind), 1, 4)
    q, k, v = qkv(layout.length, heads=4, dim=dim, dtype=torch.bfloat16)
    result = block_sparse_attention(q, k, v, plan, backend="hopper", return_lse=True)
    assert_right(result, q, k, v, mask)


def test_opcheck_and_full_graph(device: torch.device) -> None:
    layout = TokenLayout((3, 13, 20), after=40)
    plan = plan_for(layout, pattern("sliding_tile", tile=[2, 8, 8]), device, layout_kind="boxes")
    q, k, v = (torch.randn(1, layout.length, 2, 128, device=device).bfloat16() for _ in range(3))
    lists = work_lists(plan, 1, 2, 7)
    arguments = (
        q, k, v, lists.items, lists.work, lists.codes, lists.metas, None, "", 0.1, 128,
        [2, 8, 8], list(layout.grid), layout.video_start, True, True,
    )  # fmt: skip
    torch.library.opcheck(hopper_forward, arguments)

    def twice(query: torch.Tensor) -> torch.Tensor:
        return hopper_forward(query, *arguments[1:])[0] * 2

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(q), twice(q))


def test_cuda_graph(device: torch.device, qkv: Make) -> None:
    """A graph computes what a call does; lists are never made inside one."""
    layout = TokenLayout((3, 13, 20), after=40)
    rule = pattern("sliding_tile", tile=[2, 8, 8])
    plan = rule.build(layout, device, layout_kind="boxes")
    q, k, v = qkv(layout.length, heads=2, dim=128, dtype=torch.bfloat16)
    other = replace(plan)
    call = partial(block_sparse_attention, q, k, v, backend="hopper")
    expected = call(plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(plan=plan)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)
    with (
        pytest.raises(RuntimeError, match="same call once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(plan=other)
    assert torch.equal(call(plan=other), expected)
