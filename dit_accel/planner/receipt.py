"""What the planner says of plans that a run used: a part of its report."""

from __future__ import annotations

from typing import Any, NamedTuple

from dit_accel.kernels.patterns import Pattern
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.planner.costs import cost_table
from dit_accel.planner.forecast import cut_text, describe


class PlannedCall(NamedTuple):
    """Who ran a plan, on tensors of which sizes, and whether it moved tokens for that."""

    backend: str
    batch: int
    heads: int
    head_dim: int
    moved: bool


def plan_row(
    pattern: Pattern, layout: TokenLayout, plan: BlockPlan, call: PlannedCall, calls: int
) -> dict[str, Any]:
    """One plan of a run: its blocks, and milliseconds that a table of this GPU predicts."""
    backend, batch, heads, head_dim, moved = call
    video = layout.video_length
    others = -(-layout.before // plan.shape.block_q) + -(-layout.after // plan.shape.block_q)
    blocks = plan.shape.q_blocks - others
    row: dict[str, Any] = {
        "pattern": pattern.name,
        "parameters": describe(pattern),
        "backend": backend,
        "calls": calls,
        "blocks": blocks,
        "cut": "blocks",
        "waste": (
            None if backend in ("torch", "reference") else blocks * plan.shape.block_q / video - 1
        ),
        "launched_density": plan.launched_density(backend),
        "predicted_ms": None,
        "predicted_dense_ms": None,
    }
    if not pattern.by_head:
        kind = "boxes" if plan.shape.box is not None else kind_for(plan.device)
        row["cut"] = cut_text(pattern.tiling(layout, kind))
    table = cost_table(None) if plan.device.type == "cuda" else None
    if table is not None:
        row["predicted_dense_ms"] = table.dense_ms(batch, heads, plan.blocks.q_length, head_dim)
        if backend in table.backends:
            row["predicted_ms"] = table.sparse_ms(
                plan, backend, batch, heads, head_dim, moved=moved
            )
    return row


def plan_lines(row: dict[str, Any]) -> list[str]:
    """A plan's row as text, for the report."""
    waste = "" if row["waste"] is None else f", waste {row['waste']:.1%}"
    lines = [
        f"{row['pattern']}: {row['blocks']:,} {row['cut']}{waste}, "
        f"launched {row['launched_density']:.3f}"
    ]
    if row["predicted_ms"] is not None and row["predicted_dense_ms"] is not None:
        sparse, dense = row["predicted_ms"], row["predicted_dense_ms"]
        lines.append(f"predicted {sparse:.2f} ms a call, dense {dense:.2f} ({dense / sparse:.2f}x)")
    return lines
