"""Rows of results, and the CSV file that holds each of them as soon as it is known."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from dit_accel.errors import DitAccelError

OK, WRONG, FAILED, SKIPPED = "ok", "WRONG", "FAILED", "skipped"


@dataclass(frozen=True)
class Row:
    """One measurement of `bench kernels`; None where a column says nothing about it.

    what: "sparse", "dense", "whole call" (host included), "permutation" or "ceiling".
    kernel: the backend, the dense kernel, or which ceiling.
    plan: the kind of plan. blocks: query x key slots of a block.
    density: what was asked. launched_density, kept_density: see `BlockPlan`.
    status: "ok", "WRONG" (not timed), "FAILED" (raised) or "skipped" (cannot run here); `note` then
        says why.
    error: relative L2 error of the proof, worst sample.
    ms: median of `repeats` calls. useful_tflops counts 4 x kept token pairs x head_dim,
        launched_tflops launched slots instead.
    over_dense, over_fa3: useful_tflops over the useful_tflops of the fastest dense kernel and of
        FA3 on the same shape; `fa3_is` names what stood in for FA3. over_fa4: over FA4's
        block-sparse kernel on the same plan.
    speedup: time of the fastest dense call over this one's. For a whole call `over_fa3` is that of
        FA3.
    first_call_s: first call in this process, which may compile. next_call_s: the one after it.
    lookup_share: of a whole call, the part that taking the plan from the cache costs.
    gbytes_per_s: bytes read and written, for copies and permutations. over_copy: time over that of
        copying as many bytes.
    """

    what: str
    case: str
    kernel: str
    plan: str = ""
    status: str = OK
    note: str = ""
    batch: int | None = None
    heads: int | None = None
    tokens: int | None = None
    head_dim: int | None = None
    dtype: str = ""
    blocks: str = ""
    density: float | None = None
    launched_density: float | None = None
    kept_density: float | None = None
    error: float | None = None
    ms: float | None = None
    best_ms: float | None = None
    worst_ms: float | None = None
    repeats: int | None = None
    useful_tflops: float | None = None
    launched_tflops: float | None = None
    fastest_dense: str = ""
    over_dense: float | None = None
    over_fa3: float | None = None
    fa3_is: str = ""
    over_fa4: float | None = None
    speedup: float | None = None
    first_call_s: float | None = None
    next_call_s: float | None = None
    lookup_share: float | None = None
    gbytes_per_s: float | None = None
    over_copy: float | None = None


@dataclass(frozen=True)
class StepRow:
    """One variant of a step; None where a column says nothing about it.

    what: "dense" (stock diffusers) or "profile". mode: "eager" or "compiled" (repeated blocks).
    layers: blocks built, of layers_of in the checkpoint. dense_kernel: diffusers' backend.
    ms: median of `repeats` forwards. first_ms: the first one, with what it compiles.
    attention_ms: all attention calls of a forward; self_attention_ms: those over the video. Both
        are measured with events, for dense in an eager forward.
    launched_density, kept_density: means over the self-attention calls that ran sparse.
    sparse, dense_calls: self-attention calls of a forward, and `reasons` of the dense ones.
    reused: self- and cross-attention calls of a forward.
    change: relative L2 difference of the output from dense (random weights: it says that the
        profile did something, nothing about quality).
    bound: Amdahl's (see `bench.step`). of_bound: speedup over it.
    """

    what: str
    model: str
    profile: str = ""
    mode: str = "eager"
    status: str = "ok"
    note: str = ""
    layers: int | None = None
    layers_of: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    tokens: int | None = None
    dtype: str = ""
    dense_kernel: str = ""
    ms: float | None = None
    best_ms: float | None = None
    worst_ms: float | None = None
    repeats: int | None = None
    first_ms: float | None = None
    attention_ms: float | None = None
    self_attention_ms: float | None = None
    attention_share: float | None = None
    peak_gib: float | None = None
    backend: str = ""
    launched_density: float | None = None
    kept_density: float | None = None
    sparse: float | None = None
    reused: float | None = None
    dense_calls: float | None = None
    reasons: str = ""
    change: float | None = None
    speedup: float | None = None
    bound: float | None = None
    of_bound: float | None = None
    peak_over_dense: float | None = None


class CsvLog:
    """A CSV file that gets one row at a time, each on disk before the next is measured.

    Raises DitAccelError where the file cannot be written.
    """

    def __init__(self, path: Path | None, common: Mapping[str, str]) -> None:
        self._common = dict(common)
        self._file: TextIO | None = None
        self._writer: csv.DictWriter[str] | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise DitAccelError(f"--out {path}: cannot be written ({error.strerror}).") from error

    def write(self, row: Any) -> None:
        """Append a dataclass's fields and the common columns."""
        if self._file is None:
            return
        cells = {f.name: _cell(getattr(row, f.name)) for f in fields(row)} | self._common
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(cells))
            self._writer.writeheader()
        self._writer.writerow(cells)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value
