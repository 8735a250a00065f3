"""When a plan with pooled keys is worth two kernels: blocks on this one, pooled keys on the other.

The portable kernel takes both in one launch. It computes the pooled keys in either case, so that
the split saves time on every visit of a block, and spends it on passes over the results.
"""

from __future__ import annotations

from dit_accel.kernels.plan import Shape

# Microseconds of a multiprocessor, from planner/tables/h200.csv at the clocks of long calls:
# `whole` of triton, triton gathered and hopper; a pass reads or writes 128 tokens of a head, per
# column of 2 bytes, at copy_gbs.
PORTABLE = {(64, False): 1.11, (64, True): 1.67, (128, False): 2.03, (128, True): 3.06}
"""A visit of 128 keys by the portable kernel, by head_dim and whether it gathers them."""
HOPPER = {64: 1.18, 128: 1.71}
PASS = 0.0079
MERGING = 3
"""Passes: two results in, one out."""
MOVING = 8
"""Passes: q, k, v and the output in another order, in and out."""
MARGIN = 2.0
"""How many times the passes must be saved: launches and the host's part are not counted."""


def split_pays(head_dim: int, shape: Shape) -> bool:
    """Whether the split of plans with pooled lists should beat the portable kernel alone."""
    saved = PORTABLE[head_dim, shape.gathered] - HOPPER[head_dim]
    passes = MERGING + (MOVING if shape.scattered else 0)
    return saved * shape.visits * shape.block_k / 128 > MARGIN * passes * PASS * head_dim
