"""Token masks of partial blocks, in Triton; the torch twins are `plan.MASK_RULES`.

A rule takes the coordinates (t, h, w) of queries [BM, 1] and keys [1, BN] and three parameters,
and returns which pairs count.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _box(qt, qh, qw, kt, kh, kw, p0, p1, p2):
    near = (tl.abs(qt - kt) <= p0) & (tl.abs(qh - kh) <= p1)
    return near & (tl.abs(qw - kw) <= p2)


MASK_FUNCTIONS = {"box": _box}
