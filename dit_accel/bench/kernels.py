"""`bench kernels`: prove each backend on each plan of a case, then time it beside dense kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.plans import PLAN_KINDS, layout_kinds_of
from dit_accel.bench.proof import Expected, expected_dense, expected_rows, poisoned, prove
from dit_accel.bench.records import FAILED, OK, SKIPPED, WRONG, Row
from dit_accel.bench.timing import Rotation, first_calls, measure
from dit_accel.kernels.backends import BACKENDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.machine import interpreted
from dit_accel.kernels.plan import BlockPlan

FAILURE_LENGTH = 160


@dataclass(frozen=True)
class Options:
    """What to measure a case with.

    backends: names of `BACKENDS`; tile: of sliding tile plans, "auto" or (t, h, w).
    """

    backends: tuple[str, ...]
    kinds: tuple[str, ...]
    densities: tuple[float, ...]
    dtype: torch.dtype
    device: torch.device
    repeats: int = 10
    tile: object = "auto"


@dataclass(frozen=True)
class DenseResult:
    """The dense rows of a case, and what ratios are taken over."""

    fastest: Row | None
    fa3_tflops: float | None
    fa3_is: str


def default_backends(device: torch.device, quick: bool = False) -> tuple[str, ...]:
    """Backends worth measuring on a device: its kernels, without the oracle.

    quick: without FlexAttention, which compiles anew for each plan.
    """
    if device.type == "cpu":
        return ("torch", "triton") if interpreted() else ("torch",)
    left_out = ("torch", "reference", "flex") if quick else ("torch", "reference")
    return tuple(name for name in BACKENDS if name not in left_out)


def measure_case(case: Case, options: Options) -> Iterator[Row]:
    """Rows of a case: the dense kernels, then each backend on each plan.

    A backend or a kernel that cannot run gets a row with its reason.
    """
    try:
        q, k, v = make_inputs(case, options.dtype, options.device)
    except torch.OutOfMemoryError as error:
        yield Row("sparse", case.name, "", status=SKIPPED, note=_short(error))
        return
    inputs = Rotation((q, k, v))
    rows = []
    for row in _dense_rows(case, inputs, options):
        rows.append(row)
        yield row
    found = dense_result(rows)
    for kind in options.kinds:
        if PLAN_KINDS[kind].needs_grid and not case.video:
            continue
        for density in options.densities:
            yield from _plan_rows(case, kind, density, inputs, found, options)


def dense_result(rows: list[Row]) -> DenseResult:
    """The fastest of the dense kernels that are right, and the speed that stands for FA3."""
    right = {row.kernel: row for row in rows if row.status == OK and row.useful_tflops}
    fastest = max(right.values(), key=lambda row: row.useful_tflops or 0.0, default=None)
    if "fa3" in right:
        return DenseResult(fastest, right["fa3"].useful_tflops, "fa3")
    if "cudnn" in right:
        stand_in = (right["cudnn"].useful_tflops or 0.0) * dense.CUDNN_TO_FA3
        return DenseResult(fastest, stand_in, f"cudnn x {dense.CUDNN_TO_FA3}")
    return DenseResult(fastest, None, "")


def _dense_rows(case: Case, inputs: Rotation, options: Options) -> Iterator[Row]:
    base = base_row("dense", case, "", options)
    kernels, missing = dense.present(options.device)
    for name, why in missing.items():
        yield replace(base, kernel=name, status=SKIPPED, note=why)
    q, k, v = inputs.sets[0]
    expected = expected_dense(q, k, v)
    for kernel in kernels:
        blank = replace(base, kernel=kernel.name, density=1.0, kept_density=1.0)
        yield _proven(blank, kernel.run, inputs, expected, case, options)


def _plan_rows(
    case: Case, kind: str, density: float, inputs: Rotation, found: DenseResult, options: Options
) -> Iterator[Row]:
    """Every backend on one plan; FA4's block-sparse kernel first, as the others refer to it."""
    made: dict[tuple[str, ...], tuple[BlockPlan, str, list[Expected]]] = {}
    fa4: float | None = None
    q, k, v = inputs.sets[0]
    for backend in sorted(options.backends, key=lambda name: name != "fa4"):
        row = replace(base_row("sparse", case, backend, options), plan=kind, density=density)
        if (reason := BACKENDS[backend].machine()) is not None:
            yield replace(row, status=SKIPPED, note=reason)
            continue
        kinds = layout_kinds_of(backend, options.device)
        if kinds not in made:
            try:
                plan, note = PLAN_KINDS[kind].build(
                    case, density, options.device, backend, options.tile
                )
                made[kinds] = plan, note, expected_rows(q, k, v, plan)
            except torch.OutOfMemoryError as error:
                yield replace(row, status=SKIPPED, note=_short(error))
                continue
        plan, note, expected = made[kinds]
        row = replace(
            row,
            note=note,
            blocks=f"{plan.shape.block_q}x{plan.shape.block_k}",
            launched_density=plan.launched_density(backend),
            kept_density=plan.kept_density(),
        )
        if (reason := eligible(backend, q, k, v, plan)) is not None:
            yield replace(row, status=SKIPPED, note=reason)
            continue
        attend = partial(block_sparse_attention, plan=plan, backend=backend)
        row = _proven(row, attend, inputs, expected, case, options)
        if backend == "fa4" and row.useful_tflops:
            fa4 = row.useful_tflops  # of random blocks: the same plan for all
        yield _with_ratios(row, found, fa4)


def _proven(
    row: Row,
    attend: Callable[..., Any],
    inputs: Rotation,
    expected: list[Expected],
    case: Case,
    options: Options,
) -> Row:
    """The row with its proof, and with times of attend(q, k, v) where the result is right."""
    results: list[Tensor] = []
    own = inputs.sets[0]

    def first() -> None:
        results[:] = [poisoned(lambda: attend(*own), own[0])]

    try:
        first_s, next_s = first_calls(first, options.device)
        proof = prove(results.pop(), expected)
        row = replace(row, error=proof.error, first_call_s=first_s, next_call_s=next_s)
        if not proof.ok:
            return replace(row, status=WRONG, note=proof.why)
        timing = measure(lambda: attend(*inputs()), options.device, options.repeats, warmup=1)
    except torch.OutOfMemoryError as error:
        return replace(row, status=SKIPPED, note=_short(error))
    except Exception as error:  # compilers, drivers and libraries fail in many ways
        return replace(row, status=FAILED, note=_short(error))
    dense_flops = 4.0 * case.heads * case.layout.length**2 * case.head_dim
    rate = dense_flops / timing.median_ms / 1e9
    launched = 1.0 if row.launched_density is None else row.launched_density
    return replace(
        row,
        **timing.columns(),
        useful_tflops=rate * (row.kept_density or 0.0),
        launched_tflops=rate * launched,
    )


def _with_ratios(row: Row, found: DenseResult, fa4: float | None) -> Row:
    if row.useful_tflops is None or row.ms is None:
        return row
    fastest = found.fastest
    return replace(
        row,
        fastest_dense=fastest.kernel if fastest else "",
        over_dense=row.useful_tflops / fastest.useful_tflops
        if fastest and fastest.useful_tflops
        else None,
        over_fa3=row.useful_tflops / found.fa3_tflops if found.fa3_tflops else None,
        fa3_is=found.fa3_is,
        over_fa4=row.useful_tflops / fa4 if fa4 else None,
        speedup=fastest.ms / row.ms if fastest and fastest.ms else None,
    )


def base_row(what: str, case: Case, kernel: str, options: Options) -> Row:
    """A row of a case before anything is measured."""
    return Row(
        what,
        case.name,
        kernel,
        batch=1,
        heads=case.heads,
        tokens=case.layout.length,
        head_dim=case.head_dim,
        dtype=str(options.dtype).removeprefix("torch."),
    )


def _short(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {line}"[:FAILURE_LENGTH]
