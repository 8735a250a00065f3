"""Times of calls on a GPU or a CPU: warm-up first, medians of many, inputs that are not cached."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP_MS = 20.0
"""Work before the time of a call is known well enough to tell how many settle the clock."""
SETTLE_MS = 150.0
"""A GPU's clock follows the power that its work takes, within some 50 ms: so long a call runs, over
and over, before it is timed."""
MAX_CALLS = 1000
HOST_MS = 0.2
"""Calls shorter than this may take the host longer to queue than the GPU to run."""
HEAD_START_CYCLES = 20_000_000
"""How long the GPU waits then (about 10 ms) while the host queues the calls behind it."""

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of `repeats`, the best and the worst."""

    median_ms: float
    best_ms: float
    worst_ms: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        return cls(statistics.median(times), min(times), max(times), len(times))

    def columns(self) -> dict[str, Any]:
        """The columns of a row of results."""
        return {
            "ms": self.median_ms,
            "best_ms": self.best_ms,
            "worst_ms": self.worst_ms,
            "repeats": self.repeats,
        }


class Rotation:
    """Copies of a call's inputs, given out in turn, so that none is found in the cache.

    One copy where the inputs do not fit the GPU's cache (or on a CPU, or where its size is not
    known), else enough to fill the cache twice, at most 16.
    """

    def __init__(self, inputs: Inputs) -> None:
        count = copies_needed(sum(x.nbytes for x in inputs), cache_bytes(inputs[0].device))
        q, k, v = inputs
        copies = [(q.clone(), k.clone(), v.clone()) for _ in range(count - 1)]
        self.sets: list[Inputs] = [inputs, *copies]
        self._next = 0

    def __call__(self) -> Inputs:
        """The next set."""
        self._next = (self._next + 1) % len(self.sets)
        return self.sets[self._next]


def copies_needed(inputs: int, cache: int) -> int:
    """Number of sets of `inputs` bytes that outlast a cache of `cache` bytes."""
    return 1 if inputs > cache else min(16, math.ceil(2 * cache / max(1, inputs)) + 1)


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's last-level cache; 0 on a CPU and where it is not known."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def measure(
    call: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 2
) -> Timing:
    """Time of the call's work on the device, without what the host needs to launch it.

    On a GPU the calls queue behind others of their kind, each between two events, so that all are
    timed at the clock that they bring about; on a CPU it is the time that the call takes.
    """
    each = _warm_up(call, device, max(1, warmup))
    if device.type != "cuda":
        return Timing.of([_timed(call, device) for _ in range(repeats)])
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    with torch.cuda.device(device):
        for _ in range(min(MAX_CALLS, math.ceil(SETTLE_MS / each))):
            call()
        if each < HOST_MS:
            torch.cuda._sleep(HEAD_START_CYCLES)
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return Timing.of([begin.elapsed_time(end) for begin, end in events])


def measure_wall(
    call: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 2
) -> Timing:
    """Time from asking for a result to having it, the host's part included."""
    _warm_up(call, device, warmup)
    return Timing.of([_timed(call, device) for _ in range(repeats)])


def first_calls(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of the first call, which compiles what it needs, and of the next one."""
    return _timed(call, device) / 1e3, _timed(call, device) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def _warm_up(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds of the shortest of them, the host's part included; on a GPU there are more."""
    times = [_timed(call, device) for _ in range(calls)]
    while calls and device.type == "cuda" and sum(times) < WARMUP_MS and len(times) < MAX_CALLS:
        times.append(_timed(call, device))
    return min(times, default=0.0)
