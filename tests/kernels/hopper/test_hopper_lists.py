"""What the Hopper kernel is told, without its GPU: work lists, descriptors, the custom op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
import triton

from dit_accel.kernels.blocks import block_tokens
from dit_accel.kernels.hopper import launch
from dit_accel.kernels.hopper.deal import first_free
from dit_accel.kernels.hopper.deal_kernel import first_free as on_gpu
from dit_accel.kernels.hopper.launch import tensor_obstacle
from dit_accel.kernels.hopper.lists import PARTIAL, RUN, plan_obstacle, work_lists
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
PROGRAMS = 5
LAYOUTS = [
    TokenLayout((3, 13, 20)),
    TokenLayout((3, 13, 20), after=70),
    TokenLayout((3, 9, 17), before=20, after=300, valid=((7, 300), (20, 0))),
]


def first_token(code: int, layout: TokenLayout) -> int:
    """The raster token that a code names."""
    if code >= RUN:
        return code - RUN
    t, h, w = code >> 20, (code >> 10) % 1024, code % 1024
    return layout.video_start + (t * layout.grid[1] + h) * layout.grid[2] + w


def check(plan: BlockPlan, layout: TokenLayout, batch: int, heads: int) -> None:
    lists = work_lists(plan, batch, heads, PROGRAMS)
    blocks = plan.blocks
    if blocks.box is None:  # the kernel reads every code as a run
        codes = torch.cat([lists.items[:, 3], lists.codes[lists.codes >= 0]])
        assert (codes >= RUN).all()
    seen = set()
    for sample, head, start, code, length, tiles, bare, row in lists.items.tolist():
        block = row % blocks.q.count
        seen.add((sample, head, block))
        tokens, real = block_tokens(blocks.q, sample, 128)
        assert first_token(code, layout) == tokens[block, 0] and length == real[block].sum()
        wanted = []
        keys, there = block_tokens(blocks.k, sample, blocks.block_k)
        entries = plan.visits.entries(sample, head, block)
        for some, flag in zip(entries, (0, PARTIAL), strict=True):
            wanted += [(int(keys[j, 0]), int(there[j].sum()) + flag) for j in some.tolist()]
        together = 128 // blocks.block_k
        here = slice(start, start + tiles * together)
        codes, metas = (x[here].tolist() for x in (lists.codes, lists.metas))
        assert tiles == max(1, -(-len(wanted) // together))
        listed = list(zip(codes, metas, strict=True))
        assert [(first_token(c, layout), m) for c, m in listed if c >= 0] == wanted
        assert all(c == -1 for c, _ in listed[len(wanted) :])
        assert all(m == blocks.block_k for _, m in listed[: bare * together])
    assert len(seen) == len(lists.items) == batch * heads * blocks.q.count
    starts, tiles = lists.work.unbind(-1)
    ends = [*starts.tolist()[1:], len(lists.items)]
    for begin, end, work in zip(starts.tolist(), ends, tiles.tolist(), strict=True):
        assert begin < end and work == lists.items[begin:end, 5].sum()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_boxes(layout: TokenLayout, exact: bool) -> None:
    rule = pattern("neighborhood", window={"tokens": [3, 5, 7]}, tile=[2, 8, 8], exact=exact)
    plan = rule.build(layout, "cpu", layout_kind="boxes")
    assert plan_obstacle(plan.shape) is None and plan.shape.kinds.partial == exact
    check(plan, layout, len(layout.valid or (0,)), 2)


@pytest.mark.parametrize("kind", ["boxes", "gather"])
@pytest.mark.parametrize("text", [0, 77])
def test_tiles_that_are_rows_of_the_raster(text: int, kind: Any) -> None:
    """Neither boxes nor in need of moving: runs, although each has a place in the grid."""
    layout = TokenLayout((5, 2, 50), after=text)
    rule = SlidingTile({"tiles": [3, 1, 1]}, [1, 2, 50])
    plan = rule.build(layout, "cpu", layout_kind=kind)
    assert (
        plan_obstacle(plan.shape) is None and plan.blocks.box is None and not plan.shape.scattered
    )
    check(plan, layout, 1, 2)


@pytest.mark.parametrize("block_k", [64, 128])
def test_runs_with_lists_per_sample_and_head(block_k: int, runs_plan: Make) -> None:
    plan, _ = runs_plan([128, 17, 128, 65], [64, 3, 64, 64, 20], batch=2, heads=3, block_k=block_k)
    check(plan.to("cpu"), TokenLayout((1, 1, 338)), 2, 3)


def test_work_is_dealt_evenly() -> None:
    """Text rows see everything and come first: the rest fills up to its last items' length."""
    layout = TokenLayout((8, 24, 32), after=256)
    plan = SlidingTile({"tiles": [1, 3, 3]}, [2, 8, 8]).build(layout, "cpu", layout_kind="boxes")
    tiles = work_lists(plan, 1, 4, PROGRAMS).work[:, 1]
    assert tiles.max() - tiles.min() <= plan.visits.count[..., : 8 * 24 * 32 // 128].max()


@pytest.mark.parametrize("programs", [1, 3, 132])
def test_first_free(programs: int, device: torch.device) -> None:
    """Each item goes to the program that has least so far; the GPU's kernel agrees."""
    weights = torch.randint(1, 50, (700,), generator=torch.Generator().manual_seed(0)).int()
    loads, expected = [0] * programs, []
    for weight in weights.tolist():
        expected.append(loads.index(min(loads)))
        loads[expected[-1]] += weight
    assert first_free(weights, programs).tolist() == expected
    owners = torch.full_like(weights, -1, device=device)
    width = triton.next_power_of_2(programs)
    on_gpu[(1,)](weights.to(device), owners, 700, programs, WIDTH=width, num_warps=1)
    assert owners.tolist() == expected


def test_obstacles(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([128, 30], [128], partial=(1, 1, 1))
    assert "token rule" in str(plan_obstacle(plan.shape))
    none, _ = random_plan([128], [])
    assert "no keys" in str(plan_obstacle(none.shape))
    small, _ = random_plan([20], [20], block=64)
    assert "64 x 64" in str(plan_obstacle(small.shape))
    q, k, v = (x.half() for x in qkv(64, dim=128))
    assert tensor_obstacle(q, k, v) is None
    assert "no queries" in str(tensor_obstacle(q[:0], k[:0], v[:0]))
    assert "float32" in str(tensor_obstacle(q.float(), k, v))
    assert "head_dim 96" in str(tensor_obstacle(q[..., :96], k[..., :96], v[..., :96]))
    odd = torch.randn(1, 64, 2, 129).half()[..., :128]
    assert "strides of k" in str(tensor_obstacle(q, odd, v))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head_major", [False, True])
def test_launch(
    layout: TokenLayout, head_major: bool, qkv: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gets each of its arguments once; descriptors stay within the tensors."""
    calls: list[dict[str, Any]] = []
    names = [parameter.name for parameter in launch.forward.params]

    class Stub:
        arg_names = names

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **options: launched(grid, args, options)

    def launched(grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert options.pop("num_warps") == 4 and options.pop("maxnreg") == 168
        given = dict(zip(names, args, strict=False))
        assert not given.keys() & options.keys() and len(args) <= len(names)
        calls.append({"programs": grid[0], **given, **options})
        given["out_ptr"].zero_()
        given["lse_ptr"].zero_()

    monkeypatch.setattr(launch, "forward", Stub())
    monkeypatch.setattr(launch, "processors", lambda device: PROGRAMS)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    batch = len(layout.valid or (0,))
    q, k, v = (x.half() for x in qkv(layout.length, batch=batch, heads=4, kv_heads=2, dim=128))
    if head_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    plan = SlidingTile({"tiles": [1, 3, 3]}, [2, 8, 8]).build(layout, "cpu", layout_kind="boxes")
    launch.hopper_attention(q, k, v, plan, 0.1)
    (call,) = calls
    assert set(call) - {"programs"} == set(names)
    assert (call["k_runs"] is None) == (layout.length == layout.video_length)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        descriptor = call[f"{name}_boxes"]
        last = sum((n - 1) * s for n, s in zip(descriptor.shape, descriptor.strides, strict=True))
        assert descriptor.base.storage_offset() + last < tensor.untyped_storage().nbytes() // 2
        outer, head, column = (call[f"{name}_{step}"] for step in ("ob", "oh", "ch"))
        heads = tensor.shape[2]
        for b, h in ((0, 0), (batch - 1, heads - 1)):
            at = (b * outer + h * head) * descriptor.strides[0] + h * column
            assert at == b * tensor.stride(0) + h * tensor.stride(2) or batch == 1
    lists = work_lists(plan, batch, 4, PROGRAMS)
    torch.library.opcheck(
        launch.hopper_forward,
        (q, k, v, lists.items, lists.work, lists.codes, lists.metas, None, "", 0.1, 128,
         list(plan.blocks.box or ()), list(layout.grid), layout.video_start, True, True),
    )  # fmt: skip
