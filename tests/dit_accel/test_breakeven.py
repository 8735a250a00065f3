"""The break-even rule against the measurements that it was made from."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dit_accel.breakeven import MEASURED, pays

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
