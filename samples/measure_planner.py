"""Measure a GPU for the planner, and check what the planner then predicts.

    python samples/measure_planner.py --out samples/results/planner_<gpu>.csv

First calls of round sizes are timed and the constants of dit_accel/planner/tables/<gpu>.csv fitted
to them. Then (model, pattern) pairs that took no part in that are timed, predicted from the table
and written side by side to --out. `--check` only does the second part, with the table there is.
Every result is proven against an oracle before it is timed; times are the GPU's, without the host's
part of a call. `--tiny` runs everything on small calls, to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.machine import machine
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import Rotation, measure
from dit_accel.kernels.backends import eligible, moves_tokens
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.tile_choice import LayoutKind
from dit_accel.layout import TokenLayout
from dit_accel.planner.costs import (
    COLUMNS,
    DENSE,
    MACHINE,
    TABLES,
    Constants,
    CostTable,
    cost_table,
    gpu_key,
)
from dit_accel.planner.fit import Sample, fit
from dit_accel.planner.forecast import KINDS, describe
from dit_accel.planner.models import Subject, at_grid, subject

STOCK = ("cudnn", "fa2", "sdpa")
"""Dense kernels that come with torch."""
LENGTHS = (4096, 8192, 16384, 32768)
GRIDS = ((12, 32, 40), (16, 45, 53), (5, 64, 96))
"""Grids that boxes and tiles of 120 tokens do not divide, so that short blocks are there."""
TINY_LENGTHS, TINY_GRIDS = (256, 384), ((3, 9, 10), (5, 6, 13))
HEADS = (4, 16)
HEAD_DIMS = (64, 128)
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_tile", {"window": {"fraction": [0.6, 0.5, 0.5]}}),
    ("sliding_tile", {"window": {"fraction": [1.0, 0.3, 0.3]}}),
    ("neighborhood", {"window": {"fraction": [0.5, 0.5, 0.5]}, "exact": True}),
    ("disc", {"radius": {"fraction": 0.25}, "exact": True}),
    ("radial", {"decay": 0.4, "exact": True}),
    ("attention_tile", {"references": 2, "exact": True}),
    ("temporal_band", {"exact": True}),
)
MODELS = ("wan-1.3b", "wan-14b", "hunyuan", "cogvideox-5b", "ltx", "flux")
CHECKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_tile", {"window": {"fraction": [0.6, 0.4, 0.4]}}),
    ("sliding_tile", {"window": {"fraction": [1.0, 0.5, 0.5]}}),
    ("sliding_tile", {"window": {"tiles": [3, 3, 3]}}),
    ("neighborhood", {"window": {"fraction": [0.4, 0.4, 0.4]}}),
    ("neighborhood", {"window": {"fraction": [0.4, 0.4, 0.4]}, "exact": True}),
    ("radial", {"decay": 0.2}),
    ("spatial_band", {"density": 0.25}),
    ("temporal_band", {"density": 0.25}),
    ("attention_tile", {"references": 4}),
    ("disc", {"radius": {"fraction": 0.3}, "exact": True}),
)
WITHIN = 0.15


@dataclass(frozen=True)
class Bench:
    """Where calls are timed, and how large the round ones are."""

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    repeats: int

    def backends(self, dim: int) -> list[str]:
        """Sparse backends that can run a call here; torch's has no cost of blocks on a GPU."""
        layout = TokenLayout((1, 1, 256))
        inputs = make_inputs(Case("", "", layout, 1, dim), self.dtype, self.device)
        plan = plan_for(layout, pattern("full"), self.device)
        names = [name for name in KINDS if name != "torch" or self.device.type == "cpu"]
        return [name for name in names if eligible(name, *inputs, plan) is None]

    def sparse(
        self, call: Subject, rule: Any, backend: str, kind: LayoutKind
    ) -> tuple[float, BlockPlan] | None:
        """Milliseconds and plan of a proven call, None where the backend cannot run it."""
        plan = plan_for(call.layout, rule, self.device, call.heads, kind)
        case = Case("", "", call.layout, call.heads, call.head_dim)
        inputs = make_inputs(case, self.dtype, self.device)
        if eligible(backend, *inputs, plan) is not None:
            return None
        out = poisoned(lambda: block_sparse_attention(*inputs, plan, backend=backend), inputs[0])
        proof = prove(out, expected_rows(*inputs, plan))
        if not proof.ok:
            raise SystemExit(f"{backend} is wrong on {call.name}, {rule.name}: {proof.why}")
        del out
        given = Rotation(inputs)
        timing = measure(
            lambda: block_sparse_attention(*given(), plan, backend=backend),
            self.device,
            self.repeats,
        )
        return timing.median_ms, plan

    def dense(self, call: Subject) -> float:
        """Milliseconds of the fastest of torch's dense kernels."""
        case = Case("", "", call.layout, call.heads, call.head_dim)
        given = Rotation(make_inputs(case, self.dtype, self.device))
        kernels = [kernel for kernel in dense.present(self.device)[0] if kernel.name in STOCK]
        return min(
            measure(lambda kernel=kernel: kernel.run(*given()), self.device, self.repeats).median_ms
            for kernel in kernels
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="default: the planner's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    bench = Bench(
        device,
        torch.bfloat16 if cuda else torch.float32,
        TINY_LENGTHS if options.tiny else LENGTHS,
        TINY_GRIDS if options.tiny else GRIDS,
        options.repeats,
    )
    here = machine(device)
    path = options.table or TABLES / f"{gpu_key(here.machine)}.csv"
    if not options.check:
        table = calibrated(bench, gpu_key(here.machine))
        write_table(path, table, f"samples/measure_planner.py at {here.commit}")
    found = cost_table(path.stem, path.parent)
    if found is None:
        raise SystemExit(f"there is no table {path}: run without --check first")
    common = {k: getattr(here, k) for k in ("machine", "torch", "triton", "commit", "date")}
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for row in compared(bench, found, options.tiny):
            if writer is None:
                writer = csv.DictWriter(file, [*row, *common])
                writer.writeheader()
            writer.writerow(row | common)
            file.flush()
            rows.append(row)
            print(row, flush=True)
    errors = [abs(float(row["error"])) for row in rows]
    within = sum(error <= WITHIN for error in errors)
    print(
        f"{within} of {len(errors)} pairs within {WITHIN:.0%}; median error "
        f"{statistics.median(errors):.1%}, worst {max(errors):.1%}"
    )


def calibrated(bench: Bench, gpu: str) -> CostTable:
    """Constants of every backend and head_dim, fitted to calls of round sizes."""
    cuda = bench.device.type == "cuda"
    programs = torch.cuda.get_device_properties(bench.device).multi_processor_count if cuda else 1
    constants: dict[tuple[str, int], Constants] = {}
    for dim in HEAD_DIMS:
        constants[DENSE, dim] = fit(list(dense_samples(bench, dim)), programs)
        for backend in bench.backends(dim):
            samples = list(sparse_samples(bench, backend, dim))
            constants[backend, dim] = fit(samples, programs)
            print(backend, dim, constants[backend, dim], flush=True)
    return CostTable(gpu, constants, programs, linear_tflops(bench), copy_gbs(bench))


def dense_samples(bench: Bench, dim: int) -> Iterator[Sample]:
    """Dense calls of round lengths."""
    for length in bench.lengths:
        for heads in HEADS:
            call = at_grid((1, 1, length), heads, dim)
            yield Sample(bench.dense(call), 1, heads, length)


def sparse_samples(bench: Bench, backend: str, dim: int) -> Iterator[Sample]:
    """Whole blocks alone, then patterns with short and masked blocks."""
    calls = [(at_grid((1, 1, n), heads, dim), pattern("full"))
             for n in bench.lengths for heads in HEADS]  # fmt: skip
    for grid in bench.grids:
        calls += [(at_grid(grid, HEADS[-1], dim), pattern(name, **kw)) for name, kw in RULES]
    for call, rule in calls:
        found = bench.sparse(call, rule, backend, KINDS[backend][0])
        if found is not None:
            yield Sample(found[0], 1, call.heads, call.layout.length, found[1])


def compared(bench: Bench, table: CostTable, tiny: bool) -> Iterator[dict[str, Any]]:
    """Measured and predicted milliseconds of each pair, on every backend of the table."""
    for name in MODELS:
        call = shrunk(subject(name)) if tiny else subject(name)
        dense_ms = bench.dense(call)
        predicted_dense = table.dense_ms(1, call.heads, call.layout.length, call.head_dim)
        for rule_name, parameters in CHECKS:
            rule = pattern(rule_name, **parameters)
            for backend, kind in ((b, kind) for b in table.backends for kind in KINDS[b]):
                found = bench.sparse(call, rule, backend, kind)
                if found is None:
                    continue
                ms, plan = found
                moved = moves_tokens(backend, plan)
                predicted = table.sparse_ms(
                    plan, backend, 1, call.heads, call.head_dim, moved=moved
                )
                yield {
                    "model": name,
                    "tokens": call.layout.length,
                    "heads": call.heads,
                    "head_dim": call.head_dim,
                    "pattern": rule_name,
                    "parameters": describe(rule),
                    "backend": backend,
                    "blocks": kind,
                    "moved": moved,
                    "launched_density": round(plan.launched_density(backend), 4),
                    "dense_ms": round(dense_ms, 4),
                    "predicted_dense_ms": round(predicted_dense, 4),
                    "measured_ms": round(ms, 4),
                    "predicted_ms": round(predicted, 4),
                    "error": round(predicted / ms - 1, 4),
                }


def shrunk(call: Subject) -> Subject:
    """The same kind of call, small enough for a CPU."""
    t, h, w = (min(n, most) for n, most in zip(call.layout.grid, (3, 10, 11), strict=True))
    before, after = min(call.layout.before, 13), min(call.layout.after, 13)
    return dataclasses.replace(call, layout=TokenLayout((t, h, w), before, after), heads=2)


def linear_tflops(bench: Bench) -> float:
    """Of a feed-forward layer as wide as Wan 14B's."""
    tokens, width, inner = (32768, 5120, 13824) if bench.device.type == "cuda" else (256, 256, 512)
    x = torch.randn(tokens, width, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(inner, width, device=bench.device, dtype=bench.dtype)
    ms = measure(lambda: torch.nn.functional.linear(x, weight), bench.device).median_ms
    return 2 * tokens * width * inner / ms / 1e9


def copy_gbs(bench: Bench) -> float:
    """Bytes read and written by a copy, in GB/s."""
    size = 1 << 30 if bench.device.type == "cuda" else 1 << 22
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), bench.device).median_ms
    return 2 * size / ms / 1e6


def write_table(path: Path, table: CostTable, source: str) -> None:
    """The table as the planner reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int, str, float, str]] = [
        (MACHINE, 0, "programs", table.programs, ""),
        (MACHINE, 0, "linear_tflops", table.linear_tflops, "TFLOP/s"),
        (MACHINE, 0, "copy_gbs", table.copy_gbs, "GB/s"),
    ]
    for (backend, dim), known in table.constants.items():
        for name in ("launch", "row", "whole", "short", "partial"):
            rows.append((backend, dim, name, getattr(known, name), "ns"))
        rows += [
            (backend, dim, f"partial_{rule}", value, "ns") for rule, value in known.rules.items()
        ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for backend, dim, constant, value, unit in rows:
            writer.writerow([backend, dim, constant, f"{value:.6g}", unit, source])


if __name__ == "__main__":
    main()
