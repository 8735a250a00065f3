"""Whether a kernel's result is right: a float64 oracle over sampled query blocks of a plan.

The oracle reads the plan's own tables: for a query block of a head it gathers the tokens of the
listed key blocks, applies the token mask to the partial ones, and computes softmax attention in
float64. Small calls are compared whole, with the reference backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.reference import reference_attention

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative L2 error over a sample; bfloat16 kernels are at 2 to 3e-3."""
SAMPLES = 24
"""Query blocks at least; one for each head at least."""
SMALL = 1 << 22
"""Token pairs (over all heads) up to which a call is compared whole."""


@dataclass(frozen=True)
class Expected:
    """Right rows: out[sample, tokens, head] should be `rows` [n, D] float64."""

    sample: int
    head: int
    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Proof:
    """`error` is the worst relative L2 error; `why` says what is wrong, "" where all is right."""

    error: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why


def expected_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None = None
) -> list[Expected]:
    """What a sparse call must give: everywhere where it is small, else in sampled blocks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, length, heads, _ = q.shape
    if batch * heads * length * k.shape[1] <= SMALL:
        out, _ = reference_attention(q.double(), k.double(), v.double(), plan, scale)
        everything = torch.arange(length, device=q.device)
        return [
            Expected(b, h, everything, out[b, :, h]) for b in range(batch) for h in range(heads)
        ]
    return [
        _block_rows(q, k, v, plan, scale, *where)
        for where in sampled_blocks(plan, batch, heads, max(SAMPLES, heads))
    ]


def expected_dense(q: Tensor, k: Tensor, v: Tensor, rows: int = 64) -> list[Expected]:
    """What a dense call must give, in sampled rows of every head of the first sample."""
    tokens = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).long()
    group = q.shape[2] // k.shape[2]
    found = []
    for head in range(q.shape[2]):
        keys, values = (x[0, :, head // group].double() for x in (k, v))
        scores = q[0, tokens, head].double() @ keys.mT * q.shape[-1] ** -0.5
        found.append(Expected(0, head, tokens, scores.softmax(-1) @ values))
    return found


def prove(out: Tensor, expected: Sequence[Expected]) -> Proof:
    """Compare out [B, L, H, D] with the right rows; every element must be finite."""
    if not bool(torch.isfinite(out).all()):
        return Proof(math.inf, "NaN or Inf in the output (or elements that nobody wrote)")
    errors = torch.stack(
        [
            (out[e.sample, e.tokens, e.head].double() - e.rows).norm() / e.rows.norm()
            for e in expected
        ]
    )
    error = float(errors.max())
    limit = TOLERANCE[out.dtype]
    if not error <= limit:
        worst = expected[int(errors.argmax())]
        return Proof(
            error,
            f"relative error {error:.2e} above {limit:.0e} in head {worst.head}, "
            f"tokens {int(worst.tokens.min())} to {int(worst.tokens.max())}",
        )
    return Proof(error)


def poisoned(call: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The call's output, after memory of its size was filled with NaN and given back.

    An allocator hands that memory to the call, so that an element it never writes shows.
    """
    blank = torch.full_like(like, torch.nan)
    del blank
    return call()


def sampled_blocks(
    plan: BlockPlan, batch: int, heads: int, samples: int
) -> list[tuple[int, int, int]]:
    """(sample, head, query block): first, last, shortest, longest list, others spread evenly."""
    lengths = plan.blocks.q.lengths[0]
    work = plan.visits.count.sum((0, 1))
    filled = lengths.nonzero()[:, 0]
    spread = torch.linspace(0, len(filled) - 1, max(2, samples - 3), device=filled.device)
    shortest = lengths[filled].argmin()
    blocks = [*filled[spread.long()].tolist(), int(filled[shortest]), int(work.argmax())]
    return [(i % batch, i % heads, block) for i, block in enumerate(dict.fromkeys(blocks))]


def _block_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, b: int, h: int, block: int
) -> Expected:
    queries = _tokens(plan.blocks.q, b, torch.tensor([block], device=q.device))
    full, masked = plan.visits.entries(b, h, block)
    keys = _tokens(plan.blocks.k, b, full.long())
    allowed = torch.ones(len(queries), len(keys), dtype=torch.bool, device=q.device)
    if plan.mask is not None:
        some = _tokens(plan.blocks.k, b, masked.long())
        keys = torch.cat([keys, some])
        allowed = torch.cat([allowed, plan.mask.allowed(queries, some)], 1)
    head = h // (q.shape[2] // k.shape[2])
    scores = q[b, queries, h].double() @ k[b, keys, head].double().mT * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return Expected(b, h, queries, weights @ v[b, keys, head].double())


def _tokens(table: BlockTable, b: int, blocks: Tensor) -> Tensor:
    """Raster tokens of blocks, one after another."""
    lengths = table.lengths[b if table.lengths.shape[0] > 1 else 0][blocks].long()
    first = table.starts[blocks].long()
    offsets = torch.arange(int(lengths.sum()), device=lengths.device)
    begins = lengths.cumsum(0) - lengths
    positions = offsets + torch.repeat_interleave(first - begins, lengths)
    return positions if table.order is None else table.order[positions].long()
