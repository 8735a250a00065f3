"""Who does what: items in their order, each to the program that is free first."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0.618
"""How far around each line begins: those of any number of lines are spread out."""


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


def in_rounds(long: int, lines: int, short: int, weight: float, programs: int) -> np.ndarray:
    """int32 [long + lines * short]: the program of each item, where only this is known of their
    weights: the `long` ones come first, each as long as `weight` others on average; then `short`
    ones of each line (head), which fall in weight.

    Long ones go to one program after another. A line's items go around to and fro; who has a long
    one joins when the others have had as much. So all programs work on the same head at the same
    time (its keys and values share the cache). Each line begins with another program, and its last,
    shortest items go to those that have had the fewest.
    """
    turn = np.arange(long)
    there, back = turn % programs, programs - 1 - turn % programs
    owners = [np.where(turn // programs % 2, back, there)]
    load = np.bincount(owners[0], minlength=programs) * weight  # in short items
    joined = load == load.min()
    for line in range(lines):
        order = np.roll(np.arange(programs), int(line * GOLDEN * programs))
        left = short
        while left:
            joined |= load <= load[joined].mean() + 0.5
            free = order[joined[order]]
            if len(free) > left:
                inner = np.abs(np.arange(len(free)) - (len(free) - 1) / 2)
                free = free[np.lexsort((inner, load[free]))][:left]
            load[free] += 1
            left -= len(free)
            owners.append(free)
            order = order[::-1]
    return np.concatenate(owners).astype(np.int32)
