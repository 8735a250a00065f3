"""Where a sparse call stops paying: too small, or too dense, and dense attention is faster."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.kernels.backends import moves_tokens
from dit_accel.kernels.plan import BlockPlan


@dataclass(frozen=True)
class Cost:
    """What a backend's call costs beside a dense one of the same sizes.

    A sparse call takes `overhead` + `slope` x launched density x the dense call's time.

    Args:
        overhead: seconds of a call however small.
        slope: time per launched pair over the dense kernel's.
        dense_rate: FLOP/s of the dense kernel. On slower hardware a dense call takes longer than
            this says, so that the estimate leans towards dense.
    """

    overhead: float
    slope: float
    dense_rate: float


MEASURED = {
    # samples/results/breakeven_cpu.csv
    ("torch", "cpu"): Cost(overhead=2e-3, slope=1.25, dense_rate=1.2e11),
    # samples/results/kernels_h200.csv; the overhead is the host's part of a call.
    ("hopper", "cuda"): Cost(overhead=3e-4, slope=1.05, dense_rate=5.5e14),
    ("fa4", "cuda"): Cost(overhead=3e-4, slope=1.05, dense_rate=5.5e14),
    # samples/results/breakeven_h200.csv
    ("triton", "cuda"): Cost(overhead=2e-4, slope=1.9, dense_rate=5.5e14),
    # Not measured: gathers and F.sdpa, where Triton cannot run or by request.
    ("torch", "cuda"): Cost(overhead=5e-3, slope=3.0, dense_rate=5.5e14),
}


MOVING = 550
"""Moving q, k, v and the output takes as long as this many keys of a dense call, head_dim 128
(permutation in samples/results/kernels_h200.csv)."""

ALONE, BESIDE_TEXT = (1.0, 1.15), (1.05, 1.4)
"""What the Hopper kernel's visits of whole and of short blocks take, over one of a whole block; and
of boxes that stand beside text, which are read another way. Ratios of `whole` and `short` in
planner/tables/h200.csv, of head_dim 64 and 128, between those of cycles (short calls) and those of
time at the clocks that long calls settle at."""


def effort(backend: str, device: str, plan: BlockPlan) -> float:
    """A plan's time over dense, overhead aside: to compare plans.

    Moving tokens is counted, and that short blocks take longer than whole ones: tiles that are
    moved are nearly all short. Visits under a token rule count as whole ones, on all backends.
    """
    cost = MEASURED.get((backend, device))
    slope = 1.0 if cost is None else cost.slope
    moving = MOVING / plan.blocks.q_length if moves_tokens(backend, plan) else 0.0
    visit = _mean_visit(plan) if backend == "hopper" else 1.0
    return slope * visit * plan.launched_density(backend) + moving


def _mean_visit(plan: BlockPlan) -> float:
    """Of the Hopper kernel."""
    if plan.shape.kinds.partial:
        return 1.0
    whole, short = BESIDE_TEXT if plan.shape.mixed else ALONE
    counts = plan.counts
    share = counts.whole / max(1, counts.whole + counts.short)
    return share * whole + (1 - share) * short


def pays(backend: str, device: str, flops: float, density: float) -> bool:
    """Whether a sparse call runs faster than dense.

    Args:
        device: type of the device, such as "cuda".
        flops: of the dense call, 4 x batch x heads x queries x keys x head_dim.
        density: launched density of the plan.
    """
    cost = MEASURED.get((backend, device))
    if cost is None:
        return True
    dense = flops / cost.dense_rate
    return cost.overhead + cost.slope * density * dense < dense
