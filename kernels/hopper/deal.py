"""Who does what: items in their order, each to the program that is free first."""

from __future__ import annotations

import heapq

import torch
import triton
import triton.language as tl
from torch import Tensor


def first_free(weights: Tensor, programs: int) -> Tensor:
    """int32 [n]: for items of int32 weights [n] the program 0 ... programs - 1 of each, which is
    the one with the least so far (the first of several). On a GPU the host waits for nothing."""
    if not weights.is_cuda:
        return _first_free_on_host(weights, programs)
    owners = torch.empty_like(weights)
    with torch.cuda.device_of(weights):
        _first_free[(1,)](
            weights, owners, len(weights), programs,
            WIDTH=triton.next_power_of_2(programs), num_warps=1,
        )  # fmt: skip
    return owners


def _first_free_on_host(weights: Tensor, programs: int) -> Tensor:
    loads = [(0, program) for program in range(programs)]
    owners = []
    for weight in weights.tolist():
        load, program = loads[0]
        owners.append(program)
        heapq.heapreplace(loads, (load + weight, program))
    return torch.tensor(owners, dtype=torch.int32)


@triton.jit(do_not_specialize=["n", "programs"])
def _first_free(weights, owners, n, programs, WIDTH: tl.constexpr):
    program = tl.arange(0, WIDTH)
    load = tl.where(program < programs, 0, 0x7FFFFFFF)
    weight = tl.load(weights)
    for i in range(n):
        following = tl.load(weights + i + 1, mask=i + 1 < n, other=0)  # under way meanwhile
        free = tl.argmin(load, 0)
        tl.store(owners + i, free)
        load += tl.where(program == free, weight, 0)
        weight = following
