"""Plans made on the device as Hopper's work lists: the same items as a static plan's, dealt evenly
before anything is known of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from dit_accel.costs.kernels import deal_weights
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.hopper.deal import first_free, in_rounds
from dit_accel.kernels.hopper.lists import START, WorkLists, work_lists
from dit_accel.kernels.hopper.online import dealt, emit, emit_in_torch, online_lists
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
WEIGHTS = deal_weights()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton is interpreted
LAYOUTS = [
    TokenLayout((3, 13, 20)),
    TokenLayout((3, 9, 17), before=20, after=300, valid=((7, 300), (20, 0))),
]


def as_online(plan: BlockPlan, even: bool = False) -> BlockPlan:
    """The plan as if it had been made from q and k."""
    return replace(plan, shape=replace(plan.shape, online=True, even=even), known=None)


def content(lists: WorkLists, block_k: int) -> list[Any]:
    """Each item with the codes and metas of its list, in the order of samples, heads and blocks."""
    found = []
    for item in lists.items.tolist():
        start, tiles = item[START], item[5]
        here = slice(start, start + tiles * (128 // block_k))
        codes, metas = lists.codes[here].tolist(), lists.metas[here].tolist()
        entries = [(c, m if c >= 0 else 0) for c, m in zip(codes, metas, strict=True)]
        found.append((item[:2], item[7], item[3:7], entries))
    return sorted(found)


def check(plan: BlockPlan, batch: int, heads: int) -> None:
    """Triton's kernel, its twin in torch and the static lists agree; programs get whole runs."""
    plan, programs = plan.to(DEVICE), 5
    wanted = content(work_lists(plan, batch, heads, programs), plan.blocks.block_k)
    online = as_online(plan)
    deal = dealt(online.blocks, batch * heads, programs, online.shape.visits)
    made = [make(online, deal, batch, heads) for make in (emit_in_torch, emit)]
    for lists in made:
        assert content(lists, plan.blocks.block_k) == wanted
        starts = [*lists.work[:, 0].tolist(), len(lists.items)]
        for program, tiles in enumerate(lists.work[:, 1].tolist()):
            here = slice(starts[program], starts[program + 1])
            assert tiles == lists.items[here, 5].sum() > 0
    assert torch.equal(made[0].items, made[1].items) and torch.equal(made[0].work, made[1].work)
    assert deal.work[:, 1].sum() == 0, "the template of the work is not written to"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_boxes(layout: TokenLayout, exact: bool) -> None:
    rule = pattern("neighborhood", window={"tokens": [3, 5, 7]}, tile=[2, 8, 8], exact=exact)
    plan = rule.build(layout, "cpu", layout_kind="boxes")
    check(plan, len(layout.valid or (0,)), 3)


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_runs(batch: int, heads: int, block_k: int, runs_plan: Make) -> None:
    """Lists per sample and head, some empty, some with an odd number of blocks of 64."""
    plan, _ = runs_plan(
        [128, 17, 128, 65], [64, 3, 64, 64, 20], batch=batch, heads=heads, block_k=block_k, keep=0.3
    )
    assert (plan.visits.count == 0).any()
    check(plan, 2, 3)


def wan(text: int) -> Blocks:
    """591 video blocks (Wan 14B, 81 frames of 720p: 75,600 tokens), then text."""
    starts = torch.arange(591 + text, dtype=torch.int32) * 128
    table = BlockTable(None, starts, torch.full_like(starts, 128)[None])
    length = len(starts) * 128
    return Blocks(table, table, length, length, video_blocks=591, covers=True)


def loads(count: torch.Tensor, blocks: Blocks, visits: float, programs: int) -> np.ndarray:
    """What each program has, in tenths of a tile: count [heads, NQ], in the order of the deal."""
    deal = dealt(blocks, len(count), programs, visits)
    text = count[:, deal.video :].flatten()
    video = count[:, : deal.video].sort(-1, descending=True).values.flatten()
    weights = WEIGHTS.tile * torch.cat([text, video]) + WEIGHTS.item
    found = np.zeros(programs)
    np.add.at(found, deal.owners.numpy(), weights.numpy())
    return found


@pytest.mark.parametrize("text", [0, 1, 4])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("heads", "most"), [(40, 90), (12, 40), (24, 150)])
def test_the_deal_is_as_even_as_the_greedy_one(
    heads: int, most: int, ragged: bool, text: int
) -> None:
    """The busiest of 132 programs has at most 2 % more than the mean, or half an item; 4 % where
    most programs have a text row and heads differ fivefold: then they miss whichever come first."""
    generator = torch.Generator().manual_seed(most)
    count = torch.full((heads, 591), most)
    if ragged:  # as top-p makes them: heads differ, and rows within a head
        level = torch.rand(heads, 1, generator=generator) * 0.8 + 0.2
        noise = torch.rand(heads, 591, generator=generator) ** 2
        count = (most * level * (0.2 + 0.8 * noise)).int().clamp_min(1).long()
    rows = torch.cat([count, torch.full((heads, text), 591 + text)], 1)
    found = loads(rows, wan(text), float(rows.double().mean()), 132)
    weights = WEIGHTS.tile * rows.flatten().sort(descending=True).values + WEIGHTS.item
    greedy = np.zeros(132)
    np.add.at(greedy, first_free(weights.int(), 132).numpy(), weights.numpy())
    assert found.sum() == greedy.sum()
    share = 1.04 if ragged and text == 4 else 1.02
    assert found.max() <= max(share * found.mean(), greedy.max() + 0.5 * weights.double().mean())


def test_programs_work_on_the_same_head() -> None:
    """A head's rows go out in a row: its keys and values share the cache."""
    owners = in_rounds(40, 40, 591, 6.5, 132)
    assert np.bincount(owners[:40], minlength=132).max() == 1
    turn = np.zeros(132, int)
    for program in owners[40:]:
        turn[program] += 1
        assert turn.max() - turn[40:].min() <= 2  # those without a text row keep pace
    first = [np.flatnonzero(owners[40:] == program)[0] for program in (0, 39, 40, 131)]
    assert max(first[2:]) < 132 and 5 * 92 < first[0] < 8 * 92
    assert np.ptp(turn[40:]) <= 1 and np.ptp(turn[:40]) <= 1


def test_more_long_items_than_programs() -> None:
    owners = in_rounds(13, 4, 5, 3.0, 5)
    load = np.bincount(owners[:13], minlength=5) * 3.0 + np.bincount(owners[13:], minlength=5)
    assert load.sum() == 59 and load.max() - load.min() <= 3
    assert in_rounds(0, 1, 3, 1.0, 3).tolist() == [0, 1, 2]
    assert in_rounds(2, 1, 0, 1.0, 2).tolist() == [0, 1]


def test_nobody_is_idle() -> None:
    """The kernel relies on it: as many items as programs are enough for each to have one."""
    for long, lines, short in itertools.product((0, 1, 3, 7), (1, 2, 5), (1, 2, 3, 8)):
        total = long + lines * short
        for programs in range(1, total + 1):
            owners = in_rounds(long, lines, short, 6.5, programs)
            assert len(owners) == total
            assert np.bincount(owners, minlength=programs).min() >= 1


def test_even_lists_need_no_order() -> None:
    layout = TokenLayout((4, 16, 16), after=60)
    plan = pattern("full").build(layout, DEVICE, layout_kind="boxes")
    deal = dealt(plan.blocks, 2, 3, plan.shape.visits)
    sorted_, even = (emit(as_online(plan, flag), deal, 1, 2) for flag in (False, True))
    assert torch.equal(sorted_.items, even.items) and torch.equal(sorted_.work, even.work)
    assert torch.equal(online_lists(as_online(plan, True), 1, 2, 3).items, even.items)


def test_the_longest_list_of_a_head_comes_first(runs_plan: Make) -> None:
    plan, _ = runs_plan([128] * 9, [128] * 12, heads=2, keep=0.5, seed=4)
    plan = as_online(plan.to("cpu"))
    lists = emit_in_torch(plan, dealt(plan.blocks, 2, 1, plan.shape.visits), 1, 2)
    tiles = lists.items[:, 5].view(2, 9)
    assert (tiles[:, :-1] >= tiles[:, 1:]).all() and tiles.unique().numel() > 2
    assert lists.items[:, 1].tolist() == [0] * 9 + [1] * 9
