"""Timing, the machine's columns, dense kernels, CSV files and goals."""

from __future__ import annotations

import csv
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.bench import dense
from dit_accel.bench.goals import GOALS, reached
from dit_accel.bench.kernels import DenseResult, dense_result
from dit_accel.bench.machine import machine
from dit_accel.bench.records import OK, WRONG, CsvLog, Row
from dit_accel.bench.timing import (
    MAX_CALLS,
    Rotation,
    copies_needed,
    first_calls,
    measure,
    measure_wall,
)
from dit_accel.errors import DitAccelError
from dit_accel.provenance import commit

CPU = torch.device("cpu")


def test_median_after_warm_up() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(0.05 if len(calls) < 2 else 0.002 if len(calls) != 4 else 0.03)
        time.sleep(calls[-1])

    timing = measure(call, CPU, repeats=5, warmup=2)
    assert len(calls) == 7 and timing.repeats == 5
    assert 2 <= timing.median_ms < 20 <= timing.worst_ms
    calls.clear()
    assert measure_wall(call, CPU, repeats=1, warmup=0).median_ms >= 50
    assert [round(s, 1) for s in first_calls(lambda: time.sleep(0.1), CPU)] == [0.1, 0.1]


@pytest.mark.parametrize("ms", [8.0, 0.05])
def test_a_gpu_is_timed_at_the_clock_of_the_call(
    ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls run one behind the other, unwatched, for a while; the timed ones follow at once, or
    behind a wait where the host may be too slow for that."""
    log: list[str] = []
    now = 0.0

    def call() -> None:
        nonlocal now
        log.append("call")
        now += ms

    def event(enable_timing: bool) -> Any:
        mark = SimpleNamespace(at=0.0)
        mark.record = lambda: setattr(mark, "at", now)
        mark.elapsed_time = lambda later: later.at - mark.at
        return mark

    cuda = SimpleNamespace(
        Event=event, device=lambda device: nullcontext(), _sleep=lambda _: log.append("wait"),
        synchronize=lambda device: log.append("sync"),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr("time.perf_counter", lambda: now / 1e3)
    timing = measure(call, torch.device("cuda"), repeats=5, warmup=1)
    assert timing.median_ms == pytest.approx(ms) and timing.repeats == 5
    log.pop()
    queued = log[len(log) - log[::-1].index("sync") :]
    settling = 19 if ms == 8.0 else MAX_CALLS
    assert queued == ["call"] * settling + ["wait"] * (ms < 1) + ["call"] * 5


def test_inputs_rotate_only_where_they_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    assert copies_needed(101 * mib, 50 * mib) == 1
    assert copies_needed(10 * mib, 50 * mib) == 11
    assert copies_needed(1, 50 * mib) == 16
    assert copies_needed(5, 0) == 1
    monkeypatch.setattr("dit_accel.bench.timing.cache_bytes", lambda device: 48)
    inputs = tuple(torch.full((4,), float(i)) for i in range(3))
    rotation = Rotation(inputs)  # type: ignore[arg-type]
    seen = [rotation() for _ in range(6)]
    assert len({s[0].data_ptr() for s in seen}) == 3
    assert all(torch.equal(x, y) for s in seen for x, y in zip(s, inputs, strict=True))


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc1234")
    here = machine(CPU).columns()
    assert here["commit"] == "abc1234" and here["torch"] == torch.__version__
    assert here["threads"] == str(torch.get_num_threads()) and here["machine"].endswith("CPU")
    monkeypatch.delenv("COMMIT")
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


def test_dense_kernels_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package counts when it imports; otherwise its reason is told."""
    cuda = torch.device("cuda")
    dense._function.cache_clear()
    for name in (*dense.FA3_MODULES, *dense.FA4_MODULES):
        monkeypatch.setitem(sys.modules, name, None)
    kernels, missing = dense.present(cuda)
    assert [kernel.name for kernel in kernels] == ["cudnn", "fa2"]
    assert "not installed" in missing["fa3"] and "not installed" in missing["fa4"]

    dense._function.cache_clear()
    fake = types.ModuleType("fa3_fwd_interface")
    fake.flash_attn_func = lambda q, k, v: (q + v, "lse")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake)
    found = {kernel.name: kernel for kernel in dense.present(cuda)[0]}
    one = torch.ones(1, 2, 3, 4)
    assert torch.equal(found["fa3"].run(one, one, one), one + one)
    dense._function.cache_clear()

    kernels, missing = dense.present(CPU)
    assert [kernel.name for kernel in kernels] == ["sdpa"]
    assert missing["cudnn"] == "device cpu: needs CUDA"
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(kernels[0].run(q, k, v), wanted)


def test_what_stands_for_fa3() -> None:
    cudnn = Row("dense", "a", "cudnn", useful_tflops=600.0, ms=2.0)
    fa2 = Row("dense", "a", "fa2", useful_tflops=700.0, ms=1.0)
    fa3 = Row("dense", "a", "fa3", useful_tflops=690.0, ms=1.5)
    assert dense_result([cudnn, fa2]) == DenseResult(fa2, 600.0 * 1.08, "cudnn x 1.08")
    assert dense_result([cudnn, fa3]) == DenseResult(fa3, 690.0, "fa3")
    wrong = Row("dense", "a", "fa3", status=WRONG, useful_tflops=900.0)
    assert dense_result([wrong, fa2]) == DenseResult(fa2, None, "")


def test_csv_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    log = CsvLog(path, {"commit": "abc"})
    log.write(Row("sparse", "a", "triton", ms=1.23456789, note='a "b", c'))
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["ms"], row["commit"], row["error"]) == ("1.2346", "abc", "")
    assert row["note"] == 'a "b", c'
    log.write(Row("sparse", "b", "triton"))
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == 2
    log.close()
    with pytest.raises(DitAccelError, match="cannot be written"):
        CsvLog(path / "x.csv", {})


def test_goals_take_the_best_own_backend_of_the_worst_case() -> None:
    def row(case: str, kernel: str, over: float, density: float = 0.2, status: str = OK) -> Row:
        return Row(
            "sparse", case, kernel, "random", density=density, over_fa3=over, status=status,
            first_call_s=25.0 if kernel == "hopper" else 3.0, next_call_s=0.02,
        )  # fmt: skip

    rows = [
        row("l32768", "triton", 0.71),
        row("l32768", "hopper", 0.95),
        row("l75776", "triton", 0.69),
        row("l75776", "hopper", 0.93),
        row("l75776", "fa4", 0.99),
        row("l75776", "hopper", 0.01, status=WRONG),
    ]
    found = {entry.goal.title: entry for entry in reached(rows)}
    best = found["D128, 128-key blocks, density 0.5 and 0.2"]
    assert (best.value, best.met, best.where) == (0.93, True, "hopper on l75776, density 0.2")
    portable = found["portable path, D128, density 0.2"]
    assert (portable.value, portable.met) == (0.69, False)
    first = found["first call, compilation included"]
    assert (first.value, first.met) == (25.0, False)
    assert found["next call"].met
    assert "whole call, 21x45x80, density 0.1" not in found
    assert len({goal.title for goal in GOALS}) == len(GOALS)
