"""Plans: densities by counting, lists from masks, validation, moving."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.patterns.composite import PerHead
from dit_accel.kernels.plan import (
    BlockPlan,
    ListKinds,
    TokenMask,
    Visits,
    plan_of,
    visits_from_mask,
)
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]


@pytest.mark.parametrize("partial", [None, (1, 2, 0)], ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_densities_and_mask(
    partial: tuple[int, int, int] | None, batch: int, heads: int, random_plan: Make
) -> None:
    lengths = [128, 5, 61]
    plan, mask = random_plan(lengths, lengths[::-1], batch=batch, heads=heads, partial=partial)
    assert torch.equal(dense_mask(plan, batch, heads).cpu(), mask)
    assert plan.kept_density() == pytest.approx(mask.double().mean().item())
    visited = slots = 0
    for b in range(batch):
        for h in range(heads):
            for i, n in enumerate(lengths):
                seen = torch.cat(plan.visits.entries(b, h, i)).tolist()
                visited += sum(n * lengths[::-1][j] for j in seen)
                slots += len(seen) * 128 * 128
    everything = batch * heads * 194 * 194
    assert plan.launched_density("torch") == pytest.approx(visited / everything)
    assert plan.launched_density("triton") == pytest.approx(slots / everything)
    assert plan.launched_density("reference") == 1.0


def test_lists_put_whole_blocks_first() -> None:
    mask = torch.tensor([[[[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]]]).bool()
    whole = torch.tensor([[False, True, True, False]])
    lists = visits_from_mask(mask, whole, mask.flip(-1))
    assert lists.whole.tolist() == [[[1, 0, 2]]] and lists.full.tolist() == [[[3, 0, 2]]]
    found = [[part.tolist() for part in lists.entries(0, 0, i)] for i in range(3)]
    assert found == [[[2, 0, 3], [1]], [[], []], [[1, 2], []]]


@pytest.mark.parametrize("width", [None, 5, 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_lists_by_enumeration(width: int | None, heads: int, device: torch.device) -> None:
    """Wholes first, both parts ascending; a list longer than a given width is cut."""
    generator = torch.Generator().manual_seed(heads)
    mask = torch.rand(2, heads, 7, 9, generator=generator) < 0.5
    whole = torch.rand(2, 9, generator=generator) < 0.5
    lists = visits_from_mask(mask.to(device), whole.to(device), width=width).to("cpu")
    most = int(mask.sum(-1).max()) if width is None else width
    assert len(lists.index) == 2 * heads * 7 * most
    for b, h, i in itertools.product(range(2), range(heads), range(7)):
        seen = mask[b, h, i].nonzero()[:, 0].tolist()
        first = [j for j in seen if whole[b, j]]
        wanted = (first + [j for j in seen if not whole[b, j]])[:most]
        assert lists.entries(b, h, i)[0].tolist() == wanted
        assert lists.whole[b, h, i] == min(len(first), most)


def test_longest_lists_start_first(random_plan: Make) -> None:
    plan, _ = random_plan([20] * 6, [20] * 9, batch=2, heads=2, partial=(1, 1, 1))
    work = plan.visits.count.sum((0, 1))[plan.launch_order.long()]
    assert (work[:-1] >= work[1:]).all()
    assert sorted(plan.launch_order.tolist()) == list(range(6))


def test_moving_keeps_every_tensor(random_plan: Make) -> None:
    plan, _ = random_plan([20, 30], [40], partial=(1, 1, 1))
    moved = plan.to("meta")
    assert isinstance(moved, BlockPlan) and plan.to(plan.device) is plan
    assert moved.mask is not None
    for tensor in (
        moved.visits.index,
        moved.visits.start,
        moved.blocks.q.order,
        moved.blocks.k.lengths,
        moved.mask.q_coords,
    ):
        assert tensor is not None and tensor.device.type == "meta"
    assert moved.shape is plan.shape and moved.counts == plan.counts


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rule(
    name: str = "box", params: tuple[int, ...] = (0, 0, 0), q_coords: int = 60
) -> dict[str, Any]:
    """A token rule for the plan below, all of whose entries are full."""
    return {"mask": TokenMask(name, params, *(torch.zeros(n, 3).int() for n in (q_coords, 50)))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": ints([[3, 1]])}, "visits.count: expected counts in"),
        ({"count": ints([[-1, 1]])}, "visits.count: expected counts in"),
        ({"count": ints([[1, 1]]).long()}, "visits.count: expected int32"),
        ({"full": ints([[1]])}, "visits.full: expected shape"),
        ({"full": ints([[2, 1]])}, r"visits.full: expected counts in \[0, count\]"),
        ({"whole": ints([[1, 0]])}, "visits.whole: expected the blocks .* 128 tokens"),
        ({"whole": ints([[2, 0]])}, r"visits.whole: expected counts in \[0, full\]"),
        ({"start": ints([[0, 2]])}, "visits.start: expected lists within the 2 entries"),
        ({"start": ints([[-1, 0]])}, "visits.start: expected lists within"),
        ({"start": ints([[0, 0], [1, 1]]).mT[None]}, "visits.start: expected"),
        ({"index": ints(1, 0)}, r"visits.index: expected blocks in \[0, 1\), got 0 to 1"),
        ({"index": ints(0, 0), "count": ints([[2, 1]])}, "visits.index: .* names twice"),
        ({"index": ints(0, 0, 0, 0)[::2]}, "visits.index: expected contiguous"),
        ({"index": ints([0, 0])}, "visits.index: expected shape"),
        ({"q_length": 59}, "blocks.q: expected blocks within"),
        ({"block_q": 32}, "lengths in"),
        ({"q": BlockTable(None, ints(0, 10), ints([40, 20]))}, "share no query"),
        ({"q": BlockTable(ints(*[0] * 60), ints(0, 40), ints([40, 20]))}, "permutation"),
        ({"q": BlockTable(None, ints(0, 40), ints([40]))}, "expected 2 lengths"),
        ({"covers": True, "q_length": 61}, "plan.blocks.covers"),
        ({"kinds": ListKinds(True, False, False)}, "plan.shape.kinds: expected at least"),
        ({"box": (2, 8, 8)}, r"plan.shape.box: expected None, got \(2, 8, 8\)"),
        ({"most": 0, "first_video": 0, "video_blocks": 2}, "plan.shape.most: expected at least 1"),
        ({"full": ints([[0, 1]])}, "plan.mask: expected one, as visits.count is more"),
        ({"pooled": (ints([[0, 1]]), ints([[1, 0]]), ints(-1, 0))}, "0 or more, got -1"),
        ({"pooled": (ints([[0]]), ints([[1]]), ints(0))}, "pooled.count: expected shape"),
        ({"pooled": (ints([[0, 1]]), ints([[1, 0]]), ints(7, 0))}, None),
        (rule(), None),
        (rule(name="cone"), "cone"),
        (rule(params=(0,) * 17), "at most 16 parameters, got 17"),
        (rule(q_coords=59), r"mask.q_coords: expected shape \(60, 3\), got \(59, 3\)"),
    ],
)
def test_validation(change: dict[str, Any], words: str | None) -> None:
    blocks = Blocks(
        BlockTable(None, ints(0, 40), ints([40, 20])), BlockTable(None, ints(0), ints([50])), 60, 50
    )
    one = ints([[1, 1]])
    lists = Visits(ints([[0, 1]]), ints([[0, 0]]), one, one, ints(0, 0))
    plan = plan_of(blocks, lists).validate()
    some = {name: value for name, value in change.items() if name in ("mask", "pooled")}
    if isinstance(some.get("pooled"), tuple):
        start, count, index = some["pooled"]
        some["pooled"] = Visits(start, count, count, count, index)
    parts = {
        name: replace(part, **{n: v for n, v in change.items() if n in part.__dataclass_fields__})
        for name, part in (("blocks", blocks), ("visits", lists))
    }
    changed = BlockPlan(**parts, shape=plan.shape, **some)
    kinds = plan.shape.kinds._replace(pooled="pooled" in some)
    claims = {n: v for n, v in change.items() if n in ("kinds", "box", "most")}
    if "box" in claims:
        changed = replace(changed, blocks=blocks)
    rules = tuple(name for name, _ in changed.mask.rules) if changed.mask else ()
    shape = replace(plan.shape, **({"kinds": kinds, "rules": rules} | claims))
    changed = replace(changed, shape=shape)
    if words is None:
        assert changed.validate() is changed
        return
    with pytest.raises(DitAccelError, match=words):
        changed.validate()


def test_claims_spare_reads(random_plan: Make) -> None:
    """What the maker of a plan says of its lists is believed; it may say too much."""
    plan, _ = random_plan([20, 30], [40])
    assert plan.shape.kinds == (False, True, False, False) and plan.blocks.covers
    claimed = replace(plan, shape=replace(plan.shape, kinds=ListKinds(True, True, True), most=9))
    assert claimed.validate() is claimed


def scrambled(lists: Visits, seed: int = 0) -> Visits:
    """The same lists in another order, with gaps of garbage between them and around."""
    generator = torch.Generator().manual_seed(seed)
    start, count = lists.start.flatten().clone(), lists.count.flatten().tolist()
    pieces, end = [], 0
    for place in torch.randperm(len(start), generator=generator).tolist():
        gap = int(torch.randint(0, 5, (), generator=generator))
        old = int(start[place])
        pieces += [torch.full((gap,), 2**31 - 1).int(), lists.index[old : old + count[place]]]
        start[place] = end + gap
        end += gap + count[place]
    index = torch.cat([*pieces, torch.full((3,), -(2**31)).int()])
    return replace(lists, start=start.view(lists.count.shape), index=index)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("partial", [None, (1, 2, 0)], ids=str)
def test_lists_anywhere(
    backend: str, partial: tuple[int, int, int] | None, qkv: Make, random_plan: Make,
    assert_right: Make, device: torch.device,
) -> None:  # fmt: skip
    """Absolute starts: lists in any order, and nothing between them is read as a block."""
    plan, mask = random_plan([70, 128], [128, 60, 5], batch=2, heads=2, partial=partial)
    plan = plan.to("cpu")
    moved = plan_of(plan.blocks, scrambled(plan.visits), plan.mask).validate()
    for name in ("triton", "torch"):
        assert moved.launched_density(name) == plan.launched_density(name)
    assert moved.kept_density() == plan.kept_density()
    q, k, v = qkv(198, 193, batch=2)
    result = block_sparse_attention(q, k, v, moved.to(device), backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_heads_that_share_lists(
    backend: str, qkv: Make, random_plan: Make, assert_right: Make, device: torch.device
) -> None:
    """Four heads follow two lists each, and the entries stand there once."""
    plan, mask = random_plan([70, 128], [128, 60, 5], heads=2, partial=(1, 2, 0))
    plan, which = plan.to("cpu"), [1, 0, 0, 1]
    lists = plan.visits
    parts = (lists.start, lists.whole, lists.full, lists.count)
    lists = Visits(*(part[:, which].contiguous() for part in parts), lists.index)
    shared = plan_of(plan.blocks, lists, plan.mask).validate()
    mask = mask[:, which]
    assert shared.kept_density() == pytest.approx(mask.double().mean().item())
    q, k, v = qkv(198, 193, heads=4)
    result = block_sparse_attention(q, k, v, shared.to(device), backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


def test_per_head_plans_copy_no_lists() -> None:
    layout = TokenLayout((3, 16, 16), after=20)
    groups = (("0-2", pattern("sliding_tile", tile=[2, 8, 8])), ("3", pattern("full")))
    plan = PerHead(groups).build(layout, "cpu", heads=40, layout_kind="boxes").validate()
    assert plan.visits.start.shape[1] == 40
    assert len(plan.visits.index) <= 2 * plan.shape.q_blocks * plan.shape.k_blocks
    assert plan.visits.start.unique().numel() == 2 * plan.shape.q_blocks
    assert (plan.visits.start[:, 4:] == plan.visits.start[:, 3:4]).all()


def test_an_online_plan_starts_text_rows_first(random_plan: Make) -> None:
    plan, _ = random_plan([20] * 6, [20] * 6)
    blocks = replace(plan.blocks, first_video=1, video_blocks=4)
    online = replace(plan, blocks=blocks, shape=replace(plan.shape, online=True))
    assert online.launch_order.tolist() == [0, 5, 1, 2, 3, 4]
