"""The GPU that samples/tools/measure_planner.py measures: calls are proven here, and timed.

A GPU at its power limit runs at a lower clock than one that has just begun to work, and comes to
either within a second or so. In a model it never rests: neither does it here. While the host makes
a call ready, matrix products run; the call is timed right behind them, and the clock right behind
the call.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from planner_cases import Job, Sizes, name_of, round_call, spread
from planner_clock import Reading

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import Rotation, measure
from dit_accel.costs.clock import STEADY, Clock
from dit_accel.kernels.backends import BACKENDS, LAYOUT_KINDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.planner.models import Subject

STOCK = ("cudnn", "fa2", "sdpa")
"""Dense kernels that come with torch."""
MIDDLING = -3
"""Which of the round lengths tells the fastest of them."""
LONG = 5e13
"""Floating-point operations after which a call is not repeated again, past LEAST times."""
LEAST = 3
SOAK_MS, LOAD_MS, HEAD_MS = 1000.0, 30.0, 20.0
"""Matrix products before the first call is timed, while one gets its inputs, and right before it:
the last ones give the host time to queue the calls that are timed."""
BURSTS, SHORT = 3, 5e12
"""How often a call is timed anew, each time behind such products, and floating-point operations up
to which it is: a GPU's clock sometimes jumps, and then a short call is timed at another one."""
OWN, OWN_FLOPS = 8, 1.5e13
"""Calls that follow untimed, at most, and floating-point operations after which there are no more.
"""
PRODUCT = 4096
"""Rows and columns of a matrix product: small, so that what a plan needs gets in between."""
CLOCK_CYCLES = 2_000_000
"""How long the clock is watched: about a millisecond."""


class Load:
    """Matrix products that keep a GPU at work."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.device = device
        self.left, self.right = (
            torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)
        self.each_ms = measure(self._multiply, device).median_ms
        self.beside(SOAK_MS)

    def beside(self, ms: float) -> None:
        """Begin so much work beside what else is done."""
        with torch.cuda.stream(self.stream):
            self._queue(ms)

    def end(self, ms: float) -> None:
        """Let what runs beside end, and queue so much work behind it."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._queue(ms)

    def _queue(self, ms: float) -> None:
        for _ in range(math.ceil(ms / self.each_ms)):
            self._multiply()

    def _multiply(self) -> None:
        torch.mm(self.left, self.right, out=self.out)


@dataclass(frozen=True)
class Bench:
    """Where calls are timed, and how large the round ones are.

    known: what was measured, by name: milliseconds of calls, and what is known of the GPU.
    clocks: MHz of the GPU right after a call. plans: those made so far.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    repeats: int
    known: dict[str, float] = field(default_factory=dict, compare=False)
    clocks: dict[str, float] = field(default_factory=dict, compare=False)
    plans: dict[Job, BlockPlan] = field(default_factory=dict, compare=False)

    @property
    def backends(self) -> list[str]:
        """Sparse backends to measure; torch's has no cost of blocks on a GPU."""
        return [name for name in LAYOUT_KINDS if name != "torch" or self.device.type == "cpu"]

    def inputs(self, call: Subject) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        case = Case("", "", call.layout, call.heads, call.head_dim)
        return make_inputs(case, self.dtype, self.device)

    def plan(self, job: Job) -> BlockPlan:
        if job not in self.plans:
            call = job.call
            self.plans[job] = plan_for(call.layout, job.rule, self.device, call.heads, job.kind)
        return self.plans[job]

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

    def ms(self, name: str) -> float:
        """What is known by a name; SystemExit where it was not measured."""
        if name not in self.known:
            raise SystemExit(f"there is no time of {name}")
        return self.known[name]

    def runner(self, call: Job | Subject) -> Callable[[], object]:
        """Makes a sparse or a dense call, with inputs of its own."""
        if isinstance(call, Job):
            plan, backend = self.plan(call), call.backend
            given = Rotation(self.inputs(call.call))
            return lambda: block_sparse_attention(*given(), plan, backend=backend)
        given = Rotation(self.inputs(call))
        run = fastest_dense(self, call.head_dim).run
        return lambda: run(*given())

    def flops(self, call: Job | Subject) -> float:
        """Floating-point operations of a call; masks are not counted."""
        if isinstance(call, Job):
            density = self.plan(call).launched_density(call.backend)
            return density * call.call.attention_flops
        return call.attention_flops

    def time(self, calls: Sequence[Job | Subject]) -> None:
        """Time calls, in this order."""
        cuda = self.device.type == "cuda"
        for call in calls:  # once before: kernels are loaded, plans and lists made
            self.runner(call)()
        load = Load(self.device) if cuda else None
        for call in calls:
            if load is None:
                run, times = self.runner(call), self.times(self.flops(call))
                self.known[name_of(call)] = measure(run, self.device, times, warmup=1).median_ms
            else:
                name = name_of(call)
                bursts = [
                    self.hot(call, load) for _ in range(BURSTS if self.flops(call) <= SHORT else 1)
                ]
                self.known[name], self.clocks[name] = sorted(bursts)[len(bursts) // 2]

    def hot(self, call: Job | Subject, load: Load) -> tuple[float, float]:
        """Milliseconds of a call on a GPU that has been at work for a while; MHz right after it."""
        load.beside(LOAD_MS)
        run, flops = self.runner(call), self.flops(call)
        load.end(HEAD_MS)
        for _ in range(self.ahead(flops)):
            run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.times(flops) + 2)]
        marks[0].record()
        for mark in marks[1:-1]:
            run()
            mark.record()
        torch.cuda._sleep(CLOCK_CYCLES)
        marks[-1].record()
        torch.cuda.synchronize(self.device)
        spent = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
        return statistics.median(spent[:-1]), CLOCK_CYCLES / spent[-1] / 1e3

    def ahead(self, flops: float) -> int:
        """How many calls of its kind go before the ones that are timed."""
        return min(OWN, math.ceil(OWN_FLOPS / flops))

    def reading(self, call: Job | Subject) -> Reading:
        """The clock right behind a call's last one."""
        flops, name = self.flops(call), name_of(call)
        mhz, ms = self.clocks[name], self.known[name]
        return Reading(mhz, (self.ahead(flops) + self.times(flops)) * ms, flops / ms / mhz / 1e6)

    def mhz(self, call: Job | Subject, clock: Clock) -> float:
        """The clock of the call whose time was kept: the middle one of those that were timed."""
        if name_of(call) not in self.clocks:
            return STEADY.busy
        last = self.reading(call)
        earlier = last.ms - self.times(self.flops(call)) / 2 * self.ms(name_of(call))
        return last.mhz * clock.at(last.kflops, earlier) / clock.at(last.kflops, last.ms)

    def times(self, flops: float) -> int:
        """How often a call is timed: a long one less, its times scatter little."""
        return min(self.repeats, max(LEAST, int(LONG / flops)))


@lru_cache
def fastest_dense(bench: Bench, dim: int) -> dense.DenseKernel:
    """The fastest of torch's dense kernels for a head_dim, on a call of middling length."""
    given = Rotation(bench.inputs(round_call(bench.sizes.lengths[MIDDLING], dim)))
    kernels = [kernel for kernel in dense.present(bench.device)[0] if kernel.name in STOCK]
    return min(kernels, key=lambda k: measure(lambda: k.run(*given()), bench.device, 5).median_ms)


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


def measure_machine(bench: Bench) -> None:
    """What is known of the GPU besides its calls: programs that run at a time, and its rates."""
    cuda = bench.device.type == "cuda"
    properties = torch.cuda.get_device_properties(bench.device) if cuda else None
    bench.known["programs"] = properties.multi_processor_count if properties else 1
    bench.known["linear_tflops"] = linear_tflops(bench)
    bench.known["copy_gbs"] = copy_gbs(bench)


def linear_tflops(bench: Bench) -> float:
    """Of a feed-forward layer as wide as Wan 14B's."""
    cuda = bench.device.type == "cuda"
    tokens, width, inner = (32768, 5120, 13824) if cuda else (256, 256, 512)
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
