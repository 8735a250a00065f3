"""Whole calls as a model makes them, and the ceilings of the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.kernels import Options, dense_result
from dit_accel.bench.plans import sliding_tile
from dit_accel.bench.proof import expected_rows, prove
from dit_accel.bench.records import OK, SKIPPED, WRONG, Row
from dit_accel.bench.timing import measure, measure_wall
from dit_accel.kernels.backends import eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.permute import block_order, gather

WHOLE_CASE, WHOLE_DENSITY = "21x45x80", 0.1
LOOKUPS = 1000
MATMUL, TINY_MATMUL = 8192, 256
COPY_BYTES, TINY_COPY_BYTES = 2 << 30, 1 << 20


def whole_calls(case: Case, dense_rows: list[Row], options: Options) -> Iterator[Row]:
    """For each backend: plan from the cache and kernel, timed by the host, over dense attention.

    dense_rows: what `measure_case` found on this case; the fastest dense kernel and FA3 are timed
    again in the same way, host included.
    """
    q, k, v = make_inputs(case, options.dtype, options.device)
    fastest, fa3 = _dense_walls(q, k, v, dense_rows, options)
    for backend in options.backends:
        row = Row(
            "whole call", case.name, backend, "sliding_tile", density=WHOLE_DENSITY,
            batch=1, heads=case.heads, tokens=case.layout.length, head_dim=case.head_dim,
            dtype=str(options.dtype).removeprefix("torch."),
        )  # fmt: skip
        pattern, kind = sliding_tile(
            case.layout, WHOLE_DENSITY, backend, options.device, options.tile
        )
        place = (case.layout, pattern, options.device, None, kind)
        plan = plan_for(*place)
        if (reason := eligible(backend, q, k, v, plan)) is not None:
            yield replace(row, status=SKIPPED, note=reason)
            continue

        def call(place: tuple = place, backend: str = backend) -> Tensor:
            return block_sparse_attention(q, k, v, plan_for(*place), backend=backend)

        proof = prove(call(), expected_rows(q, k, v, plan))
        row = replace(row, error=proof.error, launched_density=plan.launched_density(backend))
        if not proof.ok:
            yield replace(row, status=WRONG, note=proof.why)
            continue
        timing = measure_wall(call, options.device, options.repeats)
        begin = time.perf_counter()
        for _ in range(LOOKUPS):
            plan_for(*place)
        lookup_ms = (time.perf_counter() - begin) / LOOKUPS * 1e3
        yield replace(
            row,
            ms=timing.median_ms,
            best_ms=timing.best_ms,
            worst_ms=timing.worst_ms,
            repeats=timing.repeats,
            kept_density=plan.kept_density(),
            lookup_share=lookup_ms / timing.median_ms,
            fastest_dense=fastest[0],
            speedup=fastest[1] / timing.median_ms if fastest[1] else None,
            over_fa3=fa3[1] / timing.median_ms if fa3[1] else None,
            fa3_is=fa3[0],
        )


def _dense_walls(
    q: Tensor, k: Tensor, v: Tensor, rows: list[Row], options: Options
) -> tuple[tuple[str, float | None], tuple[str, float | None]]:
    """(name, wall ms) of the fastest dense kernel, and of FA3 or what stands for it."""
    kernels = {kernel.name: kernel for kernel in dense.DENSE}

    def wall(name: str) -> float:
        return measure_wall(
            lambda: kernels[name].run(q, k, v), options.device, options.repeats
        ).median_ms

    right = [row.kernel for row in rows if row.what == "dense" and row.status == OK]
    found = dense_result([row for row in rows if row.what == "dense"])
    fastest = found.fastest
    first = (fastest.kernel, wall(fastest.kernel)) if fastest else ("", None)
    if "fa3" in right:
        return first, ("fa3", wall("fa3"))
    if "cudnn" in right:
        return first, (found.fa3_is, wall("cudnn") / dense.CUDNN_TO_FA3)
    return first, ("", None)


def permutation(case: Case, copy_gbytes_per_s: float, options: Options) -> Row:
    """q, k and v into block order in one pass, as backends that read no tiles need it.

    Bytes: each tensor and the index are read once and each result is written once.
    """
    q, k, v = inputs = make_inputs(case, options.dtype, options.device)
    pattern, _ = sliding_tile(case.layout, WHOLE_DENSITY, "triton", options.device, options.tile)
    plan = plan_for(case.layout, pattern, options.device, layout_kind="gather")
    index = block_order(plan.blocks.k, plan.shape.block_k)
    row = Row(
        "permutation", case.name, "q, k, v to block order", "sliding_tile", batch=1,
        heads=case.heads, tokens=case.layout.length, head_dim=case.head_dim,
        dtype=str(options.dtype).removeprefix("torch."),
    )  # fmt: skip
    real = index >= 0
    for before, after in zip(inputs, gather(inputs, index), strict=True):
        if not torch.equal(after[:, real], before[:, index[real].long()]) or after[:, ~real].any():
            return replace(row, status=WRONG, note="tokens are not where the order says")
    timing = measure(lambda: gather(inputs, index), options.device, options.repeats)
    moved = sum(x.nbytes + x[:, :1].nbytes * len(index) for x in (q, k, v)) + index.nbytes
    rate = moved / timing.median_ms / 1e6
    return replace(
        row,
        ms=timing.median_ms,
        best_ms=timing.best_ms,
        worst_ms=timing.worst_ms,
        repeats=timing.repeats,
        gbytes_per_s=rate,
        over_copy=copy_gbytes_per_s / rate,
    )


def ceilings(options: Options, tiny: bool = False) -> Iterator[Row]:
    """How fast the machine copies memory and multiplies square matrices."""
    size = TINY_MATMUL if tiny else MATMUL
    a, b = (torch.randn(size, size, device=options.device, dtype=options.dtype) for _ in range(2))
    timing = measure(lambda: a @ b, options.device, options.repeats)
    dtype = str(options.dtype).removeprefix("torch.")
    yield Row(
        "ceiling", "", f"matmul {size}^3", dtype=dtype, ms=timing.median_ms,
        best_ms=timing.best_ms, worst_ms=timing.worst_ms, repeats=timing.repeats,
        useful_tflops=2 * size**3 / timing.median_ms / 1e9,
    )  # fmt: skip
    source = torch.zeros(
        TINY_COPY_BYTES if tiny else COPY_BYTES, dtype=torch.uint8, device=options.device
    )
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), options.device, options.repeats)
    yield Row(
        "ceiling", "", "copy", ms=timing.median_ms, best_ms=timing.best_ms,
        worst_ms=timing.worst_ms, repeats=timing.repeats,
        gbytes_per_s=2 * source.nbytes / timing.median_ms / 1e6,
    )  # fmt: skip
