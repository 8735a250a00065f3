"""Attention alone: relative error against density, for every compute, on a model's own q, k, v.

The model runs dense; at chosen layers and moments of the run each candidate computes the same call,
and its output is compared with dense attention's. Nothing is kept of a call but a few numbers.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.compare.probe import Capture
from dit_accel.compare.specs import Spec, toml
from dit_accel.errors import DitAccelError
from dit_accel.kernels.backends import choose
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.computes import COMPUTES, compute
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.patterns import Pattern, plan_for
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.selectors import Context, Selector
from dit_accel.layout import TokenLayout

KNOBS: dict[str, tuple[Any, ...]] = {
    "window": tuple(
        {"fraction": shares}
        for shares in ([1.0, 0.75, 0.75], [1.0, 0.5, 0.5], [0.6, 0.5, 0.5], [0.6, 0.35, 0.35])
    ),
    "density": (0.6, 0.4, 0.2),
    "decay": (1.0, 0.5, 0.2),
    "references": ({"fraction": 0.5}, {"fraction": 0.25}),
    "radius": ({"fraction": 0.4}, {"fraction": 0.2}),
    "p": (0.95, 0.85, 0.7),
    "base": ({"fraction": [0.7, 0.7]}, {"fraction": [0.5, 0.5]}),
}
"""What decides how much a compute keeps, and the values that are tried by default. One whose
parameters have none of these names is tried as it is."""
MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Moments of the run that are looked at by default."""


@dataclass(frozen=True)
class Candidate:
    """A compute under the name that the table gives it: makes a plan for a captured call."""

    name: str
    plan: Callable[[Capture], BlockPlan]


@dataclass(frozen=True)
class Row:
    """One candidate on one captured call.

    Args:
        error: |out - dense| / |dense| over all rows and heads (relative L2).
        worst_head: the largest error of a single head.
        launched_density, kept_density: of the plan, see `results.Clip`.
    """

    candidate: str
    name: str
    layer: int
    step: int
    branch: str
    launched_density: float
    kept_density: float
    error: float
    worst_head: float


def candidates(specs: Sequence[Spec] = ()) -> list[Candidate]:
    """Those that the specs' profiles run; without specs every compute, at several values."""
    if not specs:
        return [_candidate(name, each) for name, each in default_computes()]
    found = []
    for spec in specs:
        computes = [r.compute for r in spec.profile.rules if isinstance(r.compute, Compute)]
        several = len(set(computes)) > 1
        for index, each in enumerate(dict.fromkeys(computes)):
            found.append(_candidate(f"{spec.name}#{index}" if several else spec.name, each))
    if not found:
        names = ", ".join(spec.name for spec in specs)
        raise DitAccelError(f"none of the profiles ({names}) runs a pattern or a selector.")
    return found


def default_computes() -> list[tuple[str, Compute]]:
    """(inline profile, compute) of every pattern and selector at the values of its knob."""
    found: list[tuple[str, Compute]] = []
    for name, kind in COMPUTES.items():
        knob = next((item.name for item in fields(kind) if item.name in KNOBS), None)
        if knob is None:
            found.append((name, compute(name)))
            continue
        for value in KNOBS[knob]:
            shares = value["fraction"] if knob == "window" else None
            text = ",".join(map(repr, shares)) if shares else toml(value)
            found.append((f"{name}:{knob}={text}", compute(name, **{knob: value})))
    return found


def measure(capture: Capture, tried: Sequence[Candidate]) -> list[Row]:
    """The rows of all candidates on one captured call."""
    reference = _rows(capture, dense(capture))
    return [_row(capture, candidate, reference) for candidate in tried]


def _row(capture: Capture, candidate: Candidate, reference: Tensor) -> Row:
    plan = candidate.plan(capture)
    q, k, v = capture.query, capture.key, capture.value
    backend = choose(q, k, v, plan)
    out = block_sparse_attention(q, k, v, plan, scale=capture.scale, backend=backend)
    assert isinstance(out, Tensor)
    wrong = (_rows(capture, out) - reference).square().sum((0, 2))
    norm = reference.square().sum((0, 2))
    return Row(
        candidate=candidate.name,
        name=capture.name,
        layer=capture.layer,
        step=capture.step,
        branch=capture.branch,
        launched_density=plan.launched_density(backend),
        kept_density=plan.kept_density(),
        error=float((wrong.sum() / norm.sum()).sqrt()),
        worst_head=float((wrong / norm).max().sqrt()),
    )


def dense(capture: Capture) -> Tensor:
    """Dense attention of a captured call, [batch, tokens, heads, head_dim]."""
    q, k, v = (t.transpose(1, 2) for t in (capture.query, capture.key, capture.value))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, capture.mask, scale=capture.scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _rows(capture: Capture, output: Tensor) -> Tensor:
    """float32 [rows, heads, head_dim] of valid tokens; what padding gives is never looked at."""
    layout = capture.layout
    if layout.samples is None:
        return output.flatten(0, 1).float()
    keep = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
    for sample in range(layout.samples):
        keep[sample, layout.valid_tokens(sample)] = True
    return output[keep].float()


def _candidate(name: str, tried: Compute) -> Candidate:
    planned = lru_cache(maxsize=8)(plan_for)  # captured calls are mostly alike
    cut = lru_cache(maxsize=8)(_blocks)

    def plan(capture: Capture) -> BlockPlan:
        q, k, v = capture.query, capture.key, capture.value
        if isinstance(tried, Selector):
            scale = q.shape[-1] ** -0.5 if capture.scale is None else capture.scale
            blocks = cut(capture.layout, tried, q.device)
            return tried.select(Context(q, k, v, blocks, scale, q.shape[2]))
        assert isinstance(tried, Pattern)
        return planned(capture.layout, tried, q.device, q.shape[2])

    return Candidate(name, plan)


def _blocks(layout: TokenLayout, tried: Selector, device: torch.device) -> Blocks:
    return blocks_of(layout, tried.tiling(layout, kind_for(device)), device)


@dataclass(frozen=True)
class Summary:
    """One candidate over all captured calls: medians, and its largest error."""

    candidate: str
    calls: int
    launched_density: float
    kept_density: float
    error: float
    worst_error: float
    worst_at: str


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary per candidate, by launched density."""
    ordered = sorted(rows, key=lambda row: row.candidate)
    found = []
    for name, group in groupby(ordered, key=lambda row: row.candidate):
        members = list(group)
        worst = max(members, key=lambda row: row.error)
        found.append(
            Summary(
                candidate=name,
                calls=len(members),
                launched_density=statistics.median(row.launched_density for row in members),
                kept_density=statistics.median(row.kept_density for row in members),
                error=statistics.median(row.error for row in members),
                worst_error=worst.error,
                worst_at=f"{worst.name}, step {worst.step}",
            )
        )
    return sorted(found, key=lambda each: (-each.launched_density, each.candidate))


def as_csv(rows: Sequence[Row]) -> str:
    """All rows, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [item.name for item in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """All rows and the summary; `about` says what they were measured on."""
    data = {
        **about,
        "summary": [asdict(each) for each in summarise(rows)],
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
