"""Finds the portable kernel's best steps on this GPU: the table in kernels/portable/steps.py.

    python samples/tune_portable.py --out samples/results/steps_<machine>.csv

For each head_dim, block size and way of reading (blocks in place, blocks gathered through an
order) every candidate step is compiled and proven against the oracle, several at a time, and then
timed alone. The end of the output is the table's lines for this GPU. On a CPU, with
TRITON_INTERPRET=1 and --tiny, only the proofs mean anything.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.machine import machine
from dit_accel.bench.plans import random_plan
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import measure
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.plan import BlockPlan, plan_of
from dit_accel.kernels.portable import steps
from dit_accel.kernels.portable.steps import Config, machine_of, padded_dim, pick_config
from dit_accel.layout import TokenLayout

BLOCKS = ((128, 128), (128, 64), (64, 64))
REGISTERS = 224
"""Accumulators (out and scores) that a thread may hold: beyond, a step only spills."""


@dataclass(frozen=True)
class Problem:
    """One call: its sizes, and whether its blocks are gathered through an order."""

    head_dim: int
    block_q: int
    block_k: int
    gathered: bool
    length: int
    heads: int
    density: float
    dtype: torch.dtype

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layout = TokenLayout((1, 1, self.length))
        return make_inputs(Case("", "", layout, self.heads, self.head_dim), self.dtype, device)

    def plan(self, device: torch.device) -> BlockPlan:
        plan = random_plan(self.length, self.density, device, block_k=self.block_k)
        if self.block_q == 64:  # each query block in two halves with the same list
            counts = ("start", "whole", "full", "count")
            twice = {name: getattr(plan.visits, name).repeat_interleave(2, 2) for name in counts}
            starts = torch.arange(0, self.length, 64, dtype=torch.int32, device=device)
            halves = BlockTable(None, starts, torch.full_like(starts, 64)[None])
            blocks = replace(plan.blocks, q=halves, block_q=64, video_blocks=len(starts))
            plan = plan_of(blocks, replace(plan.visits, **twice))
        if not self.gathered:
            return plan
        generator = torch.Generator(device=device).manual_seed(0)
        runs = self.length // 8  # as rows of a tile are: 8 tokens side by side
        order = torch.randperm(runs, generator=generator, device=device)[:, None] * 8
        order = (order + torch.arange(8, device=device)).flatten().int()
        q, k = (replace(table, order=order) for table in (plan.blocks.q, plan.blocks.k))
        return plan_of(replace(plan.blocks, q=q, k=k), plan.visits)


@dataclass(frozen=True)
class Result:
    """A candidate: its error against the oracle, and its time; `note` says what went wrong."""

    config: Config
    error: float = float("nan")
    milliseconds: float = float("nan")
    tflops: float = float("nan")
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="a small call, few candidates")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny:
        options.length, options.heads, options.density, options.workers = 512, 1, 0.5, 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    columns = machine(device).columns()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    problems = [
        Problem(dim, *block, gathered, options.length, options.heads, options.density, dtype)
        for dim, block, gathered in itertools.product(options.dims, BLOCKS, (False, True))
    ]
    best: dict[Problem, list[Result]] = {}
    with (
        options.out.open("w", newline="") as file,
        ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool,
    ):
        writer: csv.DictWriter[str] | None = None
        pending = {p: compiled(p, pool, device, options.tiny) for p in problems}
        ready = {problem: proofs() for problem, proofs in pending.items()}
        for problem, proven in ready.items():
            dense_tflops = dense_speed(problem, device)
            best[problem] = sorted(timed(problem, proven, device), key=lambda r: -r.tflops)
            for result in best[problem]:
                row = asdict(problem) | asdict(result.config) | asdict(result)
                row = {k: v for k, v in row.items() if k != "config"}
                row |= {"dense_tflops": round(dense_tflops, 1)} | columns
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
            file.flush()
            report(problem, best[problem], dense_tflops)
    print_table(best, device)


def candidates(problem: Problem, device: torch.device, tiny: bool) -> Iterator[Config]:
    """Steps that fit the blocks, shared memory and about the registers."""
    here = machine_of(device)
    dim, itemsize = padded_dim(problem.head_dim), problem.dtype.itemsize
    boxes = (False, True) if not problem.gathered and here.tma else (False,)
    wide = dim > 128
    for rows, keys, warps, stages, tma in itertools.product(
        (128, 64), (64, 32) if wide else (128, 64), (4, 8), (2, 3) if dim > 64 else (2, 3, 4), boxes
    ):
        config = Config(rows, keys, warps, stages, tma)
        if rows > problem.block_q or keys > problem.block_k or rows // warps < 16:
            continue
        if config.shared_bytes(dim, itemsize) > here.shared:
            continue
        if rows * (dim + keys) > REGISTERS * 32 * warps:
            continue
        if not tiny or (warps, stages) == (4, 2):
            yield config


def compiled(
    problem: Problem, pool: ProcessPoolExecutor, device: torch.device, tiny: bool
) -> Callable[[], list[Result]]:
    """Starts compiling and proving every candidate in the pool; the call waits for the results."""
    jobs = [(c, pool.submit(proof, problem, c)) for c in candidates(problem, device, tiny)]

    def results() -> list[Result]:
        return [job.result() for _, job in jobs]

    return results


def proof(problem: Problem, config: Config) -> Result:
    """The candidate's error; leaves its binary in Triton's cache on disk."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, plan = problem.inputs(device), problem.plan(device)
    try:
        with_config(config, problem, device)
        found = prove(
            poisoned(lambda: attend(inputs, plan), inputs[0]), expected_rows(*inputs, plan)
        )
    except Exception as error:  # a step that does not compile is only not a candidate
        return Result(config, note=f"{type(error).__name__}: {error}".splitlines()[0])
    return Result(config, error=found.error, note=found.why)


def timed(problem: Problem, proven: list[Result], device: torch.device) -> Iterator[Result]:
    """The proven candidates with their times; the others come back as they are."""
    inputs, plan = problem.inputs(device), problem.plan(device)
    flops = 4 * problem.length**2 * problem.head_dim * problem.heads * plan.kept_density()
    for result in proven:
        if result.note:
            print(f"left out: {result.config}: {result.note}", flush=True)
            continue
        with_config(result.config, problem, device)
        median = measure(lambda: attend(inputs, plan), device).median_ms
        yield replace(result, milliseconds=median, tflops=flops / median / 1e9)


def attend(inputs: tuple[torch.Tensor, ...], plan: BlockPlan) -> torch.Tensor:
    q, k, v = inputs
    return block_sparse_attention(q, k, v, plan, backend="triton")


def with_config(config: Config, problem: Problem, device: torch.device) -> None:
    """Makes the kernel take `config` for the problem, or raises."""
    here = machine_of(device)
    dim, itemsize = padded_dim(problem.head_dim), problem.dtype.itemsize
    steps.TUNED[here.name, dim, itemsize] = (config,)
    blocks = (problem.block_q, problem.block_k)
    if pick_config(dim, itemsize, blocks, here, not problem.gathered) != config:
        raise ValueError(f"{config} is not what the kernel takes")


def dense_speed(problem: Problem, device: torch.device) -> float:
    """TFLOP/s of the fastest dense kernel present; the yardstick of this machine."""
    inputs = problem.inputs(device)
    flops = 4 * problem.length**2 * problem.head_dim * problem.heads
    times = []
    for kernel in dense.present(device)[0]:
        try:
            times.append(measure(lambda kernel=kernel: kernel.run(*inputs), device, 3).median_ms)
        except RuntimeError:  # does not take these sizes
            continue
    return flops / min(times) / 1e9 if times else float("nan")


def report(problem: Problem, results: list[Result], dense_tflops: float) -> None:
    way = "gathered" if problem.gathered else "in place"
    print(f"head_dim {problem.head_dim}, blocks {problem.block_q} x {problem.block_k}, {way}:")
    for result in results[:3]:
        share = result.tflops / dense_tflops
        print(f"  {result.tflops:7.1f} TFLOP/s  {share:.2f} of dense  {result.config}", flush=True)


def print_table(best: dict[Problem, list[Result]], device: torch.device) -> None:
    """The lines of `TUNED`: per head_dim, the best of each problem, larger blocks first."""
    name = machine_of(device).name
    for dim in dict.fromkeys(problem.head_dim for problem in best):
        chosen: dict[Config, Any] = {}
        for problem, results in best.items():
            if problem.head_dim == dim and results:
                chosen.setdefault(results[0].config)
        lines = ", ".join(
            f"Config({c.block_m}, {c.block_n}, {c.warps}, {c.stages}{', True' * c.tma})"
            for c in chosen
        )
        itemsize = next(iter(best)).dtype.itemsize
        print(f'    ("{name}", {padded_dim(dim)}, {itemsize}): ({lines},),')


if __name__ == "__main__":
    main()
