"""The break-even rule against the measurements that it was made from."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_accel import attention
from dit_accel.breakeven import ALONE, BESIDE_TEXT, MEASURED, effort, pays
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.planner.costs import CostTable, cost_table

RESULTS = Path(__file__).resolve().parents[2] / "samples" / "results"
HEADS = 8


@pytest.mark.parametrize("name", ["breakeven_cpu.csv", "breakeven_h200.csv"])
def test_agrees_with_clear_measurements(name: str) -> None:
    """Rows where sparse won or lost by more than a quarter; timings of small calls are noise."""
    with (RESULTS / name).open() as file:
        rows = list(csv.DictReader(file))
    wrong, clear = [], 0
    for row in rows:
        speedup, tokens = float(row["speedup"]), int(row["tokens"])
        if 0.8 < speedup < 1.25 or float(row["dense_ms"]) < 0.1:
            continue
        clear += 1
        flops = 4.0 * HEADS * tokens**2 * int(row["head_dim"])
        device = "cpu" if row["backend"] == "torch" else "cuda"
        if pays(row["backend"], device, flops, float(row["launched_density"])) != (speedup > 1):
            wrong.append(row)
    assert clear >= 15
    assert len(wrong) <= clear // 10, wrong


def test_monotone_in_size_and_density() -> None:
    for backend, device in MEASURED:
        assert not pays(backend, device, 1e3, 0.1)
        assert pays(backend, device, 1e15, 0.1)
        assert not pays(backend, device, 1e15, 1.0)
    assert pays("reference", "cpu", 1.0, 1.0)


@pytest.mark.parametrize(("grid", "better"), [((4, 16, 16), "boxes"), ((3, 9, 17), "gather")])
def test_boxes_only_where_they_fit_the_grid(
    grid: tuple[int, int, int], better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes of (1, 8, 16) fill the first grid; in the second they are mostly empty."""
    monkeypatch.setattr(attention, "layout_kind", lambda *_: "boxes")
    monkeypatch.setattr(attention, "kind_for", lambda _: "gather")
    slots = BlockPlan.launched_density
    monkeypatch.setattr(BlockPlan, "launched_density", lambda plan, _: slots(plan))
    layout = TokenLayout(grid)
    rule = pattern("sliding_tile", window={"fraction": [1.0, 0.5, 0.5]})
    tensors = torch.zeros(3, 1, layout.length, 2, 64).unbind()
    state = SimpleNamespace(settings=SimpleNamespace(backend=None), choices={})
    plan, backend, reason = attention.planned(state, layout, rule, tensors)
    assert (plan.shape.box is not None) == (better == "boxes")
    assert backend == "torch" and reason is None


WIDE, NARROW = {"fraction": [1.0, 0.5, 0.5]}, {"fraction": [0.6, 0.4, 0.4]}


@pytest.mark.parametrize(
    ("grid", "text", "window", "better"),
    [((21, 45, 80), 0, WIDE, "boxes"), ((33, 45, 80), 256, NARROW, "gather")],
    ids=["wan-14b", "hunyuan"],
)
def test_moved_tiles_are_dearer_where_they_are_short(
    grid: tuple[int, int, int], text: int, window: dict[str, list[float]], better: str
) -> None:
    """Both launch fewer pairs with moved tiles, all of them short. On an H200 boxes took 56.1 ms of
    57.1 in the first case; in the second, beside text, 56.4 of 53.1."""
    layout = TokenLayout(grid, after=text)
    rule = pattern("sliding_tile", window=window)
    plans = {
        kind: plan_for(layout, rule, "cpu", layout_kind=kind)  # type: ignore[arg-type]
        for kind in ("boxes", "gather")
    }
    assert plans["gather"].launched_density() < plans["boxes"].launched_density()
    assert min(plans, key=lambda kind: effort("hopper", "cuda", plans[kind])) == better
    bare, density = effort("triton", "cuda", plans["gather"]), plans["gather"].launched_density()
    assert bare == MEASURED["triton", "cuda"].slope * density, "its visits cost about the same"


def visit_ratios(table: CostTable, kernel: str, kind: str) -> list[float]:
    """A visit over the plain kernel's whole one: in cycles, then in time at settled clocks."""
    ratios = []
    for dim in (64, 128):
        kflops = 4 * 128**2 * dim * table.programs / 1e3
        prices = table.of("hopper", dim).whole, getattr(table.of("hopper", dim, kernel), kind)
        spent = [cycles / table.clock.settled(kflops / cycles) for cycles in prices]
        ratios += [prices[1] / prices[0], spent[1] / spent[0]]
    return ratios


@pytest.mark.parametrize(("kernel", "weights"), [("hopper", ALONE), ("hopper mixed", BESIDE_TEXT)])
def test_visits_weigh_what_the_table_says(kernel: str, weights: tuple[float, float]) -> None:
    table = cost_table("h200")
    assert table is not None
    for kind, weight in zip(("whole", "short"), weights, strict=True):
        ratios = visit_ratios(table, kernel, kind)
        assert min(ratios) <= weight <= max(ratios), (kind, ratios)


def test_choices_follow_measured_time() -> None:
    """Over the pairs of the planner's comparison, what is chosen takes hardly longer than the
    fastest of all ways that were measured."""
    rows = list(csv.DictReader((RESULTS / "planner_h200.csv").open(encoding="utf-8")))
    ways: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        pair = row["model"], row["pattern"], row["parameters"]
        ways.setdefault(pair, []).append(float(row["measured_ms"]))
    chosen = sum(float(row["measured_ms"]) for row in rows if row["chosen"] == "True")
    assert len(ways) == 30
    assert chosen <= 1.005 * sum(map(min, ways.values()))
