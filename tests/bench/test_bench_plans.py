"""Plans of a wanted density: their lists, and windows whose density is worked out beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.bench.cases import CASES, make_inputs, pick_cases
from dit_accel.bench.plans import layout_kinds_of, random_plan, sliding_tile
from dit_accel.errors import DitAccelError
from dit_accel.kernels.patterns import plan_for
from dit_accel.layout import TokenLayout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("length", [128, 129, 700, 1024])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
def test_random_lists(length: int, block_k: int, density: float) -> None:
    plan = random_plan(length, density, CPU, block_k=block_k, heads=3)
    plan.validate()
    blocks = math.ceil(length / block_k)
    visits = max(1, round(density * blocks))
    index, listed = plan.visits.rows()
    assert plan.visits.full.unique().tolist() == [visits] and listed.all()
    for lists in index.flatten(0, 2).tolist():
        assert sorted(set(lists)) == lists and len(lists) == visits
    short = set() if length % block_k == 0 else {blocks - 1}
    whole = [visits - len(short & set(row)) for row in index.flatten(0, 2).tolist()]
    assert plan.visits.whole.flatten().tolist() == whole
    queries = math.ceil(length / 128)
    slots = queries * visits * 128 * block_k
    assert plan.launched_density() == pytest.approx(slots / length**2)


def test_random_lists_differ_per_head_and_repeat_per_seed() -> None:
    first, again = (random_plan(4096, 0.3, CPU, heads=2, seed=7) for _ in range(2))
    assert torch.equal(first.visits.index, again.visits.index)
    index, _ = first.visits.rows()
    assert not torch.equal(index[:, 0], index[:, 1])
    assert random_plan(4096, 0.3, CPU).heads == 1


@pytest.mark.parametrize(
    "layout",
    [TokenLayout((13, 30, 45)), TokenLayout((9, 32, 33), before=226), TokenLayout((1, 96, 80))],
    ids=str,
)
@pytest.mark.parametrize(
    ("backend", "device"), [("hopper", CUDA), ("triton", CUDA), ("triton", CPU), ("torch", CPU)]
)
def test_window_near_a_density(layout: TokenLayout, backend: str, device: torch.device) -> None:
    found = []
    for wanted in (0.5, 0.2):
        pattern, kind = sliding_tile(layout, wanted, backend, device)
        assert kind in layout_kinds_of(backend, device)
        plan = plan_for(layout, pattern, CPU, layout_kind=kind)
        assert kind == "lengths" or plan.shape.block_q == 128
        found.append(plan.launched_density(backend))
        assert abs(math.log(found[-1] / wanted)) < 0.3
    assert found[0] > found[1]


def test_the_tile_that_is_asked() -> None:
    pattern, _ = sliding_tile(TokenLayout((5, 16, 16)), 0.4, "triton", CPU, (2, 8, 8))
    assert pattern.tile == (2, 8, 8)


def test_layout_kinds_of_backends() -> None:
    kinds = [layout_kinds_of(name, CUDA) for name in ("hopper", "triton")]
    assert kinds == [("boxes", "gather"), ("gather",)]
    assert [layout_kinds_of(n, CPU) for n in ("torch", "triton")] == [("lengths",), ("gather",)]


def test_tiles_that_fit_the_grid_are_moved_where_boxes_waste_more() -> None:
    """Boxes of 128 tokens fit 13 x 30 x 45 badly; those of 24 x 16 x 16 exactly."""
    assert sliding_tile(TokenLayout((13, 30, 45)), 0.2, "hopper", CUDA)[1] == "gather"
    assert sliding_tile(TokenLayout((24, 16, 16)), 0.2, "hopper", CUDA)[1] == "boxes"


def test_cases() -> None:
    assert {case.layout.length for case in pick_cases(("wan-14b", "21x45x80"))} == {75600}
    assert [case.heads for case in pick_cases(("wan-14b",), heads=8)] == [8]
    assert [case.heads for case in pick_cases(("wan-14b", "l32768"), quick=True)] == [8, 12]
    assert len(pick_cases(())) == len(pick_cases(("all",))) == len(CASES)
    assert {case.name for case in pick_cases((), quick=True)} == {
        name for name, case in CASES.items() if case.table
    }
    for case in pick_cases((), tiny=True):
        assert case.layout.length < 400
    with pytest.raises(DitAccelError, match="Did you mean 'wan-14b'"):
        pick_cases(("wan-14",))


def test_scores_of_real_keys_are_far_below_those_of_zeros() -> None:
    q, k, v = make_inputs(CASES["13x30x45"].shrunk(), torch.float32, CPU)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    assert scores.mean() < -2
    assert abs(v.mean()) < 0.1
