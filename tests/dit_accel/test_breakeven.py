"""The break-even rule against the measurements that it was made from."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_accel import attention
from dit_accel.breakeven import MEASURED, pays
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

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
    monkeypatch.setattr(BlockPlan, "launched_density", lambda plan, _: plan._slot_density)
    layout = TokenLayout(grid)
    rule = pattern("sliding_tile", window={"fraction": [1.0, 0.5, 0.5]})
    tensors = torch.zeros(3, 1, layout.length, 2, 64).unbind()
    state = SimpleNamespace(settings=SimpleNamespace(backend=None), choices={})
    plan, backend, reason = attention.planned(state, layout, rule, tensors)
    assert (plan.box is not None) == (better == "boxes")
    assert backend == "torch" and reason is None
