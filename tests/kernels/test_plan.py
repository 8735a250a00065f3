"""Plans: densities by counting, lists from masks, validation, moving."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.plan import (
    BlockPlan,
    BlockTable,
    ListKinds,
    TokenMask,
    lists_from_mask,
)
from dit_accel.kernels.reference import dense_mask

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
                lists = [(plan.full_count, plan.full_index)]
                if plan.partial_count is not None:
                    lists.append((plan.partial_count, plan.partial_index))
                for count, index in lists:
                    seen = index[b, h, i, : count[b, h, i]].tolist()
                    visited += sum(n * lengths[::-1][j] for j in seen)
                    slots += len(seen) * 128 * 128
    everything = batch * heads * 194 * 194
    assert plan.launched_density("torch") == pytest.approx(visited / everything)
    assert plan.launched_density("triton") == pytest.approx(slots / everything)
    assert plan.launched_density("reference") == 1.0


def test_lists_put_whole_blocks_first() -> None:
    mask = torch.tensor([[[[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]]]).bool()
    whole = torch.tensor([[False, True, True, False]])
    count, index, unmasked = lists_from_mask(mask, whole)
    assert count.tolist() == [[[3, 0, 2]]] and unmasked.tolist() == [[[1, 0, 2]]]
    assert index[0, 0, 0].tolist() == [2, 0, 3] and index[0, 0, 2, :2].tolist() == [1, 2]
    assert {count.dtype, index.dtype, unmasked.dtype} == {torch.int32}


@pytest.mark.parametrize("width", [None, 5, 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_lists_by_enumeration(width: int | None, heads: int, device: torch.device) -> None:
    """Wholes first, both parts ascending; a list longer than a given width is cut."""
    generator = torch.Generator().manual_seed(heads)
    mask = torch.rand(2, heads, 7, 9, generator=generator) < 0.5
    whole = torch.rand(2, 9, generator=generator) < 0.5
    found = lists_from_mask(mask.to(device), whole.to(device), width)
    count, index, unmasked = (x.cpu() for x in found)
    most = int(mask.sum(-1).max()) if width is None else width
    assert index.shape == (2, heads, 7, most) and index.is_contiguous()
    for b, h, i in itertools.product(range(2), range(heads), range(7)):
        seen = mask[b, h, i].nonzero()[:, 0].tolist()
        first = [j for j in seen if whole[b, j]]
        wanted = (first + [j for j in seen if not whole[b, j]])[:most]
        assert index[b, h, i, : count[b, h, i]].tolist() == wanted
        assert unmasked[b, h, i] == min(len(first), most)


def test_longest_lists_start_first(random_plan: Make) -> None:
    plan, _ = random_plan([20] * 6, [20] * 9, batch=2, heads=2, partial=(1, 1, 1))
    work = (plan.full_count + plan.partial_count).sum((0, 1))[plan.launch_order.long()]
    assert (work[:-1] >= work[1:]).all()
    assert sorted(plan.launch_order.tolist()) == list(range(6))


def test_moving_keeps_every_tensor(random_plan: Make) -> None:
    plan, _ = random_plan([20, 30], [40], partial=(1, 1, 1))
    moved = plan.to("meta")
    assert isinstance(moved, BlockPlan) and plan.to(plan.device) is plan
    assert moved.token_mask is not None and moved.partial_index is not None
    for tensor in (
        moved.full_index,
        moved.partial_index,
        moved.q_blocks.order,
        moved.k_blocks.lengths,
        moved.token_mask.q_coords,
    ):
        assert tensor is not None and tensor.device.type == "meta"
    assert (moved.q_length, moved.block_q, moved.heads) == (50, 128, 1)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def partial(
    count: Any = (0, 0), name: str = "box", params: tuple[int, ...] = (0, 0, 0), q_coords: int = 60
) -> dict[str, Any]:
    """The fields of a partial list over the plan below."""
    coords = [torch.zeros(n, 3, dtype=torch.int32) for n in (q_coords, 50)]
    return {
        "partial_count": ints([list(count)]),
        "partial_index": ints([[[0], [0]]]),
        "token_mask": TokenMask(name, params, *coords),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"full_count": ints([[2, 1]])}, "full_count"),
        ({"full_index": ints([[[1], [0]]])}, "full_index"),
        ({"full_count": ints([[1, 1]]).long()}, "int32"),
        ({"full_count": ints([[1]])}, "plan.full"),
        ({"q_length": 59}, "q_blocks: expected blocks within"),
        ({"block_q": 32}, "lengths in"),
        ({"q_blocks": BlockTable(None, ints(0, 10), ints([40, 20]))}, "share no query"),
        ({"q_blocks": BlockTable(ints(*[0] * 60), ints(0, 40), ints([40, 20]))}, "permutation"),
        ({"q_blocks": BlockTable(None, ints(0, 40), ints([40]))}, "expected 2 lengths"),
        ({"full_count": ints([[-1, 1]])}, "full_count: expected counts in"),
        ({"full_index": ints([[[0, 0], [0, 0]]]), "full_count": ints([[2, 1]])}, "names twice"),
        ({"full_index": ints([[[0, 0], [0, 0]]]).mT}, "full_index: expected contiguous"),
        ({"unmasked_count": ints([[1, 0]])}, "unmasked_count: expected the blocks .* 128 tokens"),
        ({"unmasked_count": ints([[2, 0]])}, "unmasked_count: expected counts"),
        ({"unmasked_count": ints([[0]])}, "unmasked_count: expected the shape"),
        ({"covers": True, "q_length": 61}, "plan.covers"),
        ({"kinds": ListKinds(True, False, False)}, "plan.kinds: expected at least"),
        ({"partial_count": ints([[0, 0]])}, "together"),
        ({"pooled_count": ints([[0, 0]])}, "pooled_count and pooled_index together"),
        (
            {"pooled_count": ints([[1, 0]]), "pooled_index": ints([[[-1], [0]]])},
            "pooled_index: expected pooled keys in 0 or more, got -1",
        ),
        ({"pooled_count": ints([[1]]), "pooled_index": ints([[[0]]])}, "plan.pooled: expected"),
        (partial(), None),
        (partial(count=[1, 0]), "partial_index: expected blocks that are not in full_index"),
        (partial(name="cone"), "cone"),
        (partial(params=(0,) * 17), "at most 16 parameters, got 17"),
        (partial(q_coords=59), r"token_mask.q_coords: expected shape \(60, 3\), got \(59, 3\)"),
    ],
)
def test_validation(change: dict, words: str | None) -> None:
    plan = BlockPlan(
        BlockTable(None, ints(0, 40), ints([40, 20])),
        BlockTable(None, ints(0), ints([50])),
        ints([[1, 1]]),
        ints([[[0], [0]]]),
        60,
        50,
    )
    changed = replace(plan.validate(), **change)
    if words is None:
        assert changed.validate() is changed
        return
    with pytest.raises(DitAccelError, match=words):
        changed.validate()


def test_claims_spare_reads(random_plan: Make) -> None:
    """What the maker of a plan says is believed; lists of pooled keys always count."""
    plan, _ = random_plan([20, 30], [40])
    found = plan.list_kinds
    claimed = replace(plan, kinds=ListKinds(True, True, True), covers=True)
    assert found == (False, True, False, False) and claimed.covers_queries
    assert claimed.list_kinds == (True, True, True, False)
    zeros = torch.zeros_like(plan.full_count)
    with_pooled = replace(
        claimed, kinds=found, pooled_count=zeros, pooled_index=zeros.unsqueeze(-1)
    )
    assert with_pooled.list_kinds == (False, True, False, True)
    assert with_pooled.validate() is with_pooled
