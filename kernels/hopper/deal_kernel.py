"""`deal.first_free` on a GPU, in one warp: the next item to the program with the least so far."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "programs"])
def first_free(weights, owners, n, programs, WIDTH: tl.constexpr):
    program = tl.arange(0, WIDTH)
    load = tl.where(program < programs, 0, 0x7FFFFFFF)
    weight = tl.load(weights)
    for i in range(n):
        following = tl.load(weights + i + 1, mask=i + 1 < n, other=0)  # under way meanwhile
        free = tl.argmin(load, 0)
        tl.store(owners + i, free)
        load += tl.where(program == free, weight, 0)
        weight = following
