"""Measure a GPU for the planner, and check what the planner then predicts.

    python samples/tools/measure_planner.py --out samples/results/planner_<gpu>.csv

Several processes compile every call and prove its result against an oracle. Then, alone on the
GPU, calls of round sizes are timed, and the constants of dit_accel/costs/tables/<gpu>.csv
fitted to them; then (model, pattern) pairs that took no part in that, predicted from the table and
written side by side to --out. `--check` leaves the table as it is. Times are the GPU's, without the
host's part of a call. `--tiny` runs everything on small calls, to try the script where there is no
GPU. About 150 s with nothing compiled before, on one GPU with 16 cores. `--times` keeps what was
measured, and `--replay` fits and compares again from such a file, on any machine.

What was seen of the pairs: none of their times or clocks is in a fit, but the model got three of
its parts after a first comparison. Hopper's items are dealt as its kernel deals them; prices are
cycles at the clock of dit_accel/costs/clock.py (nanoseconds before that were right for long
calls, and up to 56 % too high for calls under a millisecond); and the height of boxes counts under
token rules beside text (before that, one of the 30 pairs, an exact disc, was 17 % off).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from planner_cases import (
    FULL,
    HEAD_DIMS,
    TINY,
    Job,
    check_jobs,
    dense_calls,
    name_of,
    round_jobs,
)
from planner_clock import fit_clock
from planner_fit import Sample, errors, fit
from planner_times import Bench, measure_machine, proven

from dit_accel.bench.machine import machine
from dit_accel.costs.clock import Clock
from dit_accel.costs.files import COLUMNS, DENSE, MACHINE, TABLES, gpu_key
from dit_accel.costs.table import Constants, CostTable, parse_table
from dit_accel.engine.route import plan_effort
from dit_accel.kernels.backends import BACKENDS
from dit_accel.planner.models import Subject
from dit_accel.planner.work import kernel_of, sparse_ms

SHARED = {"hopper mixed": ("launch", "row"), "triton gathered": ("launch",)}
"""Constants that another kernel of a backend has in common with its first one."""
CLOCK_UNITS = {
    "busy": "MHz", "free": "MHz", "lag": "ms", "settling": "ms", "cycle": "ns", "kflop": "ns",
}  # fmt: skip
WITHIN = 0.15


def main(arguments: Sequence[str] | None = None) -> None:
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
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    bench = Bench(
        device,
        torch.bfloat16 if cuda else torch.float32,
        TINY if options.tiny else FULL,
        options.repeats,
    )
    here = machine(device)
    if options.replay:
        kept = json.loads(options.replay.read_text("utf-8"))
        bench.known.update(kept["times"])
        bench.clocks.update(kept.get("clocks_mhz", {}))
        here = dataclasses.replace(here, **kept["machine"])
    path = options.table or TABLES / f"{gpu_key(here.machine)}.csv"
    began = time.perf_counter()
    rounds = [] if options.check else round_jobs(bench.sizes, bench.backends)
    dense = [] if options.check else dense_calls(bench.sizes)
    pairs = check_jobs(bench.backends, options.tiny)
    common = {k: getattr(here, k) for k in ("machine", "torch", "triton", "commit", "date")}
    if options.replay:
        ready = {job for job in (*rounds, *pairs) if job.name in bench.known}
        dense = [call for call in dense if name_of(call) in bench.known]
    else:
        workers = min(options.workers, 2) if options.tiny else options.workers
        ready = set(proven(bench, [*rounds, *pairs], workers))
        print(f"{len(ready)} calls proven in {time.perf_counter() - began:.0f} s", flush=True)
        measured(bench, ready, {*dense, *(job.call for job in pairs)})
        print(f"timed after {time.perf_counter() - began:.0f} s", flush=True)
    if options.times:
        kept = {"machine": common, "times": bench.known, "clocks_mhz": bench.clocks}
        options.times.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    if not options.check:
        own = [job for job in rounds if job in ready]
        table = calibrated(bench, gpu_key(here.machine), own, dense)
        write_table(path, table, f"samples/tools/measure_planner.py at {here.commit}")
        print(f"{path} after {time.perf_counter() - began:.0f} s", flush=True)
    if not path.is_file():
        raise SystemExit(f"there is no table {path}: run without --check first")
    with path.open(encoding="utf-8", newline="") as file:
        found = parse_table(path.stem, csv.DictReader(file))
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
        if not some:
            continue
        within = sum(error <= WITHIN for error in some)
        print(
            f"{title}: {within} of {len(some)} within {WITHIN:.0%}; median error "
            f"{statistics.median(some):.1%}, worst {max(some):.1%}"
        )


def measured(bench: Bench, jobs: Iterable[Job], dense: Iterable[Subject]) -> None:
    """Time everything, in an order of chance: whatever drifts hits round calls and pairs alike."""
    measure_machine(bench)
    every: list[Job | Subject] = [*jobs, *dense]
    by_name = {name_of(call): call for call in every}
    calls = [by_name[name] for name in sorted(by_name)]
    random.Random(0).shuffle(calls)
    bench.time(calls)


def calibrated(bench: Bench, gpu: str, jobs: Sequence[Job], dense: Sequence[Subject]) -> CostTable:
    """Constants of every backend and head_dim, fitted to calls of round sizes."""
    constants: dict[tuple[str, int], Constants] = {}
    programs = int(bench.ms("programs"))
    every = [call for call in (*dense, *jobs) if name_of(call) in bench.clocks]
    clock = fit_clock([bench.reading(call) for call in every])
    print(clock)
    for dim in HEAD_DIMS:
        own = [dense_sample(bench, call, clock) for call in dense if call.head_dim == dim]
        constants[DENSE, dim] = fit(own, programs)
        kernels: dict[str, list[Sample]] = {}
        for job in jobs:
            if job.call.head_dim == dim:
                plan = bench.plan(job)
                name = kernel_of(job.backend, plan, moved=BACKENDS[job.backend].moves(plan.shape))
                kernels.setdefault(name, []).append(sample(bench, job, clock))
        for name in sorted(kernels):  # a backend's own name before those of its other kernels
            samples, first = kernels[name], constants.get((name.split()[0], dim))
            given = {key: getattr(first, key) for key in SHARED.get(name, ())} if first else {}
            constants[name, dim] = fit(samples, programs, given)
            off = statistics.fmean(abs(e) for e in errors(samples, constants[name, dim], programs))
            print(f"{name} {dim}: {len(samples)} calls, off by {off:.1%} {constants[name, dim]}")
    rates = bench.ms("linear_tflops"), bench.ms("copy_gbs")
    return CostTable(gpu, constants, programs, *rates, clock)


def dense_sample(bench: Bench, call: Subject, clock: Clock) -> Sample:
    """A timed dense call."""
    mhz = bench.mhz(call, clock)
    return Sample(bench.ms(name_of(call)), 1, call.heads, call.layout.length, mhz=mhz)


def sample(bench: Bench, job: Job, clock: Clock) -> Sample:
    """A timed job."""
    ms, plan, mhz = bench.ms(job.name), bench.plan(job), bench.mhz(job, clock)
    return Sample(ms, 1, job.call.heads, job.call.layout.length, plan, job.backend, mhz)


def compared(bench: Bench, table: CostTable, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Measured and predicted milliseconds of each job on a backend of the table."""
    dense_ms = {call: bench.ms(name_of(call)) for call in dict.fromkeys(job.call for job in jobs)}
    for job in jobs:
        if job.backend not in table.backends:
            continue
        call = job.call
        pair = [other for other in jobs if (other.call, other.rule) == (call, job.rule)]
        length, heads, dim = call.layout.length, call.heads, call.head_dim
        ms, plan = bench.ms(job.name), bench.plan(job)
        moved = BACKENDS[job.backend].moves(plan.shape)
        predicted = sparse_ms(table, plan, job.backend, 1, heads, dim, moved=moved)
        yield {
            "model": call.name,
            "tokens": length,
            "heads": heads,
            "head_dim": dim,
            "pattern": job.rule.name,
            "parameters": job.rule.describe(),
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
            "clock_mhz": round(bench.clocks[job.name]) if job.name in bench.clocks else "",
        }


def chosen(bench: Bench, jobs: Sequence[Job]) -> Job:
    """Of the jobs of a call and pattern, the one that a pipeline would run.

    The first backend that can run each kind of blocks, then the kind of less effort.
    """
    first = {job.kind: job for job in reversed(jobs)}

    device = "cpu" if jobs[0].backend == "torch" else "cuda"  # a replay's plans are on a CPU
    return min(first.values(), key=lambda job: plan_effort(job.backend, device, bench.plan(job)))


def write_table(path: Path, table: CostTable, source: str) -> None:
    """The table as the planner reads it; constants of the shipped one that are no part of this
    measurement stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int, str, float, str]] = [
        (MACHINE, 0, "programs", table.programs, ""),
        (MACHINE, 0, "linear_tflops", table.linear_tflops, "TFLOP/s"),
        (MACHINE, 0, "copy_gbs", table.copy_gbs, "GB/s"),
    ]
    rows += [
        (MACHINE, 0, f"clock_{name}", value, CLOCK_UNITS[name])
        for name, value in dataclasses.asdict(table.clock).items()
    ]
    for (backend, dim), known in table.constants.items():
        for name in ("launch", "row", "whole", "short", "partial"):
            rows.append((backend, dim, name, getattr(known, name), "cycles"))
        rows += [
            (backend, dim, f"partial_{rule}", value, "cycles")
            for rule, value in known.rules.items()
        ]
    made = [[b, str(dim), name, f"{value:.6g}", unit, source] for b, dim, name, value, unit in rows]
    own = {tuple(row[:3]) for row in made}
    shipped = next((p for p in (path, TABLES / path.name) if p.is_file()), None)
    if shipped is not None:
        with shipped.open(encoding="utf-8", newline="") as file:
            made += [row for row in list(csv.reader(file))[1:] if tuple(row[:3]) not in own]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(made)


if __name__ == "__main__":
    main()
