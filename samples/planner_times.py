"""The GPU that samples/measure_planner.py measures: calls are proven here, and timed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from planner_cases import Job, Sizes, called, spread

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import Rotation, measure
from dit_accel.kernels.backends import BACKENDS, LAYOUT_KINDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import plan_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.planner.models import Subject, at_grid

STOCK = ("cudnn", "fa2", "sdpa")
"""Dense kernels that come with torch."""
LONG = 5e13
"""Floating-point operations after which a call is not repeated again, past LEAST times."""
LEAST = 3
HEAT_S = 0.12
"""Seconds of work before a call is timed: in a model a GPU is as hot, and so as slow, as then."""


@dataclass(frozen=True)
class Bench:
    """Where calls are timed, and how large the round ones are.

    known: what was measured, by name: milliseconds of calls, and what is known of the GPU.
    replayed: whether nothing may be measured that is not known.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    repeats: int
    replayed: bool
    known: dict[str, float] = field(default_factory=dict, compare=False)

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
        if name not in self.known:
            if self.replayed:
                raise SystemExit(f"the replayed file has no time of {name}")
            self.known[name] = measured()
        return self.known[name]

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
    given = Rotation(
        bench.inputs(at_grid((1, 1, bench.sizes.lengths[1]), bench.sizes.heads[-1], dim))
    )
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
