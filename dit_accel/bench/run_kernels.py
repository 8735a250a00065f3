"""`dit-accel bench kernels` as a whole: cases in, rows to the CSV file and tables out."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dit_accel.bench import table
from dit_accel.bench.cases import (
    DENSITIES,
    QUICK_DENSITIES,
    Case,
    check_densities,
    pick_cases,
)
from dit_accel.bench.goals import reached
from dit_accel.bench.kernels import Options, default_backends, measure_case
from dit_accel.bench.machine import machine
from dit_accel.bench.plans import parse_tile, pick_kinds
from dit_accel.bench.records import FAILED, OK, SKIPPED, WRONG, CsvLog, Row
from dit_accel.bench.whole import WHOLE_CASE, ceilings, permutation, whole_calls
from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.backends import BACKENDS


class WrongResult(RuntimeError):
    """A kernel computed something else than attention over its plan, or raised."""


@dataclass(frozen=True)
class KernelRequest:
    """What was asked on the command line; empty means the default.

    quick: the cases that goals are set for, at most 8 heads elsewhere, three densities.
    tiny: cases cut down to what a CPU does in seconds.
    """

    device: torch.device
    dtype: torch.dtype
    cases: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    plans: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    heads: int | None = None
    repeats: int = 10
    tile: str = "auto"
    quick: bool = False
    tiny: bool = False
    extras: bool = True
    out: Path | None = None


def run_kernels(request: KernelRequest, console: Console) -> list[Row]:
    """Measure, print and log everything that was asked.

    Raises DitAccelError for bad input and where no backend could run, WrongResult at the end if
    any result was wrong or an eligible backend failed.
    """
    cases = pick_cases(request.cases, quick=request.quick, tiny=request.tiny, heads=request.heads)
    options = _options(request)
    here = machine(request.device)
    log = CsvLog(request.out, here.columns())
    console.print(table.machine_line(here), highlight=False, soft_wrap=True)
    rows: list[Row] = []
    try:
        for case in cases:
            rows += _run_case(case, options, console, log)
            if case.name == WHOLE_CASE and request.extras:
                dense = [row for row in rows if row.what == "dense" and row.case == case.name]
                rows += _logged(whole_calls(case, dense, options), log)
            _free()
        if request.extras:
            rows += _logged(ceilings(options, request.tiny), log)
            rows += _logged(_permutations(cases, rows, options), log)
    finally:
        log.close()
    _print_rest(rows, console, request.tiny)
    _check(rows)
    return rows


def _options(request: KernelRequest) -> Options:
    for name in request.backends:
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
    densities = QUICK_DENSITIES if request.quick else DENSITIES
    return Options(
        backends=request.backends or default_backends(request.device, request.quick),
        kinds=pick_kinds(request.plans, request.quick),
        densities=check_densities(request.densities or densities, "--densities"),
        dtype=request.dtype,
        device=request.device,
        repeats=request.repeats,
        tile=parse_tile(request.tile),
    )


def _run_case(case: Case, options: Options, console: Console, log: CsvLog) -> list[Row]:
    rows = _logged(measure_case(case, options), log)
    sizes = f"{case.layout.length:,} tokens, {case.heads} heads of {case.head_dim}"
    title = f"{case.name} ({case.title}): {sizes}"
    dense = [row for row in rows if row.what == "dense"]
    sparse = [row for row in rows if row.what == "sparse"]
    table.show(console, title, table.dense_table(dense))
    table.show(console, title, table.sparse_table(_worth_showing(sparse)))
    return rows


def _worth_showing(rows: Sequence[Row]) -> list[Row]:
    """Without repeating for each plan that a backend cannot run at all."""
    shown: list[Row] = []
    absent: set[str] = set()
    for row in rows:
        whole_machine = row.status == SKIPPED and BACKENDS[row.kernel].machine() == row.note
        if not (whole_machine and row.kernel in absent):
            shown.append(row)
        if whole_machine:
            absent.add(row.kernel)
    return shown


def _logged(rows: Iterable[Row], log: CsvLog) -> list[Row]:
    done = []
    for row in rows:
        log.write(row)
        done.append(row)
    return done


def _permutations(cases: Sequence[Case], rows: Sequence[Row], options: Options) -> Iterable[Row]:
    copy = next(row.gbytes_per_s for row in rows if row.kernel == "copy")
    case = next((case for case in cases if case.name == WHOLE_CASE), None)
    return [permutation(case, copy or 0.0, options)] if case else []


def _print_rest(rows: Sequence[Row], console: Console, tiny: bool) -> None:
    others = [row for row in rows if row.what in ("whole call", "permutation", "ceiling")]
    if others:
        table.show(console, "Whole calls and ceilings", table.other_table(others))
    if not tiny and (goals := reached(rows)):
        table.show(console, "Goals", table.goals_table(goals))


def _check(rows: Sequence[Row]) -> None:
    wrong = [r for r in rows if r.status == WRONG or (r.status == FAILED and r.what != "dense")]
    if wrong:
        named = "; ".join(
            " ".join(str(part) for part in (r.kernel, "on", r.case, r.plan, r.density) if part)
            + f": {r.status}, {r.note}"
            for r in wrong
        )
        raise WrongResult(f"{len(wrong)} results are wrong or failed, and have no speed: {named}")
    sparse = [row for row in rows if row.what == "sparse"]
    if not any(row.status == OK for row in sparse):
        reasons = dict.fromkeys(f"{r.kernel}: {r.note}" for r in sparse)
        raise DitAccelError(f"no backend could run: {'; '.join(reasons) or 'nothing to measure'}.")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
