"""`dit-accel bench kernels` from the command line, on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.bench.cases import CASES, Case
from dit_accel.kernels.backends import BACKENDS, Backend
from dit_accel.layout import TokenLayout

Run = Callable[..., tuple[int, str]]
Rows = Callable[[str], list[dict[str, str]]]
TORCH = BACKENDS["torch"]


def wrong(change: Callable[[torch.Tensor], torch.Tensor]) -> Backend:
    """The torch backend with a mistake."""

    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = TORCH.forward(*args)
        return change(out), lse

    return dataclasses.replace(TORCH, forward=forward)


def test_the_whole_path(bench: Run, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc1234")
    code, text = bench(
        "kernels", "--tiny", "--cases", "21x45x80", "--densities", "0.5,0.1", "--backend",
        "torch", "--backend", "hopper", "--repeats", "3", "--device", "cpu", "--out", "k.csv",
    )  # fmt: skip
    assert code == 0, text
    written = rows("k.csv")
    sparse = [row for row in written if row["what"] == "sparse" and row["kernel"] == "torch"]
    cells = [(row["plan"], float(row["density"])) for row in sparse]
    kinds = ("random", "gather64", "sliding_tile", "per_head")
    assert cells == [(kind, density) for kind in kinds for density in (0.5, 0.1)]
    for row in sparse:
        assert row["status"] == "ok" and float(row["error"]) < 1e-4 and row["commit"] == "abc1234"
        kept, ms = float(row["kept_density"]), float(row["ms"])
        pairs = 2 * int(row["tokens"]) ** 2 * kept
        rate = 4 * pairs * int(row["head_dim"]) / (ms / 1e3) / 1e12
        assert float(row["useful_tflops"]) == pytest.approx(rate, rel=1e-3)
        assert row["fastest_dense"] == "sdpa" and row["over_fa3"] == ""
    dense = next(r for r in written if r["what"] == "dense" and r["kernel"] == "sdpa")
    ratio = float(sparse[0]["useful_tflops"]) / float(dense["useful_tflops"])
    assert float(sparse[0]["over_dense"]) == pytest.approx(ratio, rel=1e-3)
    speedup = float(dense["ms"]) / float(sparse[0]["ms"])
    assert float(sparse[0]["speedup"]) == pytest.approx(speedup, rel=1e-3)
    hopper = next(row for row in written if row["kernel"] == "hopper")
    assert hopper["status"] == "skipped" and hopper["note"] and not hopper["ms"]
    whole = next(r for r in written if r["what"] == "whole call" and r["kernel"] == "torch")
    assert 0 < float(whole["lookup_share"]) < 0.5 and float(whole["speedup"]) > 0
    ceilings = {row["kernel"]: row for row in written if row["what"] == "ceiling"}
    assert float(ceilings["copy"]["gbytes_per_s"]) > 0.1
    assert float(ceilings["matmul 256^3"]["useful_tflops"]) > 0
    moved = next(row for row in written if row["what"] == "permutation")
    rate, copy = float(moved["gbytes_per_s"]), float(ceilings["copy"]["gbytes_per_s"])
    assert moved["status"] == "ok" and float(moved["over_copy"]) == pytest.approx(copy / rate, 1e-3)
    assert f"skipped: {hopper['note']}" in text and "sliding_tile" in text


def test_the_interpreted_kernel(bench: Run, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    small = Case("small", "a small grid", TokenLayout((1, 5, 7), 3), 1, 32)
    monkeypatch.setitem(CASES, "small", small)
    code, text = bench(
        "kernels", "--cases", "small", "--densities", "0.5", "--plans", "sliding_tile",
        "--backend", "triton", "--repeats", "3", "--device", "cpu", "--no-extras", "--out", "k.csv",
    )  # fmt: skip
    assert code == 0, text
    (row,) = (row for row in rows("k.csv") if row["what"] == "sparse")
    assert (row["status"], row["kernel"]) == ("ok", "triton") and float(row["error"]) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out * 1.01,
        lambda out: torch.where(torch.arange(out.shape[1])[:, None, None] == 7, torch.nan, out),
        lambda out: out.flip(2),
    ],
    ids=["scaled", "unwritten row", "heads swapped"],
)
def test_a_wrong_kernel_gets_no_speed(
    change: Callable[[torch.Tensor], torch.Tensor],
    bench: Run,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "broken", wrong(change))
    code, text = bench(
        "kernels", "--tiny", "--cases", "l32768", "--densities", "0.5", "--plans", "random",
        "--backend", "broken,torch", "--repeats", "3", "--no-extras", "--device", "cpu",
        "--out", "k.csv",
    )  # fmt: skip
    assert code == 1
    by_name = {row["kernel"]: row for row in rows("k.csv") if row["what"] == "sparse"}
    assert by_name["broken"]["status"] == "WRONG" and by_name["torch"]["status"] == "ok"
    for speed in ("ms", "best_ms", "useful_tflops", "launched_tflops", "speedup", "over_dense"):
        assert by_name["broken"][speed] == "" and by_name["torch"][speed] != ""
    assert "1 results are wrong" in text and "broken on l32768 random 0.5: WRONG" in text


def test_a_kernel_that_raises(bench: Run, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed, the others are measured, and the command fails; unable is not failing."""

    def forward(*args: Any) -> Any:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(BACKENDS, "broken", dataclasses.replace(TORCH, forward=forward))
    unable = dataclasses.replace(TORCH, obstacle=lambda *args: "head_dim 64: needs 7")
    monkeypatch.setitem(BACKENDS, "unable", unable)
    args = ("kernels", "--tiny", "--cases", "l32768", "--densities", "0.5", "--plans", "random",
            "--no-extras", "--out", "k.csv", "--repeats", "3", "--device", "cpu")  # fmt: skip
    code, text = bench(*args, "--backend", "broken,unable,torch")
    assert code == 1 and "broken on l32768 random 0.5: FAILED" in text
    status = {row["kernel"]: (row["status"], row["note"]) for row in rows("k.csv")}
    assert status["broken"] == ("FAILED", "RuntimeError: no kernel image")
    assert status["unable"] == ("skipped", "head_dim 64: needs 7")
    assert status["torch"][0] == "ok"
    assert bench(*args, "--backend", "unable,torch")[0] == 0
    code, text = bench(*args, "--backend", "unable")
    assert code == 2 and "unable: head_dim 64: needs 7" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--cases", "wan-14"), "Did you mean 'wan-14b'?"),
        (("--backend", "tritn"), "Did you mean 'triton'?"),
        (("--plans", "slidingtile"), "Did you mean 'sliding_tile'?"),
        (
            ("--densities", "0.5,2"),
            "--densities: expected numbers in (0, 1], got 2; the nearest is",
        ),
        (("--densities", "half"), "expected numbers separated by commas"),
        (("--tile", "2,8"), "three sizes such as 2,8,8"),
        (("--repeats", "1"), "--repeats"),
        (("--dtype", "int8"), "nknown dtype 'int8'"),
    ],
)
def test_bad_input(args: tuple[str, ...], said: str, bench: Run) -> None:
    code, text = bench("kernels", "--tiny", "--device", "cpu", *args)
    assert code == 2 and said in text


def test_help_is_quick_and_names_both_commands(bench: Run) -> None:
    code, text = bench("--help")
    assert code == 0 and "kernels" in text and "step" in text
