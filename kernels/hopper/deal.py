"""Who does what: items in their order, each to the program that is free first."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def first_free(weights: Tensor, programs: int) -> Tensor:
    """int32 [n]: for items of int32 weights [n] the program 0 ... programs - 1 of each, which is
    the one with the least so far (the first of several). On a GPU the host waits for nothing."""
    if not weights.is_cuda:
        return _on_host(weights, programs)
    from dit_accel.kernels.hopper.deal_kernel import first_free as on_gpu

    owners = torch.empty_like(weights)
    with torch.cuda.device_of(weights):
        width = 1 << (programs - 1).bit_length()
        on_gpu[(1,)](weights, owners, len(weights), programs, WIDTH=width, num_warps=1)
    return owners


def _on_host(weights: Tensor, programs: int) -> Tensor:
    loads = [(0, program) for program in range(programs)]
    owners = []
    for weight in weights.tolist():
        load, program = loads[0]
        owners.append(program)
        heapq.heapreplace(loads, (load + weight, program))
    return torch.tensor(owners, dtype=torch.int32)
