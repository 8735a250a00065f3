"""Which of two plans takes less time: what `costs` needs to know of each."""

from __future__ import annotations

from dit_accel import costs
from dit_accel.kernels.backends import moves_tokens
from dit_accel.kernels.plan import BlockPlan


def effort(backend: str, device: str, plan: BlockPlan) -> float:
    """A plan's time over dense, overhead aside (see `costs.effort`)."""
    whole = None
    if not plan.shape.kinds.partial:
        whole = plan.counts.whole / max(1, plan.counts.entries)
    return costs.effort(
        backend,
        device,
        plan.launched_density(backend),
        tokens=plan.blocks.q_length,
        moved=moves_tokens(backend, plan),
        whole=whole,
        beside_text=plan.shape.mixed,
    )
