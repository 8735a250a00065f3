"""Measure a GPU for the planner, and check what the planner then predicts.

    python samples/measure_planner.py --out samples/results/planner_<gpu>.csv

Several processes compile every call and prove its result against an oracle. Then, alone on the
GPU, calls of round sizes are timed, and the constants of dit_accel/planner/tables/<gpu>.csv
fitted to them; then (model, pattern) pairs that took no part in that, predicted from the table and
written side by side to --out. `--check` leaves the table as it is. Times are the GPU's, without the
host's part of a call. `--tiny` runs everything on small calls, to try the script where there is no
GPU. About 150 s with nothing compiled before, on one GPU with 16 cores. `--times` keeps what was
measured, and `--replay` fits and compares again from such a file, on any machine.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.machine import machine
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import Rotation, measure
from dit_accel.breakeven import effort
from dit_accel.kernels.backends import BACKENDS, LAYOUT_KINDS, eligible, moves_tokens
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import Pattern, pattern, plan_for
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
    kernel_of,
)
from dit_accel.planner.fit import Sample, fit
from dit_accel.planner.forecast import describe
from dit_accel.planner.models import Subject, at_grid, subject

STOCK = ("cudnn", "fa2", "sdpa")
"""Dense kernels that come with torch."""
LENGTHS = (4096, 8192, 16384, 32768)
RAGGED = 72
"""Dense calls are also timed so many tokens shorter: no kernel's blocks divide them."""
GRIDS = (
    ((12, 32, 40), 0), ((16, 45, 53), 0), ((5, 30, 44), 0), ((5, 64, 96), 256), ((3, 40, 45), 226),
)  # fmt: skip
"""Grids and text tokens: boxes and tiles do not divide them all, so that short blocks are there."""
TINY_LENGTHS, TINY_GRIDS = (128, 192), (((3, 6, 9), 0), ((4, 5, 11), 7))
HEADS, TINY_HEADS = (4, 16), (1, 2)
TINY_GRID = (3, 7, 9)
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
SHARED = {"hopper mixed": ("launch", "row"), "triton gathered": ("launch",)}
"""Constants that another kernel of a backend has in common with its first one."""
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
PATTERNS_EACH = 2
"""Each model takes every second of these patterns, in turn from the first and from the second."""
WITHIN = 0.15
LONG = 5e13
"""Floating-point operations after which a call is not repeated again, past LEAST times."""
LEAST = 3
HEAT_S = 0.12
"""Seconds of work before a call is timed: in a model a GPU is as hot, and so as slow, as then."""


TIMES: dict[str, float] = {}
"""What was measured, by name: milliseconds of calls, and what is known of the GPU."""


@dataclass(frozen=True)
class Job:
    """A call, the pattern that makes its plan, who runs it, and how that one reads blocks."""

    call: Subject
    rule: Pattern
    backend: str
    kind: LayoutKind

    @property
    def name(self) -> str:
        """What its time is kept under."""
        return (
            f"{called(self.call)} {self.rule.name} {describe(self.rule)} {self.backend} {self.kind}"
        )


def called(call: Subject) -> str:
    """A call's sizes."""
    layout = call.layout
    grid = "x".join(map(str, layout.grid))
    return f"{grid} +{layout.before} +{layout.after} H{call.heads} D{call.head_dim}"


@dataclass(frozen=True)
class Bench:
    """Where calls are timed, and how large the round ones are."""

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    grids: tuple[tuple[tuple[int, int, int], int], ...]
    heads: tuple[int, ...]
    repeats: int
    replayed: bool

    @property
    def backends(self) -> list[str]:
        """Sparse backends to measure; torch's has no cost of blocks on a GPU."""
        return [name for name in LAYOUT_KINDS if name != "torch" or self.device.type == "cpu"]

    def inputs(self, call: Subject) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        case = Case("", "", call.layout, call.heads, call.head_dim)
        return make_inputs(case, self.dtype, self.device)

    def plan(self, job: Job) -> BlockPlan:
        return plan_for(job.call.layout, job.rule, self.device, job.call.heads, job.kind)

    def prove(self, job: Job) -> str | None:
        """What is wrong with a job's result, "" where nothing is; None where it cannot run.

        Leaves the kernels in Triton's cache on disk.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the last job: other processes need room too
        plan, inputs = self.plan(job), self.inputs(job.call)
        if eligible(job.backend, *inputs, plan) is not None:
            return None
        out = poisoned(
            lambda: block_sparse_attention(*inputs, plan, backend=job.backend), inputs[0]
        )
        return prove(out, expected_rows(*inputs, plan)).why

    def sparse(self, job: Job) -> tuple[float, BlockPlan]:
        """Milliseconds and plan of a proven job."""
        plan = self.plan(job)

        def measured() -> float:
            given = Rotation(self.inputs(job.call))
            density = plan.launched_density(job.backend)
            return self.hot(
                lambda: block_sparse_attention(*given(), plan, backend=job.backend),
                self.times(density * job.call.attention_flops),
            )

        return self.once(job.name, measured), plan

    def dense(self, call: Subject) -> float:
        """Milliseconds of the fastest of torch's dense kernels."""

        def measured() -> float:
            given = Rotation(self.inputs(call))
            run = fastest_dense(self, call.head_dim).run
            return self.hot(lambda: run(*given()), self.times(call.attention_flops))

        return self.once(f"{called(call)} dense", measured)

    def once(self, name: str, measured: Callable[[], float]) -> float:
        """A measurement, made where it is not known yet; SystemExit for a replay that lacks it."""
        if name not in TIMES:
            if self.replayed:
                raise SystemExit(f"the replayed file has no time of {name}")
            TIMES[name] = measured()
        return TIMES[name]

    def hot(self, call: Callable[[], object], times: int) -> float:
        """Milliseconds of a call on a GPU that has been at it for a while."""
        end = time.perf_counter() + (HEAT_S if self.device.type == "cuda" else 0.0)
        while time.perf_counter() < end:
            call()
            torch.cuda.synchronize(self.device)
        return measure(call, self.device, times, warmup=1).median_ms

    def times(self, flops: float) -> int:
        """How often a call is timed: a long one less, its times scatter little."""
        return min(self.repeats, max(LEAST, int(LONG / flops)))


@lru_cache
def fastest_dense(bench: Bench, dim: int) -> dense.DenseKernel:
    """The fastest of torch's dense kernels for a head_dim, on a call of middling length."""
    given = Rotation(bench.inputs(at_grid((1, 1, bench.lengths[1]), bench.heads[-1], dim)))
    kernels = [kernel for kernel in dense.present(bench.device)[0] if kernel.name in STOCK]
    return min(kernels, key=lambda k: measure(lambda: k.run(*given()), bench.device, 5).median_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="default: the planner's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=12, help="processes that compile and prove")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--times", type=Path, help="JSON file for what is measured")
    parser.add_argument("--replay", type=Path, help="such a file, instead of measuring")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    bench = Bench(
        device,
        torch.bfloat16 if cuda else torch.float32,
        TINY_LENGTHS if options.tiny else LENGTHS,
        TINY_GRIDS if options.tiny else GRIDS,
        TINY_HEADS if options.tiny else HEADS,
        options.repeats,
        options.replay is not None,
    )
    here = machine(device)
    if options.replay:
        kept = json.loads(options.replay.read_text("utf-8"))
        TIMES.update(kept["times"])
        here = dataclasses.replace(here, **kept["machine"])
    path = options.table or TABLES / f"{gpu_key(here.machine)}.csv"
    began = time.perf_counter()
    rounds = [] if options.check else round_jobs(bench)
    pairs = check_jobs(bench, options.tiny)
    if options.replay:
        ready = {job for job in (*rounds, *pairs) if job.name in TIMES}
    else:
        workers = min(options.workers, 2) if options.tiny else options.workers
        ready = set(proven(bench, [*rounds, *pairs], workers))
        print(f"{len(ready)} calls proven in {time.perf_counter() - began:.0f} s", flush=True)
    if not options.check:
        table = calibrated(bench, gpu_key(here.machine), [job for job in rounds if job in ready])
        write_table(path, table, f"samples/measure_planner.py at {here.commit}")
        print(f"{path} after {time.perf_counter() - began:.0f} s", flush=True)
    found = cost_table(path.stem, path.parent)
    if found is None:
        raise SystemExit(f"there is no table {path}: run without --check first")
    common = {k: getattr(here, k) for k in ("machine", "torch", "triton", "commit", "date")}
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for row in compared(bench, found, [job for job in pairs if job in ready]):
            if writer is None:
                writer = csv.DictWriter(file, [*row, *common])
                writer.writeheader()
            writer.writerow(row | common)
            file.flush()
            rows.append(row)
            print(row, flush=True)
    if options.times:
        kept = {"machine": common, "times": TIMES}
        options.times.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    summary(rows)
    print(f"{time.perf_counter() - began:.0f} s in all")


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """How many predictions were close, and for which pairs and ways of reading blocks."""
    errors = [abs(float(row["error"])) for row in rows]
    ways = Counter(f"{row['backend']} {'moved' if row['moved'] else row['blocks']}" for row in rows)
    pairs = {(row["model"], row["pattern"], row["parameters"]) for row in rows}
    print(f"{len(pairs)} pairs of model and pattern: {dict(ways)}")
    for title, own in (("calls that a pipeline would make", True), ("others", False)):
        some = [error for error, row in zip(errors, rows, strict=True) if row["chosen"] == own]
        within = sum(error <= WITHIN for error in some)
        print(
            f"{title}: {within} of {len(some)} within {WITHIN:.0%}; median error "
            f"{statistics.median(some):.1%}, worst {max(some):.1%}"
        )


def round_jobs(bench: Bench) -> list[Job]:
    """Whole blocks alone, then patterns with short and masked blocks."""
    found = []
    for dim in HEAD_DIMS:
        calls = [(at_grid((1, 1, n), heads, dim), pattern("full"))
                 for n in bench.lengths for heads in bench.heads]  # fmt: skip
        for grid, text in bench.grids:
            call = at_grid(grid, bench.heads[-1], dim)
            call = dataclasses.replace(call, layout=TokenLayout(grid, after=text))
            calls += [(call, pattern(name, **kw)) for name, kw in RULES]
        found += [
            Job(*call, name, LAYOUT_KINDS[name][0]) for name in bench.backends for call in calls
        ]
    return found


def check_jobs(bench: Bench, tiny: bool) -> list[Job]:
    """Pairs of model and pattern, on every backend and way of reading blocks."""
    found = []
    for number, name in enumerate(MODELS):
        call = shrunk(subject(name)) if tiny else subject(name)
        own = CHECKS[number % PATTERNS_EACH :: PATTERNS_EACH]
        rules = [pattern(rule, **parameters) for rule, parameters in own]
        found += [
            Job(call, rule, backend, kind)
            for rule in rules
            for backend in bench.backends
            for kind in LAYOUT_KINDS[backend]
        ]
    return found


def proven(bench: Bench, jobs: Sequence[Job], workers: int) -> list[Job]:
    """The jobs that can run here; SystemExit where the result of one is wrong."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending: list[tuple[Job, Future[str | None]]] = []
        # Asking for Hopper's kernel compiles its self-test: meanwhile the others' jobs run.
        for name in sorted(bench.backends, key=lambda name: name == "hopper"):
            if BACKENDS[name].machine() is None:
                own = spread([job for job in jobs if job.backend == name])
                pending += [(job, pool.submit(bench.prove, job)) for job in own]
        results = [(job, future.result()) for job, future in pending]
    for job, why in results:
        if why:
            raise SystemExit(f"{job.backend} is wrong on {job.call.name}, {job.rule.name}: {why}")
    return [job for job, why in results if why is not None]


def spread(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in an order in which those that share a kernel are apart, so that few compile it."""
    seen: Counter[tuple[str, int]] = Counter()
    turns = []
    for job in jobs:
        kernel = job.rule.name, job.call.head_dim
        turns.append(seen[kernel])
        seen[kernel] += 1
    return [job for _, job in sorted(zip(turns, jobs, strict=True), key=lambda pair: pair[0])]


def calibrated(bench: Bench, gpu: str, jobs: Sequence[Job]) -> CostTable:
    """Constants of every backend and head_dim, fitted to calls of round sizes."""
    cuda = bench.device.type == "cuda"
    programs = int(
        bench.once(
            "programs",
            lambda: (
                torch.cuda.get_device_properties(bench.device).multi_processor_count if cuda else 1
            ),
        )
    )
    constants: dict[tuple[str, int], Constants] = {}
    for dim in HEAD_DIMS:
        constants[DENSE, dim] = fit(list(dense_samples(bench, dim)), programs)
        kernels: dict[str, list[Sample]] = {}
        for job in jobs:
            if job.call.head_dim == dim:
                plan = bench.plan(job)
                name = kernel_of(job.backend, plan, moved=moves_tokens(job.backend, plan))
                kernels.setdefault(name, []).append(sample(bench, job))
        for name in sorted(kernels):  # a backend's own name before those of its other kernels
            samples, own = kernels[name], constants.get((name.split()[0], dim))
            given = {key: getattr(own, key) for key in SHARED.get(name, ())} if own else {}
            constants[name, dim] = fit(samples, programs, given)
            print(name, dim, len(samples), constants[name, dim], flush=True)
    linear = bench.once("linear_tflops", lambda: linear_tflops(bench))
    return CostTable(
        gpu, constants, programs, linear, bench.once("copy_gbs", lambda: copy_gbs(bench))
    )


def dense_samples(bench: Bench, dim: int) -> Iterator[Sample]:
    """Dense calls of round lengths."""
    for length in (*bench.lengths, *(n - RAGGED for n in bench.lengths)):
        for heads in bench.heads:
            call = at_grid((1, 1, length), heads, dim)
            yield Sample(bench.dense(call), 1, heads, length)


def sample(bench: Bench, job: Job) -> Sample:
    """A timed job."""
    ms, plan = bench.sparse(job)
    return Sample(ms, 1, job.call.heads, job.call.layout.length, plan)


def compared(bench: Bench, table: CostTable, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Measured and predicted milliseconds of each job on a backend of the table."""
    dense_ms = {call: bench.dense(call) for call in dict.fromkeys(job.call for job in jobs)}
    for job in jobs:
        if job.backend not in table.backends:
            continue
        call = job.call
        pair = [other for other in jobs if (other.call, other.rule) == (call, job.rule)]
        length, heads, dim = call.layout.length, call.heads, call.head_dim
        ms, plan = bench.sparse(job)
        moved = moves_tokens(job.backend, plan)
        predicted = table.sparse_ms(plan, job.backend, 1, heads, dim, moved=moved)
        yield {
            "model": call.name,
            "tokens": length,
            "heads": heads,
            "head_dim": dim,
            "pattern": job.rule.name,
            "parameters": describe(job.rule),
            "backend": job.backend,
            "blocks": job.kind,
            "moved": moved,
            "chosen": job == chosen(bench, pair),
            "launched_density": round(plan.launched_density(job.backend), 4),
            "dense_ms": round(dense_ms[call], 4),
            "predicted_dense_ms": round(table.dense_ms(1, heads, length, dim), 4),
            "measured_ms": round(ms, 4),
            "predicted_ms": round(predicted, 4),
            "error": round(predicted / ms - 1, 4),
        }


def chosen(bench: Bench, jobs: Sequence[Job]) -> Job:
    """Of the jobs of a call and pattern, the one that a pipeline would run.

    The first backend that can run each kind of blocks, then the kind of less effort.
    """
    first = {job.kind: job for job in reversed(jobs)}

    gpu = "cuda" if bench.replayed else bench.device.type
    return min(first.values(), key=lambda job: effort(job.backend, gpu, bench.plan(job)))


def shrunk(call: Subject) -> Subject:
    """The same kind of call, small enough for a CPU."""
    t, h, w = (min(n, most) for n, most in zip(call.layout.grid, TINY_GRID, strict=True))
    before, after = min(call.layout.before, 13), min(call.layout.after, 13)
    return dataclasses.replace(call, layout=TokenLayout((t, h, w), before, after), heads=1)


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
